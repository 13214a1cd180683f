"""The largest dose within budgets, by first crossing: the effects of a dose are not monotone (arXiv 2602.02712)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, sqrt

import numpy as np

from rudder.sae_models.concepts import Point

# Norm of the displacement as a share of ||x||: twelve steps of equal ratio.
GRID = tuple(np.geomspace(0.05, 4.0, 12).tolist())
BISECTIONS = 2


@dataclass(frozen=True)
class Budgets:
    """What steered texts may cost, against unsteered texts of the same seeds.

    Perplexity alone can be gamed: repetition lowers it. So texts must also keep their bigrams distinct, and not repeat
    4-grams.
    """

    perplexity_ratio: float = 1.5
    repetition_rise: float = 0.05
    distinct_ratio: float = 0.8

    def broken(self, point: Point, unsteered: Point) -> str:
        """Return the first budget that a point breaks; empty if none. A figure that is not a number breaks its own."""
        kept = {
            "perplexity": point.perplexity <= self.perplexity_ratio * unsteered.perplexity,
            "repetition": point.repetition <= self.repetition_rise + unsteered.repetition,
            "distinct": point.distinct >= self.distinct_ratio * unsteered.distinct,
        }
        return next((name for name, holds in kept.items() if not holds), "")


@dataclass(frozen=True)
class Crossing:
    """The result of `first_crossing`. `s_max`: 0 if no dose is within the budgets. `limit`: the budget that the next
    larger dose breaks, empty if the whole grid is within. `points`: all that were measured, by dose.
    """

    s_max: float
    limit: str
    points: tuple[Point, ...]


def first_crossing(
    measure: Callable[[float], Point],
    broken: Callable[[Point], str],
    grid: Sequence[float] = GRID,
    bisections: int = BISECTIONS,
) -> Crossing:
    """Return the largest dose of the grid such that it and every smaller one are within the budgets.

    It is refined by bisection, of the logarithm, inside the cell behind it only, never across the grid: behind the
    first dose that breaks a budget there may be others that break none. A larger budget never lowers the result.
    """
    points, low, high, limit = list[Point](), 0.0, inf, ""
    for dose in grid:
        points.append(measure(dose))
        if limit := broken(points[-1]):
            high = dose
            break
        low = dose
    for _ in range(bisections if 0 < low < high < inf else 0):
        points.append(measure(sqrt(low * high)))
        if problem := broken(points[-1]):
            high, limit = points[-1].dose, problem
        else:
            low = points[-1].dose
    return Crossing(low, limit, tuple(sorted(points, key=lambda point: point.dose)))
