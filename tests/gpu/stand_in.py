"""A random bundle in place of the shipped one, where that is too large to be carried to the machine with the GPU."""

from pathlib import Path

from rudder.sae_models import PRETRAINED
from rudder.sae_models.bundle import bundle as bundles
from rudder.server.bench.shapes import write_bundle

MODEL = PRETRAINED / "textbook-lm"
SHIPPED = PRETRAINED / "textbook-lm-layers.2"
SITE, WIDTH, LATENTS = "layers.2.resid_post", 192, 4096


def ensure_bundle(folder: Path = SHIPPED) -> bool:
    """Write a bundle of random directions unless there is one; return whether it was written."""
    # The folder itself may be there, empty.
    if (folder / "manifest.json").exists():
        return False
    model = bundles.Model("textbook-lm", bundles.model_sha256(MODEL), WIDTH)
    write_bundle(folder, SITE, WIDTH, LATENTS, model=model).catalogue.close()
    return True
