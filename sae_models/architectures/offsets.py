"""Initial values of decoder biases."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

ITERATIONS = 100
TOLERANCE = 1e-5


def geometric_median(x: Tensor) -> Tensor:
    """Return the point [d] that minimises the sum of distances to x [n, d], by Weiszfeld's algorithm."""
    guess = x.mean(0)
    for _ in range(ITERATIONS):
        weight = 1 / torch.linalg.vector_norm(x - guess, dim=1).clamp(min=1e-9)
        previous, guess = guess, (weight @ x) / weight.sum()
        if float((guess - previous).norm()) <= TOLERANCE * float(guess.norm()):
            break
    return guess


def mean(x: Tensor) -> Tensor:
    """Return the mean [d] of x [n, d]."""
    return x.mean(0)


OFFSETS: Mapping[str, Callable[[Tensor], Tensor]] = {"median": geometric_median, "mean": mean}
