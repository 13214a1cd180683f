"""The area under the curve equals a count over pairs; a label is kept only if it is better than chance."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from rudder.sae_models.bundle import bundle, catalogue
from rudder.sae_models.bundle.catalogue import Catalogue, Latent, Summary
from rudder.sae_models.evaluation import label_score
from rudder.sae_models.evaluation.examples import Floats

# Few distinct values, so that ties are common.
SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=30)


def floats(values: list[int]) -> Floats:
    """Return scores as an array."""
    return np.array(values, np.float32)


@settings(max_examples=300, deadline=None)
@given(SCORES, SCORES)
def test_area_is_the_share_of_pairs_in_order_and_ties_count_half(positive: list[int], negative: list[int]) -> None:
    pairs = [(a > b) + 0.5 * (a == b) for a in positive for b in negative]
    assert label_score.area_under_curve(floats(positive), floats(negative)) == pytest.approx(sum(pairs) / len(pairs))


@settings(max_examples=100, deadline=None)
@given(SCORES, SCORES)
def test_area_is_the_mann_whitney_statistic_of_scipy(positive: list[int], negative: list[int]) -> None:
    statistic = stats.mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative))
    assert label_score.area_under_curve(floats(positive), floats(negative)) == pytest.approx(statistic)


def test_interval_holds_the_area_of_a_label_without_information() -> None:
    rng, outside = np.random.default_rng(0), 0
    for _ in range(2000):
        scored = label_score.detection(*rng.normal(size=(2, 20)).astype(np.float32))
        assert scored is not None
        outside += abs(scored.area - 0.5) > scored.error
    assert 0.03 < outside / 2000 < 0.07


def test_label_is_above_chance_only_with_its_whole_interval() -> None:
    assert label_score.Detection(0.8, 0.25).above_chance
    assert not label_score.Detection(0.7, 0.2).above_chance
    assert not label_score.Detection(0.2, 0.1).above_chance


@pytest.mark.parametrize(("positive", "negative"), [(0, 9), (3, 9), (9, 3), (9, 0)])
def test_few_contexts_have_no_score(positive: int, negative: int) -> None:
    assert label_score.detection(floats([1] * positive), floats([0] * negative)) is None


def summary(index: int, score: float | None, frequency: float, label: str = "a label") -> Latent:
    """Return an entry with a label score."""
    error = None if score is None else 0.1
    return Latent(Summary(index, label, frequency, 1.0, "corpus", score, error), (), ())


def test_scores_of_a_bundle_leave_out_latents_without_a_score(tmp_path: Path) -> None:
    latents = [summary(0, 0.9, 0.1), summary(1, 0.5, 0.3, ""), summary(2, 0.7, 0.1), summary(3, None, 0.1)]
    catalogue.write(tmp_path / bundle.CATALOGUE, [*latents, summary(4, None, 0.0, "(inactive)")])
    reader = Catalogue(tmp_path / bundle.CATALOGUE)
    scores = label_score.label_scores(reader)
    reader.close()
    assert (scores.median, scores.quartiles, scores.scored) == (0.7, (0.6, 0.8), 3)
    assert scores.by_activity == pytest.approx((0.9 * 0.1 + 0.5 * 0.3 + 0.7 * 0.1) / 0.5)
    assert scores.labelled == 0.75
    assert label_score.median_label_score(tmp_path) == 0.7


def test_a_bundle_without_scores_has_no_median(tmp_path: Path) -> None:
    catalogue.write(tmp_path / bundle.CATALOGUE, [summary(0, None, 0.5)])
    assert math.isnan(label_score.median_label_score(tmp_path))
