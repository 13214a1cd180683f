"""How sparse and how faithful an SAE is, summed over tokens in bounded memory."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rudder.sae_models.sae import SAE

# Activations held at a time: 16 MB in float32. Each time, a dictionary in half precision is converted once.
ACTIVATIONS_AT_ONCE = 1 << 22


@dataclass
class Fidelity:
    """Sums over tokens: active latents, squared error, and the target's first [d] and second moment."""

    tokens: int = 0
    active: float = 0.0
    error: float = 0.0
    square: float = 0.0
    total: Tensor | None = None

    @property
    def l0(self) -> float:
        """Mean active latents a token."""
        return self.active / self.tokens

    @property
    def compared(self) -> bool:
        """Whether outputs were compared with a target: never those of a partial SAE."""
        return self.total is not None

    @property
    def fvu(self) -> float:
        """Fraction of the target's variance unexplained; infinite where the target does not vary."""
        if self.total is None:
            return float("inf")
        variance = self.square - float(self.total.square().sum()) / self.tokens
        return self.error / variance if variance > 0 else float("inf")


def add(sums: Fidelity, sae: SAE, x: Tensor, target: Tensor | None = None) -> None:
    """Counts inputs x [n, d], or [n, L, d] with a router; target [n, d_out] where another site is written."""
    for part, wanted in chunks(sae, x, target):
        count(sums, sae, sae.encode(part), part, wanted)


def count(sums: Fidelity, sae: SAE, latents: Tensor, x: Tensor, target: Tensor | None = None) -> None:
    """Counts inputs as `add` does, whose activations [n, F] are known."""
    sums.tokens += len(x)
    sums.active += float((latents != 0).sum())
    if sae.partial:
        return
    output, error = forward(sae, latents, x, target)
    sums.error += float(error.double().square().sum())
    aimed = (output + error).double()
    sums.square += float(aimed.square().sum())
    sums.total = aimed.sum(0) if sums.total is None else sums.total + aimed.sum(0)


def measured(sae: SAE, x: Tensor, target: Tensor | None = None) -> Fidelity:
    """Of inputs at once."""
    sums = Fidelity()
    add(sums, sae, x, target)
    return sums


def chunks(sae: SAE, x: Tensor, target: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Inputs and targets a few tokens at a time, so that the activations of all latents fit in memory."""
    size = max(1, ACTIVATIONS_AT_ONCE // sae.latents)
    for start in range(0, len(x), size):
        yield x[start : start + size], None if target is None else target[start : start + size]


def encoded(sae: SAE, x: Tensor) -> Tensor:
    """Activations [n, F] of inputs, a few tokens at a time."""
    return torch.cat([sae.encode(part) for part, _ in chunks(sae, x, None)])


def forward(sae: SAE, latents: Tensor, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and error as SAE.forward gives them, without encoding again what is encoded."""
    if sae.router is not None:
        return sae.forward(x, target)
    output = sae.decode(latents, x)
    return output, (x if target is None else target).float() - output
