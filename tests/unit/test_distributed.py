"""Two processes come to the result of one, whether they share the batch or the latents."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sae_models import bundle
from sae_models.architectures import ARCHITECTURES, shards
from sae_models.training import checkpoint, config, distributed, run
from sae_models.training.distributed import ALONE, Mesh
from tests.unit import ranks, tiny
from tests.unit.test_run import curve

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
NAME = "model-layers.0"
# Sums in another order.
TOLERANCE = 2e-5


def torchrun(processes: int, *command: str) -> None:
    """Runs a module in several processes."""
    done = subprocess.run(
        [*LAUNCH, str(processes), "-m", *command], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=[(2, 1), (2, 2), (4, 2)], ids=["batch", "latents", "both"])
def together(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What processes come to that share the batch, the latents, or both."""
    processes, latent_parts = request.param
    out = tmp_path_factory.mktemp("ranks") / "found.pt"
    torchrun(processes, "tests.unit.ranks", str(out), str(latent_parts))
    found: dict[str, Any] = torch.load(out, weights_only=True)
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_processes_take_the_steps_of_one_with_dead_latents_called_back(name: str, together: dict[str, Any]) -> None:
    alone, found = ranks.result(name, ALONE), together[name]
    assert any(0 < step["dead"] < 1 and step["auxiliary"] > 0 for step in alone["steps"])
    for expected, step in zip(alone["steps"], found["steps"], strict=True):
        assert step == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert found["weights"].keys() == alone["weights"].keys()
    for field, expected in alone["weights"].items():
        assert torch.allclose(found["weights"][field], expected, atol=TOLERANCE), field


def asked_in(folder: Path) -> dict[str, Any]:
    """A short run of BatchTopK, in which latents soon count as dead."""
    return tiny.plain(folder, tokens=6400, checkpoint_every=50, dead_after=64)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    asked = config.convert(asked_in(tmp_path_factory.mktemp("alone")))
    run.run(asked)
    return Path(asked.out)


@pytest.mark.parametrize("changes", [(), ("latent_ranks=2",), ("data.store={}",)])
def test_a_run_of_two_processes_comes_to_the_bundle_of_one(
    alone: Path, tmp_path: Path, changes: tuple[str, ...]
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(asked_in(tmp_path)))
    given = [change.format(tmp_path / "store") for change in changes]
    torchrun(2, "sae_models.training", str(tmp_path / "run.yaml"), *given)
    out = tmp_path / "run"
    one, two = (bundle.load(path / NAME) for path in (alone, out))
    if any("store" in change for change in changes):
        # A store rounds to bfloat16 and is read in chunks of its own.
        assert two.manifest.training.fvu == pytest.approx(one.manifest.training.fvu, rel=0.3)
    else:
        assert max(figures["dead_share"] for _, _, figures in curve(alone)) > 0
        for (step, name, mine), (expected_step, expected_name, theirs) in zip(curve(out), curve(alone), strict=True):
            assert (step, name) == (expected_step, expected_name)
            assert mine == pytest.approx(theirs, rel=1e-4)
        assert torch.allclose(two.sae.encoder, one.sae.encoder, atol=1e-5)
        assert torch.allclose(two.sae.decoder, one.sae.decoder, atol=1e-5)
    parts = {file.name for file in (out / run.CHECKPOINTS).iterdir()}
    expected = ["000000100.0.pt", "000000100.1.pt"] if "latent_ranks=2" in changes else ["000000100.0.pt"]
    assert parts == {*expected, checkpoint.LATEST}


def test_processes_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"^latent_ranks: 3 does not divide the 4 processes"):
        distributed.join(3, 64)
    with pytest.raises(ValueError, match=r"^batch: 63 is not divided by 4 processes"):
        distributed.join(1, 63)


def test_parts_of_a_batch_are_the_batch() -> None:
    x = torch.arange(12.0).view(6, 2)
    assert torch.equal(torch.cat([Mesh(part, 3).part(x) for part in range(3)]), x)


def test_latents_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^latent_ranks: 3 does not divide the 64 latents"):
        shards.sharded(ranks.begun("topk", ALONE).architecture, Mesh(latent_parts=3))
