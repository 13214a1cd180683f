"""Where decoder biases begin."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

ITERATIONS = 100
TOLERANCE = 1e-5


def geometric_median(x: Tensor) -> Tensor:
    """The point [d] with the least sum of distances to x [n, d], by Weiszfeld's iteration."""
    guess = x.mean(0)
    for _ in range(ITERATIONS):
        weight = 1 / torch.linalg.vector_norm(x - guess, dim=1).clamp(min=1e-9)
        previous, guess = guess, (weight @ x) / weight.sum()
        if float((guess - previous).norm()) <= TOLERANCE * float(guess.norm()):
            break
    return guess


def mean(x: Tensor) -> Tensor:
    """The mean [d] of x [n, d]."""
    return x.mean(0)


OFFSETS: Mapping[str, Callable[[Tensor], Tensor]] = {"median": geometric_median, "mean": mean}
