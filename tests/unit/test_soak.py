"""The soak's judgement: a leak has a slope, noise has none, and what is held or told wrongly is a problem."""

from collections import Counter
from random import Random

import pytest

from tests.soak.slopes import slope_of
from tests.soak.soak import Result, Sample, judged
from tests.soak.traffic import KINDS, SHARES, STATUSES, unexpected


def series(slope: float, noise: float, spike: float = 0.0) -> list[tuple[float, float]]:
    random = Random(1)
    return [(t / 60, 500 + slope * t / 60 + random.gauss(0, noise) + spike * (t % 30 == 0)) for t in range(120)]


def test_slope_is_found_in_noise_and_is_not_moved_by_spikes() -> None:
    for points in (series(5, 2), series(5, 2, spike=300)):
        slope = slope_of(points)
        assert slope.low < 5 < slope.high
        assert slope.low > 1
    flat = slope_of(series(0, 2, spike=300))
    assert flat.low < 0 < flat.high
    with pytest.raises(ValueError, match="2 points"):
        slope_of([(0, 1), (1, 2)])


def result(seen: dict[tuple[str, str], int], slope: float = 0.0, held: float = 0, files: float = 10) -> Result:
    samples = [Sample(60 * t, mib, 100.0) for t, mib in series(slope, 0.1)]
    before = {"tasks": 5.0, "threads": 5.0, "open_files": 10.0}
    return judged(120, 4, Counter(seen), samples, {"leases": held}, before, before | {"open_files": files})


def test_problems_are_named() -> None:
    fine = {("good", "OK"): 5, ("late", "DEADLINE_EXCEEDED"): 2, ("good", "QUEUE_FULL"): 1}
    assert result(fine).problems == []
    assert "server grew by 4.9" in result(fine, slope=5).problems[0]
    assert len(result(fine, slope=5).problems) == 1
    assert result(fine, held=2).problems == ["leases: 2 held"]
    assert result(fine, files=40).problems == ["open_files: 40, 10 before"]
    assert result({("good", "INTERNAL"): 3}).problems == ["good INTERNAL: 3 times"]
    assert unexpected(Counter(fine)) == {}


def test_every_kind_of_client_has_a_share_and_its_statuses() -> None:
    assert KINDS.keys() == SHARES.keys() == STATUSES.keys()
