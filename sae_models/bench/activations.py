"""Synthetic activations with the structure that SAEs look for, in any width."""

import torch
from torch import Tensor
from torch.nn import functional

# Heavy tails: the frequency of direction j is proportional to j ** -ZIPF; coefficients are log-normal.
ZIPF = 0.8
SPREAD = 0.5
NOISE = 0.3


def directions(count: int, d: int, generator: torch.Generator) -> Tensor:
    """Return random unit directions [count, d]."""
    return functional.normalize(torch.randn(count, d, generator=generator), dim=1)


def synthetic_activations(tokens: int, planted: Tensor, active: int, generator: torch.Generator) -> Tensor:
    """Return x [tokens, d]: a sum of `active` planted directions [m, d] + noise + a constant; mean ||x||^2 is about d.

    Directions are drawn by Zipf's law. A quarter of each token's directions are partners of others of the same token,
    so that some directions co-occur.
    """
    count, d = planted.shape
    weight = torch.arange(1, count + 1, dtype=torch.float64).pow(-ZIPF)
    drawn = torch.multinomial(weight, tokens * active, replacement=True, generator=generator).view(tokens, active)
    neighbour = (drawn[:, : active // 4] + count // 2) % count
    drawn = torch.cat([drawn[:, : active - active // 4], neighbour], dim=1)
    strength = torch.exp(SPREAD * torch.randn(tokens, active, generator=generator))
    x: Tensor = functional.embedding_bag(drawn, planted, per_sample_weights=strength, mode="sum")
    x += NOISE * active**0.5 / d**0.5 * torch.randn(tokens, d, generator=generator)
    x += torch.randn(d, generator=torch.Generator().manual_seed(0)) * (active / d) ** 0.5 / 2
    x *= (d / float(x.square().sum(1).mean())) ** 0.5
    return x
