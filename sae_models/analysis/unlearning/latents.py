"""Rank latents by how much they belong to a topic: the published rules on the same figures of one corpus.

All figures are over tokens of the folds for selection. `near` is the neighbour where a latent is most frequent, so that
vocabulary which the topic shares with a neighbour does not pass for its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rudder.sae_models.analysis.unlearning.material import Material
from rudder.sae_models.sae import SAE

TINY = 1e-21
# Farrell et al.: latents this frequent on retained text are left out. CRISP: at least this ratio to the neighbours.
CEILING, RATIO = 0.01, 3.0
# DSG: percentiles of the topic's figure and of the ratio that a latent must reach.
FLOOR, RATIO_PERCENTILE = 0.05, 0.95
RARE = 1e-4
BLOCK = 4096


@dataclass(frozen=True)
class Activity:
    """Figures of latents [F] on some text: number of tokens, share of them at which a latent is active, mean activation
    and mean square.
    """

    tokens: int
    frequency: Tensor
    mean: Tensor
    square: Tensor


@dataclass(frozen=True)
class Activities:
    """Activity on the topic, on each neighbour, and on all that is not the topic."""

    forget: Activity
    neighbours: Sequence[Activity]
    retain: Activity

    @property
    def near(self) -> Tensor:
        """Largest frequency on a neighbour [F], or that on all retained text without one."""
        return torch.stack([a.frequency for a in self.neighbours or [self.retain]]).amax(0)


def activity(sae: SAE, x: Tensor) -> Activity:
    """Return the activity on residuals x [n, d]."""
    active, total, square = torch.zeros(3, sae.latents)
    for part in x.split(BLOCK):
        f = sae.encode(part)
        active += (f > 0).sum(0)
        total += f.sum(0)
        square += f.square().sum(0)
    count = max(1, len(x))
    return Activity(len(x), active / count, total / count, square / count)


def activities(material: Material, folds: Sequence[int]) -> Activities:
    """Return activities on the windows and definitions of some folds."""
    topic = material.split.topic
    groups = [topic.books, *([book] for book in topic.neighbours), [*topic.neighbours, *material.split.far]]
    forget, *near, retain = (activity(material.rig.bundle.sae, tokens_of(material, folds, books)) for books in groups)
    return Activities(forget, near, retain)


def tokens_of(material: Material, folds: Sequence[int], books: Sequence[str]) -> Tensor:
    """Return the residuals [n, d] of the counted tokens of windows and definitions.

    Definitions are part of it because the form of a text has latents of its own: a rule that has seen that form on
    retained text does not take them for the topic's.
    """
    windows = material.windows.take(material.windows_of(folds, books))
    lines = material.lines.take(material.lines_of(folds, books))
    return torch.cat([texts.x[texts.windows.counted] for texts in (windows, lines)])


def farrell(a: Activities) -> Tensor:
    """Frequency on the topic, among latents rare elsewhere (arXiv 2410.19278)."""
    return torch.where(a.retain.frequency < CEILING, a.forget.frequency, -1.0)


def dsg(a: Activities, forget: Tensor, retain: Tensor) -> Tensor:
    """Importance on the topic, among latents of the highest ratio to that on retained text (arXiv 2504.08192)."""
    ratio = forget / (retain + TINY)
    passed = (forget >= forget.quantile(FLOOR)) & (ratio >= ratio.quantile(RATIO_PERCENTILE)) & (a.forget.frequency > 0)
    return torch.where(passed, forget, -1.0)


def crisp(a: Activities) -> Tensor:
    """Difference of frequencies, among latents RATIO times as frequent as on any neighbour (arXiv 2508.13650)."""
    other = torch.maximum(a.near, a.retain.frequency)
    passed = a.forget.frequency >= RATIO * (other + RARE)
    return torch.where(passed, a.forget.frequency - other, -1.0)


def saeuron(a: Activities) -> Tensor:
    """Difference of the shares of all activation (arXiv 2501.18052)."""
    return a.forget.mean / a.forget.mean.sum() - a.retain.mean / a.retain.mean.sum()


def chi_square(a: Activities) -> Tensor:
    """Chi-square of being active against being of the topic, among latents more frequent on the topic."""
    n, m = a.forget.tokens, a.retain.tokens
    p, q = a.forget.frequency, a.retain.frequency
    pooled = (n * p + m * q) / (n + m)
    statistic = (n * m / (n + m)) * (p - q).square() / (pooled * (1 - pooled)).clamp_min(TINY)
    return torch.where(p > q, statistic, -1.0)


# By name: a score [F]; latents with one of 0 or less are not selected.
RANKERS: dict[str, Callable[[Activities], Tensor]] = {
    "farrell": farrell,
    "dsg": lambda a: dsg(a, a.forget.mean.square(), a.retain.mean.square()),
    "dsg-mean-square": lambda a: dsg(a, a.forget.square, a.retain.square),
    "crisp": crisp,
    "saeuron": saeuron,
    "chi-square": chi_square,
}


def best(scores: Tensor, count: int) -> list[int]:
    """Return the latents of the highest positive scores."""
    order = scores.argsort(descending=True)[:count]
    return [index for index in order.tolist() if scores[index] > 0]
