"""Two processes compute the result of one, sharding the batch or the latents."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rudder.sae_models.architectures import ARCHITECTURES, shards
from rudder.sae_models.bundle import bundle
from rudder.sae_models.sparse import collectives
from rudder.sae_models.sparse.collectives import SINGLE_PROCESS, Mesh
from rudder.sae_models.training import checkpoint, config, run
from tests.unit import ranks, tiny
from tests.unit.sae_models.training.test_run import curve

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ROOT = Path(__file__).parents[4]
NAME = "model-layers.0"
# Floating-point sums in a different order.
TOLERANCE = 2e-5


def torchrun(processes: int, *command: str) -> None:
    """Run a module in several processes."""
    launched = [*LAUNCH, str(processes), "-m", *command]
    paths = os.pathsep.join([str(ROOT), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(launched, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=[(2, 1), (2, 2), (4, 2)], ids=["batch", "latents", "both"])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the results of processes that share the batch, the latents, or both."""
    processes, latent_parts = request.param
    out = tmp_path_factory.mktemp("ranks") / "results.pt"
    torchrun(processes, "tests.unit.ranks", str(out), str(latent_parts))
    results: dict[str, Any] = torch.load(out, weights_only=True)
    return results


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_processes_take_the_steps_of_one_including_auxk(name: str, together: dict[str, Any]) -> None:
    alone, results = ranks.result(name, SINGLE_PROCESS), together[name]
    assert any(0 < step["dead"] < 1 and step["auxiliary"] > 0 for step in alone["steps"])
    for expected, step in zip(alone["steps"], results["steps"], strict=True):
        assert step == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert results["weights"].keys() == alone["weights"].keys()
    for field, expected in alone["weights"].items():
        assert torch.allclose(results["weights"][field], expected, atol=TOLERANCE), field


def run_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of a short BatchTopK run, in which a latent is dead after one token without firing."""
    return tiny.plain(folder, tokens=6400, checkpoint_every=50, dead_after=1)


@pytest.mark.parametrize("change", ["latent_ranks=2", "data.store=store"])
def test_run_of_two_processes_equals_the_bundle_of_one(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sharded latents and live vectors, and with a sharded batch and stored vectors."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_settings(tmp_path)))
    stored = {"data.store": "store"} if "store" in change else {}
    run.run(config.load(tmp_path / "run.yaml", {**stored, "out": "alone"}))
    torchrun(2, "rudder.server", "train", str(tmp_path / "run.yaml"), f"--{change}", "--out=together")
    alone_bundle, together_bundle = (bundle.load(tmp_path / name / NAME) for name in ("alone", "together"))
    alone, together = curve(tmp_path / "alone"), curve(tmp_path / "together")
    assert max(figures["dead_share"] for _, _, figures in alone) > 0
    for (step, name, together_figures), (expected_step, expected_name, alone_figures) in zip(
        together, alone, strict=True
    ):
        assert (step, name) == (expected_step, expected_name)
        assert together_figures == pytest.approx(alone_figures, rel=1e-4)
    assert torch.allclose(together_bundle.sae.encoder, alone_bundle.sae.encoder, atol=TOLERANCE)
    assert torch.allclose(together_bundle.sae.decoder, alone_bundle.sae.decoder, atol=TOLERANCE)
    parts = {file.name for file in (tmp_path / "together" / run.CHECKPOINTS).iterdir()}
    expected = ["000000100.0.pt"] if stored else ["000000100.0.pt", "000000100.1.pt"]
    assert parts == {*expected, checkpoint.LATEST}


def test_indivisible_number_of_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"^latent_ranks: 3 does not divide the 4 processes"):
        collectives.init_mesh(3, 64)
    with pytest.raises(ValueError, match=r"^batch: 63 is not divided by 4 processes"):
        collectives.init_mesh(1, 63)


def test_local_batches_concatenate_to_the_batch() -> None:
    x = torch.arange(12.0).view(6, 2)
    assert torch.equal(torch.cat([Mesh(part, 3).local_batch(x) for part in range(3)]), x)


def test_indivisible_latents_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^latent_ranks: 3 does not divide the 64 latents"):
        shards.shard(ranks.initialised_trainer("topk", SINGLE_PROCESS).architecture, Mesh(latent_parts=3))
