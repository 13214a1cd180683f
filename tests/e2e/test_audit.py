"""From a policy to its record: it is refused without a certificate, certified, served, and its calls are in the log."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rudder.sae_models import PRETRAINED
from rudder.sae_models.bundle import bundle
from rudder_client import Client
from tests.e2e.conftest import FLAGS, running

pytestmark = [pytest.mark.e2e, pytest.mark.long]
SITE, LATENT = "layers.2.resid_post", 7
STRICT = {"policies.allow_uncertified": "false"}
WORDS = (
    "cell",
    "court",
    "market",
    "bacteria",
    "planet",
    "music",
    "enzyme",
    "treaty",
    "price",
    "virus",
    "orbit",
    "verb",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a policy of the shipped bundle, texts for its evaluation, and a key."""
    loaded = bundle.load(PRETRAINED / "textbook-lm-layers.2")
    latent = {"feature": {"index": LATENT, "bundle": loaded.manifest.name}}
    policy = {
        "name": "low", "version": 1, "binds": {"all": True}, "bundles": {loaded.manifest.name: loaded.sha256},
        "program": {"sites": [{"site": SITE, "edits": [{"row": latent, "set": 3.0}]}]},
    }  # fmt: skip
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "low.yaml").write_text(yaml.safe_dump(policy))
    texts = [json.dumps({"text": f"The {word} of the", "answer": " first kind"}) for word in WORDS]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    rudder(tmp_path, "audit", "key", "audit.key")
    return tmp_path


def rudder(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in the folder."""
    command = [sys.executable, "-m", "rudder.server", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200, check=False)


def test_policy_is_certified_served_and_on_record(folder: Path) -> None:
    flags = [f"--{name}={value}" for name, value in (FLAGS | STRICT).items()]
    ports = ["--listen.port=0", "--listen.metrics_port=0", "--policies.folder=policies"]
    refused = rudder(folder, "serve", *flags, *ports)
    assert refused.returncode == 2, refused.stderr[-2000:]
    assert "certificate: NONE: it has no certificate; run `rudder policy certify FILE`" in " ".join(
        refused.stderr.split()
    )

    certify = ["policy", "certify", "policies/low.yaml", *flags]
    recorded = rudder(folder, *certify, "--record", "--texts", "texts.jsonl")
    assert recorded.returncode == 0, recorded.stderr[-2000:]
    assert "low version 1: PASS" in recorded.stdout
    assert "12 of 12 texts" in recorded.stdout

    log, key = folder / "audit", str(folder / "audit.key")
    fields = STRICT | {"policies.folder": str(folder / "policies"), "audit.folder": str(log), "audit.key_file": key}
    with running(folder, **fields, **{"audit.fsync": "always"}) as server, Client(server.address) as client:
        for number in range(3):
            client.complete("The cell", max_tokens=number + 2, ignore_eos=True)
        assert server.metric("rudder_audit_records_total", outcome="written") == 7
        assert server.metric("rudder_audit_failing") == 0
    verified = rudder(folder, "audit", "verify", str(log), "--key-file", key)
    assert verified.stdout.startswith("whole: 8 entries in 1 files, 8 of them vouched for by the head"), verified
    assert "running" not in verified.stdout
    entries = [json.loads(line) for line in (log / "audit-000001.jsonl").read_text().splitlines()]
    assert [entry["kind"] for entry in entries] == ["begin", "policy", *(["opened", "call"] * 3)]
    assert [entry["choices"][0]["generated_tokens"] for entry in entries[3::2]] == [2, 3, 4]
    assert all(entry["choices"][0]["edits"][0]["tokens"] for entry in entries[3::2])
    assert "The cell" not in (log / "audit-000001.jsonl").read_text()
    (log / "audit-000001.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    assert rudder(folder, "audit", "verify", str(log), "--key-file", key).returncode == 1
