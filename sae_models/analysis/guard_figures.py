"""Figures of guards on held-out exchanges, with intervals that resample whole sections."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from rudder.sae_models.evaluation.label_score import area_under_curve
from rudder.sae_models.statistics import Floats, Statistic, exceeds

RESAMPLES = 1000
INTERVAL = (0.025, 0.975)
# A figure of positives [n] and negatives [m].
Measure = Callable[[Floats, Floats], float]


@dataclass(frozen=True)
class Figure:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Clustered:
    """Values of each exchange [n, ...], and the section that it is from: those of one section are not independent."""

    values: Floats
    cluster: Sequence[str]

    def resamples(self, generator: np.random.Generator) -> Iterator[Floats]:
        """Yield, without end, the values of as many sections, drawn with replacement."""
        _, number = np.unique(np.array(self.cluster), return_inverse=True)
        ordered, size = self.values[np.argsort(number, kind="stable")], np.bincount(number)
        first = np.cumsum(size) - size
        while True:
            drawn = generator.integers(0, len(size), len(size))
            counts = size[drawn]
            # The first index of each drawn section, and up from there.
            start = np.repeat(first[drawn] - (np.cumsum(counts) - counts), counts)
            yield ordered[start + np.arange(len(start))]


def figure(measure: Measure, positive: Clustered, negative: Clustered, seed: int = 0) -> Figure:
    """Return a measure with the percentile interval of a bootstrap over sections, the same resamples for each seed."""
    sides = (side.resamples(np.random.default_rng([seed, i])) for i, side in enumerate((positive, negative)))
    draws = [measure(*drawn) for drawn in islice(zip(*sides, strict=True), RESAMPLES)]
    return Figure(measure(positive.values, negative.values), *np.quantile(draws, INTERVAL).tolist())


def share(measured: Clustered, seed: int = 0) -> Figure:
    """Return the mean of values, such as 1 where a guard held, with its interval."""
    none = Clustered(np.zeros(1), [""])
    return figure(lambda values, _: float(values.mean()), measured, none, seed)


def auroc(positive: Floats, negative: Floats) -> float:
    """Return the area under the ROC curve."""
    return area_under_curve(positive, negative)


def recall_at(false_alarms: float) -> Measure:
    """Return the measure of the share of positives above the level that at most this share of the negatives exceeds."""

    def recall(positive: Floats, negative: Floats) -> float:
        level = np.sort(negative)[-1 - int(false_alarms * len(negative))]
        return float((positive > level).mean())

    return recall


def highest(scores: Sequence[Floats], statistic: Statistic) -> Floats:
    """Return the maximum [n] of the served statistic over the scores of each exchange; NaN counts as infinite."""
    statistics = (statistic.copy().update(s) for s in scores)
    return np.array([np.nan_to_num(values, nan=np.inf).max() for values in statistics])


def alarm(scores: Floats, statistic: Statistic, level: float) -> int | None:
    """Return the index of the first token at which the statistic exceeds the level; None: it never does."""
    above: NDArray[np.bool_] = exceeds(statistic.copy().update(scores), level)
    return int(above.argmax()) if above.any() else None


def released(alarm_at: int | None, begins: int, tokens: int, hold_back: int) -> int:
    """Return how many tokens of what begins at `begins`, of `tokens` in all, leave before a guard stops the stream.

    Token t leaves when the statistic up to t + hold_back is below the level: those before alarm_at - hold_back.
    """
    return max(0, (tokens if alarm_at is None else alarm_at - hold_back) - begins)
