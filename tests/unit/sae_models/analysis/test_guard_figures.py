"""Conformal levels keep their promise; figures by hand, their intervals on clustered data."""

import math

import numpy as np
import pytest

from rudder.sae_models.analysis import guard_figures
from rudder.sae_models.analysis.conformal import at_most, conformal_level, upper_bound
from rudder.sae_models.analysis.guard_figures import Clustered, alarm, figure, highest, recall_at, released, share
from rudder.sae_models.errors import UserError
from rudder.sae_models.statistics import Statistic


def test_conformal_level_is_the_rank_of_the_definition() -> None:
    scores = np.random.default_rng(0).permutation(np.arange(1.0, 200.0, dtype=np.float64))
    # ceil(200 * 0.99) = 198th smallest of 1..199.
    assert conformal_level(scores, 0.01) == 198


def test_conformal_level_takes_enough_exchanges() -> None:
    assert conformal_level(np.arange(99, dtype=np.float64), 0.01) == 98
    with pytest.raises(UserError, match=r"false_alarms: 0.01 takes 99 benign exchanges.*there are 98"):
        conformal_level(np.arange(98, dtype=np.float64), 0.01)


def test_conformal_levels_are_exceeded_as_often_as_promised() -> None:
    rng = np.random.default_rng(0)
    rates = [(rng.exponential(size=50) > conformal_level(rng.exponential(size=99), 0.05)).mean() for _ in range(2000)]
    assert 0.045 < np.mean(rates) < 0.055


def test_upper_bound_is_that_of_clopper_and_pearson() -> None:
    assert upper_bound(0, 740) == pytest.approx(1 - 0.05 ** (1 / 740))
    assert upper_bound(40, 41) == pytest.approx(0.95 ** (1 / 41))
    assert upper_bound(5, 5) == 1
    assert at_most(3, 200, upper_bound(3, 200)) == pytest.approx(0.05)


def test_binomial_probability_by_hand() -> None:
    assert at_most(1, 3, 0.2) == pytest.approx(0.8**3 + 3 * 0.2 * 0.8**2)


def test_recall_allows_that_share_of_negatives_and_no_more() -> None:
    negative = np.arange(200, dtype=np.float64)
    # Two of 200 may be above the level, which is the third highest.
    assert recall_at(0.01)(np.array([197.0, 197.5, 300.0]), negative) == pytest.approx(2 / 3)


def test_highest_and_alarm_fail_closed() -> None:
    scores = [np.array([0.0, 1.0, 0.5]), np.array([0.0, math.nan])]
    assert highest(scores, Statistic()).tolist() == [1.0, math.inf]
    assert [alarm(s, Statistic(), 0.9) for s in (*scores, np.zeros(3))] == [1, 1, None]


@pytest.mark.parametrize(("hold_back", "expected"), [(0, 6), (4, 2), (8, 0)])
def test_released_tokens_by_hand(hold_back: int, expected: int) -> None:
    # What is to be stopped begins at 10; the alarm rings at 16, when tokens up to 15 - hold_back are out.
    assert released(16, 10, 100, hold_back) == expected
    assert released(None, 10, 100, hold_back) == 90


def test_intervals_of_clustered_data_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_figures, "RESAMPLES", 200)
    rng, covered = np.random.default_rng(0), 0
    for seed in range(200):
        centres = rng.normal(size=60)
        values = (centres[:, None] + 0.1 * rng.normal(size=(60, 5))).ravel()
        interval = share(Clustered(values, [str(i // 5) for i in range(300)]), seed)
        covered += interval.low <= 0 <= interval.high
    assert 0.90 <= covered / 200 <= 0.98


def test_figure_has_the_value_of_all_exchanges() -> None:
    positive, negative = (Clustered(np.array(values), ["a", "b", "c"]) for values in ([1.0, 2.0, 3.0], [0.0, 0.5, 2.5]))
    measured = figure(guard_figures.auroc, positive, negative)
    assert measured.value == pytest.approx(7 / 9)
    assert measured.low <= measured.value <= measured.high
