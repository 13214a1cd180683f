"""Examples of latents: positions of a text on which they are active and on which they are not.

Labels are made from one half of the documents (LABELLING) and scored on the other (SCORING), so that a label is judged
by text that it was not made from.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rudder.sae_models.activations.corpus import Windows

# Cap on the activations that are held: 400 MB.
MAX_ENTRIES = 1 << 25
LABELLING, SCORING = 0, 1
POWER = {LABELLING: 2, SCORING: 1}
NEIGHBOURS = 8
# Positions drawn for each that a latent must not be active on.
DRAWS_PER_EXAMPLE = 4
# Cap on cosines held at a time: 256 MB in float32.
COSINES_PER_CHUNK = 1 << 26

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass
class Activations:
    """The non-zero activations on the first `windows` windows of a sample, in `parts` (latent, position, activation).

    A position is an index into the flattened tokens [windows * length]. Windows are added until MAX_ENTRIES are held.
    """

    windows: int = 0
    entries: int = 0
    parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def add(self, windows: int, latent: Tensor, position: Tensor, activation: Tensor) -> None:
        """Add the activations [n] on the next windows."""
        if self.entries >= MAX_ENTRIES:
            return
        self.parts.append((latent.int(), position.int(), activation))
        self.windows += windows
        self.entries += len(latent)


@dataclass(frozen=True)
class Examples:
    """Where each latent is active: positions `position[start[i] : start[i + 1]]`, ascending, with `activation`.

    `half` [windows]: LABELLING or SCORING. `length`: tokens of a window. `scoring`: the counted positions of that half.
    """

    start: Integers
    position: NDArray[np.int32]
    activation: Floats
    half: Integers
    length: int
    scoring: Integers

    def active(self, latent: int, half: int, limit: int, rng: np.random.Generator) -> Integers:
        """Draw up to `limit` positions in one half, each of another window, with probability by activation to a power:
        a label is made mainly from the strongest contexts, and scored on those that carry the activation.
        """
        span = slice(self.start[latent], self.start[latent + 1])
        position = self.position[span].astype(np.int64)
        within = self.half[position // self.length] == half
        position, activation = position[within], self.activation[span][within]
        # The smallest of exponential variables with these rates are a sample without replacement.
        position = position[np.argsort(rng.exponential(size=len(position)) / activation.astype(float) ** POWER[half])]
        _, first = np.unique(position // self.length, return_index=True)
        drawn: Integers = position[np.sort(first)[:limit]]
        return drawn

    def inactive(self, latent: int, near: Sequence[int], limit: int, rng: np.random.Generator) -> Integers:
        """Draw up to `limit` SCORING positions on which a latent is not active. Half of them are hard: a latent of
        `near` is active there.
        """
        near_positions = [self.active(other, SCORING, limit, rng) for other in near]
        hard = self._without(latent, np.concatenate([*near_positions, self.scoring[:0]]))
        random = self._without(latent, rng.choice(self.scoring, DRAWS_PER_EXAMPLE * limit))
        hard = rng.permutation(hard)[: limit // 2]
        return np.concatenate([hard, rng.permutation(np.setdiff1d(random, hard))[: limit - len(hard)]])

    def _without(self, latent: int, positions: Integers) -> Integers:
        active = self.position[self.start[latent] : self.start[latent + 1]]
        return np.setdiff1d(positions, active)

    def strength(self, latent: int, positions: Integers) -> Floats:
        """Return the activation of a latent at positions where it is active."""
        span = slice(self.start[latent], self.start[latent + 1])
        return self.activation[span][np.searchsorted(self.position[span], positions)]


def examples_of(found: Activations, windows: Windows, latents: int) -> Examples:
    """Sort the activations on a sample by latent. Its documents are LABELLING and SCORING in turn."""
    latent, position, activation = (torch.cat(part) for part in zip(*found.parts, strict=True))
    order = latent.argsort(stable=True)
    start = np.concatenate([[0], np.bincount(latent.numpy(), minlength=latents).cumsum()])
    _, document = np.unique(windows.document[: found.windows].numpy(), return_inverse=True)
    half = document % 2
    counted = windows.counted[: found.windows].numpy()
    scoring = np.flatnonzero(counted & (half == SCORING)[:, None])
    return Examples(start, position[order].numpy(), activation[order].numpy(), half, counted.shape[1], scoring)


def neighbours(decoder: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices and cosines [F, k] of the NEIGHBOURS rows most similar to each of a decoder [F, d]."""
    unit = torch.nn.functional.normalize(decoder.float(), dim=1)
    k, tops = min(NEIGHBOURS, len(unit) - 1), []
    for first in range(0, len(unit), rows := max(1, COSINES_PER_CHUNK // len(unit))):
        cosine = unit[first : first + rows] @ unit.T
        # A row is no neighbour of its own.
        cosine.diagonal(first).fill_(-torch.inf)
        tops.append(cosine.topk(k, dim=1))
    return torch.cat([top.indices for top in tops]), torch.cat([top.values for top in tops])
