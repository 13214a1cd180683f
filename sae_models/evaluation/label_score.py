"""Label scores without a judge model: how well a label picks out contexts that it was not made from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rudder.sae_models.bundle.bundle import CATALOGUE
from rudder.sae_models.bundle.catalogue import ALL, Catalogue
from rudder.sae_models.evaluation.examples import Floats

# Half-width of a 95 % interval in standard deviations.
Z = 1.96
# A latent with fewer contexts has no score.
MIN_CONTEXTS = 4


@dataclass(frozen=True)
class Detection:
    """Area under the ROC curve of a label on held-out contexts, and half the width of its 95 % interval."""

    area: float
    error: float

    @property
    def above_chance(self) -> bool:
        """Whether the whole interval is above 0.5, the area of a label that says nothing."""
        return self.area - self.error > 0.5


def area_under_curve(positive: NDArray[np.floating[Any]], negative: NDArray[np.floating[Any]]) -> float:
    """Return the probability that a positive [n] scores above a negative [m]; ties count one half."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, side="left")
    not_above = np.searchsorted(ordered, positive, side="right")
    return float((below + not_above).sum() / (2 * len(positive) * len(negative)))


def detection(positive: Floats, negative: Floats) -> Detection | None:
    """Return how well scores tell positives [n] from negatives [m]; None with fewer than MIN_CONTEXTS of either.

    The interval is that of a label without any information, by the variance of the Mann-Whitney statistic: exact at
    chance, where it decides, and too wide elsewhere.
    """
    n, m = len(positive), len(negative)
    if min(n, m) < MIN_CONTEXTS:
        return None
    return Detection(area_under_curve(positive, negative), Z * float(np.sqrt((n + m + 1) / (12 * n * m))))


@dataclass(frozen=True)
class LabelScores:
    """Label scores of a bundle: the median and quartiles over its scored latents, the mean by how often each is active,
    the share of its active latents that have a label, and how many have a score.
    """

    median: float
    quartiles: tuple[float, float]
    by_activity: float
    labelled: float
    scored: int


def label_scores(catalogue: Catalogue) -> LabelScores:
    """Summarise the label scores of a catalogue; figures are NaN where no latent has a score."""
    active = [summary for summary in catalogue.page(-1, ALL) if summary.frequency]
    scored = [summary for summary in active if summary.label_score is not None]
    if not scored:
        return LabelScores(np.nan, (np.nan, np.nan), np.nan, np.nan, 0)
    score = np.array([summary.label_score for summary in scored], float)
    low, median, high = np.quantile(score, (0.25, 0.5, 0.75)).tolist()
    mean = np.average(score, weights=[summary.frequency or 0 for summary in scored])
    labelled = sum(bool(summary.label) for summary in active) / len(active)
    return LabelScores(median, (low, high), float(mean), labelled, len(scored))


def median_label_score(bundle: Path) -> float:
    """Return the median label score of a bundle's latents; NaN if its catalogue has none."""
    catalogue = Catalogue(bundle / CATALOGUE)
    median = label_scores(catalogue).median
    catalogue.close()
    return median
