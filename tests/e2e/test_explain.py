"""`rudder bundle explain` against the OpenAI-compatible server of vLLM, with the demo model as the explainer."""

import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from rudder.sae_models import PRETRAINED
from rudder.sae_models.bundle import bundle
from rudder.sae_models.evaluation import explanations
from rudder.server.process import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.long]
MODEL, SHIPPED = PRETRAINED / "textbook-lm", PRETRAINED / "textbook-lm-layers.2"
LATENTS = 4


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `vllm serve` on the demo model."""
    port, log = free_port(), tmp_path_factory.mktemp("vllm") / "log"
    options = ["--port", str(port), "--enforce-eager", "--dtype", "float32", "--max-num-seqs", "2"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL), *options]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 240
    try:
        while not answers(f"{url}/health"):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"{url}/v1"
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str) -> bool:
    """Return whether a server answers."""
    with suppress(OSError), urllib.request.urlopen(url, timeout=5) as reply:
        return bool(reply.status == 200)
    return False


def test_explanations_by_a_served_model_are_asked_for_and_judged(endpoint: str, tmp_path: Path) -> None:
    path = Path(shutil.copytree(SHIPPED, tmp_path / "toy"))
    command = [sys.executable, "-m", "rudder.server", "bundle", "explain", str(path), "--endpoint", endpoint]
    done = subprocess.run([*command, "--limit", str(LATENTS)], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{LATENTS} latents explained by {MODEL}" in done.stdout.replace("\n", "")
    known = explanations.read_journal(path.with_name("toy" + explanations.JOURNAL))
    assert len(known) == LATENTS
    # Nobody knows what a model of 4M parameters answers; an explanation without use must not become a label.
    opened = bundle.load(path)
    origins = {entry.latent: opened.catalogue.get(entry.latent).summary.origin for entry in known}
    opened.catalogue.close()
    assert {latent for latent, origin in origins.items() if origin.startswith("explained")} == {
        entry.latent for entry in known if entry.holds
    }
