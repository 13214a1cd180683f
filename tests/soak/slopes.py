"""The slope of a series by Theil and Sen: the median of the slopes of all pairs, which outliers hardly move."""

from collections.abc import Sequence
from itertools import combinations
from math import sqrt
from statistics import NormalDist, median
from typing import NamedTuple

CONFIDENCE = 0.95


class Slope(NamedTuple):
    """Change of a value for each unit of time, and its confidence interval."""

    value: float
    low: float
    high: float


def slope_of(points: Sequence[tuple[float, float]]) -> Slope:
    """Return the slope of points (time, value), with the interval by Kendall's statistic (Sen, 1968).

    ValueError: fewer than three points. Values next to each other in time are assumed to vary independently.
    """
    n = len(points)
    if n < 3:
        raise ValueError(f"{n} points have no slope")
    slopes = sorted((b - a) / (t - s) for (s, a), (t, b) in combinations(points, 2))
    spread = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * sqrt(n * (n - 1) * (2 * n + 5) / 18)
    low = max(int((len(slopes) - spread) / 2), 0)
    high = min(int((len(slopes) + spread) / 2) + 1, len(slopes) - 1)
    return Slope(median(slopes), slopes[low], slopes[high])
