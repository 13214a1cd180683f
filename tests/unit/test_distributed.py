"""Two processes come to the result of one, whether they share the batch or the latents."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sae_models import bundle
from sae_models.training import checkpoint, config, distributed, run
from sae_models.training.distributed import Mesh
from tests.unit import tiny
from tests.unit.test_run import curve

NAME = "model-layers.0"


def asked_in(folder: Path) -> dict[str, Any]:
    """A short run of TopK, whose choice of latents does not depend on the rest of the batch.

    No latent counts as dead: the call of dead latents is made by each process for its own part.
    """
    asked = tiny.plain(folder, tokens=6400, checkpoint_every=50, dead_after=1_000_000)
    asked["sae"]["architecture"] = "topk"
    return asked


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    asked = config.convert(asked_in(tmp_path_factory.mktemp("alone")))
    run.run(asked)
    return Path(asked.out)


def torchrun(folder: Path, *changes: str) -> Path:
    """The run of two processes."""
    asked = asked_in(folder)
    (folder / "run.yaml").write_text(yaml.safe_dump(asked))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "sae_models.training", str(folder / "run.yaml"), *changes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return Path(asked["out"])


@pytest.mark.parametrize("changes", [(), ("latent_ranks=2",), ("data.store={}",)])
def test_two_processes_come_to_the_result_of_one(alone: Path, tmp_path: Path, changes: tuple[str, ...]) -> None:
    out = torchrun(tmp_path, *(change.format(tmp_path / "store") for change in changes))
    one, two = (bundle.load(path / NAME) for path in (alone, out))
    if any("store" in change for change in changes):
        # A store rounds to bfloat16 and is read in chunks of its own.
        assert two.manifest.training.fvu == pytest.approx(one.manifest.training.fvu, rel=0.3)
    else:
        for (step, name, mine), (expected_step, expected_name, theirs) in zip(curve(out), curve(alone), strict=True):
            assert (step, name) == (expected_step, expected_name)
            assert mine["fvu"] == pytest.approx(theirs["fvu"], rel=1e-5)
            assert mine["l0"] == pytest.approx(theirs["l0"], rel=1e-5)
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
