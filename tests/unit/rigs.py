"""Activations whose directions are known."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rudder.sae_models.architectures import ARCHITECTURES
from rudder.sae_models.sae import SAE
from rudder.sae_models.training import trainer
from rudder.sae_models.training.trainer import Trainer

Stream = Callable[[int], Any]


def unit(count: int, d: int, g: torch.Generator) -> Tensor:
    """Random unit directions [count, d]."""
    return torch.nn.functional.normalize(torch.randn(count, d, generator=g), dim=1)


def strengths(shape: tuple[int, ...], share: float, g: torch.Generator) -> Tensor:
    """Coefficients in [0.5, 2] on a share of places, else 0."""
    return (torch.rand(shape, generator=g) < share) * (0.5 + 1.5 * torch.rand(shape, generator=g))


def planted(tokens: int, directions: Tensor, g: torch.Generator, share: float = 0.05) -> Tensor:
    """x = sum_j a_j v_j + noise, each direction active on 1 token in 20 (rig A: 64 in 32 dimensions); moved, scaled."""
    noise = 0.02 * torch.randn(tokens, directions.shape[1], generator=g)
    return 40 * (strengths((tokens, len(directions)), share, g) @ directions + noise) + 20


def run(
    name: str, stream: Stream, seed: int, d: int = 32, steps: int = 700, batch: int = 256, **settings: Any
) -> Trainer:
    """A trainer after all steps on (x) or (x, target) of a stream."""
    kind = ARCHITECTURES[name]
    defaults: dict[str, Any] = {"latents": 96, "k": 4, "learning_rate": 3e-3, "precision": "float32"}
    # Another seed than the stream's: the same random directions would be the first dictionary.
    made = kind(d, kind.config_type(**(defaults | settings)), torch.Generator().manual_seed(1000 + seed))
    trained = Trainer(made, trainer.Config(steps * batch, dead_after=20_000))
    trained.initialise(*as_tuple(stream(8192)))
    for _ in range(steps):
        trained.step(*as_tuple(stream(batch)))
    return trained


def as_tuple(batch: Any) -> tuple[Tensor, ...]:
    """(x,) or (x, target)."""
    return batch if isinstance(batch, tuple) else (batch,)


def recovered(directions: Tensor, sae: SAE) -> float:
    """Mean over directions of the largest cosine with a decoder row."""
    return float((directions @ torch.nn.functional.normalize(sae.decoder, dim=1).T).amax(1).mean())
