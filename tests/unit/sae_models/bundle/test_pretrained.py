"""The shipped bundles fit their models, and their files are small enough to keep in a repository."""

import json
from pathlib import Path

import pytest

from rudder.sae_models import PRETRAINED
from rudder.sae_models.bundle import bundle
from rudder.server.models.known import KNOWN

SMOLLM2 = sorted(PRETRAINED.glob("smollm2-135m-layers.*"))
MAX_FILE_BYTES = 16 << 20


@pytest.mark.parametrize("path", SMOLLM2, ids=lambda path: path.name)
def test_an_sae_of_smollm2_fits_the_model_that_is_downloaded(path: Path) -> None:
    read = bundle.load(path)
    model = KNOWN["smollm2-135m-instruct"]
    # The model has one file of weights, whose hash is that of the checkpoint.
    bundle.check_model(read, model.files["model.safetensors"], 576)
    claims = read.manifest.training
    assert (read.manifest.latents, read.manifest.dtype) == (8192, "bfloat16")
    assert claims.fvu is not None
    assert claims.fvu < 0.2
    assert claims.ce_recovered is not None
    assert claims.ce_recovered > 0.9
    frequency = read.statistics.frequency
    assert float(frequency[frequency > 0.1].sum() / frequency.sum()) < 0.1
    assert read.manifest.context.excluded_positions == (0,)
    read.catalogue.close()


def test_two_sites_are_shipped() -> None:
    sites = [json.loads((path / bundle.MANIFEST).read_text())["sites"] for path in SMOLLM2]
    assert sorted(sites) == [["layers.14.resid_post"], ["layers.9.resid_post"]]


def test_no_shipped_file_is_larger_than_a_repository_takes() -> None:
    sizes = {path: path.stat().st_size for path in PRETRAINED.rglob("*") if path.is_file()}
    assert max(sizes.values()) < MAX_FILE_BYTES
