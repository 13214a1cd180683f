"""A folder of images as a source of vectors: those of every position that a vision model has for each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rudder.sae_models.activations import harvest
from rudder.sae_models.activations.corpus import HELD_OUT_FOLDS, CorpusError, Document
from rudder.sae_models.activations.hooks import Site
from rudder.sae_models.activations.stream import Vectors
from rudder.sae_models.optional import extra

IMAGES_A_PASS = 32
SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})


@dataclass(frozen=True)
class Images:
    """Images as a source: each pass of the model is a chunk, run when it is asked for. A class token counts too."""

    trunk: Any
    processor: Any
    sites: tuple[Site, ...]
    files: tuple[Path, ...]

    @cached_property
    def sizes(self) -> list[int]:
        """Vectors of each pass."""
        positions = self._seen(self.files[:1])[0].shape[1]
        return [positions * len(part) for part in self._parts]

    @cached_property
    def _parts(self) -> list[tuple[Path, ...]]:
        return [self.files[first : first + IMAGES_A_PASS] for first in range(0, len(self.files), IMAGES_A_PASS)]

    def load(self, chunks: Sequence[int]) -> Vectors:
        """Runs the model. CorpusError: a file is no image."""
        found = [self._seen(self._parts[chunk]) for chunk in chunks]
        return {str(site): torch.cat([x[at].flatten(0, 1) for x in found]) for at, site in enumerate(self.sites)}

    def _seen(self, files: Sequence[Path]) -> list[Tensor]:
        """[images, positions, d] at each site."""
        inputs = {"pixel_values": torch.cat([self._pixels(file) for file in files])}
        (seen,) = harvest.activations(self.trunk, self.sites, [inputs])
        return seen

    def _pixels(self, file: Path) -> Tensor:
        pillow = extra("PIL.Image", f"images: {file}")
        try:
            with pillow.open(file) as image:
                pixels: Tensor = self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
        # What Pillow raises of a damaged file differs with its format.
        except Exception as error:
            raise CorpusError(f"images: {file}: {error}") from error
        return pixels


def read(folder: Path, model: Path, trunk: Any, sites: tuple[Site, ...], seed: int) -> tuple[Images, Images]:
    """The images of a folder and of those in it, in random order: to train on, and held out.

    CorpusError: there are too few. ValueError: the model does not say how images are prepared.
    """
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    held = [Document(files[i].parent.name, files[i].name, "").fold in HELD_OUT_FOLDS for i in order]
    if all(held) or not any(held):
        raise CorpusError(f"images: {folder}: {len(files)} images are too few to hold some out")
    processor = harvest.load_image_processor(model)
    train = Images(trunk, processor, sites, tuple(files[i] for i, out in zip(order, held, strict=True) if not out))
    return train, replace(train, files=tuple(files[i] for i, out in zip(order, held, strict=True) if out))
