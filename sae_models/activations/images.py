"""A folder of images as a vector source: the vectors of every position of every image."""

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
from rudder.sae_models.optional import import_optional

IMAGES_PER_PASS = 32
SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})


@dataclass(frozen=True)
class ImageSource:
    """A vector source over image files; each chunk is one forward pass, run when it is loaded. The position of a class
    token counts too.
    """

    trunk: Any
    processor: Any
    sites: tuple[Site, ...]
    files: tuple[Path, ...]

    @cached_property
    def chunk_sizes(self) -> list[int]:
        """Number of vectors in each chunk."""
        positions = self._vectors(self.files[:1])[0].shape[1]
        return [positions * len(part) for part in self._batches]

    @cached_property
    def _batches(self) -> list[tuple[Path, ...]]:
        return [self.files[first : first + IMAGES_PER_PASS] for first in range(0, len(self.files), IMAGES_PER_PASS)]

    def load(self, chunks: Sequence[int]) -> Vectors:
        """Run the model on some chunks. Raise CorpusError if a file is not an image."""
        batches = [self._vectors(self._batches[chunk]) for chunk in chunks]
        return {str(site): torch.cat([x[at].flatten(0, 1) for x in batches]) for at, site in enumerate(self.sites)}

    def _vectors(self, files: Sequence[Path]) -> list[Tensor]:
        """Return the vectors [images, positions, d] at each site."""
        inputs = {"pixel_values": torch.cat([self._pixels(file) for file in files])}
        (vectors,) = harvest.activations(self.trunk, self.sites, [inputs])
        return vectors

    def _pixels(self, file: Path) -> Tensor:
        pillow = import_optional("PIL.Image", f"images: {file}")
        try:
            with pillow.open(file) as image:
                pixels: Tensor = self.processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
        # The exception that Pillow raises for a damaged file depends on the image format.
        except Exception as error:
            raise CorpusError(f"images: {file}: {error}") from error
        return pixels


def read(folder: Path, model: Path, trunk: Any, sites: tuple[Site, ...], seed: int) -> tuple[ImageSource, ImageSource]:
    """Read the images of a folder and its subfolders in random order; return a training source and a held-out source.
    Raise CorpusError if there are too few images, ValueError if the model has no image processor.
    """
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    is_held_out = [Document(files[i].parent.name, files[i].name, "").fold in HELD_OUT_FOLDS for i in order]
    if all(is_held_out) or not any(is_held_out):
        raise CorpusError(f"images: {folder}: {len(files)} images are too few to hold some out")
    processor = harvest.load_image_processor(model)
    train = ImageSource(
        trunk, processor, sites, tuple(files[i] for i, excluded in zip(order, is_held_out, strict=True) if not excluded)
    )
    return train, replace(
        train, files=tuple(files[i] for i, excluded in zip(order, is_held_out, strict=True) if excluded)
    )
