"""Figures of arms from the scores of exchanges that are written by hand: no model runs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rudder.sae_models.analysis import guard_evaluation as evaluation
from rudder.sae_models.analysis import guard_figures
from rudder.sae_models.analysis.exchanges import Exchange, excerpt_of, padded
from rudder.sae_models.analysis.guard import Score
from rudder.sae_models.analysis.guard_evaluation import BOTH, RESIDUAL, TOKENS, Fitted, Measured, Scored
from rudder.sae_models.analysis.guard_training import by_class
from rudder.sae_models.analysis.text_model import fit_text
from rudder.sae_models.statistics import Floats
from rudder.sae_models.token_model import TokenModel

BENIGN, HAZARD = np.full(40, -2.0), np.concatenate([np.full(10, -2.0), np.full(30, 8.0)])
QUIET = np.full(40, -2.0)


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_figures, "RESAMPLES", 50)


def exchange(number: int, label: float, ids: Sequence[int] = (1, 2, 3)) -> Exchange:
    return Exchange(tuple(ids), label, "book", f"book/{number}", "report")


def scored(hazards: Sequence[Floats], benign: Sequence[Floats]) -> Scored:
    labelled = [*((each, 1.0) for each in hazards), *((each, 0.0) for each in benign)]
    members = [exchange(i, label) for i, (_, label) in enumerate(labelled)]
    each = [scores for scores, _ in labelled]
    return Scored(members, {RESIDUAL: each, TOKENS: [-s for s in each]}, [[1]] * len(each))


@pytest.fixture
def measured() -> Measured:
    """120 benign exchanges to calibrate on, a report of ten hazards, and one padding in which half are missed."""
    text = fit_text(["one two", "one two"], torch.tensor([0.0, 1.0]), torch.ones(2))
    fitted: Any = Fitted({}, text, 0, (), Score(), TokenModel(np.zeros(1024, np.float32), 0.0, 1, ""))
    rng = np.random.default_rng(0)
    benign = [BENIGN + rng.normal(size=40) for _ in range(120)]
    report = scored([HAZARD] * 10, benign[:30])
    padding = {"0": scored([HAZARD] * 10, [BENIGN] * 10), "400": scored([HAZARD] * 5 + [QUIET] * 5, [BENIGN] * 10)}
    return Measured(None, fitted, scored([], benign), report, padding)  # type: ignore[arg-type]


def test_an_arm_that_tells_hazards(measured: Measured) -> None:
    found = evaluation.report_arm(measured, RESIDUAL, (5, 40))
    assert found["auroc"]["value"] == found["recall"]["value"] == found["noticed"]["value"] == 1
    assert found["calibrated_on"] == 120
    # The hazard begins at token 10.
    assert found["length"]["5"]["noticed"]["value"] == 0
    assert found["length"]["40"]["noticed"]["value"] == 1


def test_padding_compares_with_the_same_exchanges_without(measured: Measured) -> None:
    found = evaluation.report_arm(measured, RESIDUAL)["padding"]
    assert found["0"]["of_unpadded"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert found["400"]["of_unpadded"]["value"] == found["400"]["noticed"]["value"] == 0.5
    assert 0.1 < found["400"]["of_unpadded"]["low"] < 0.5 < found["400"]["of_unpadded"]["high"] < 0.9
    assert found["400"]["false_alarms"]["value"] == 0


def test_released_tokens_shrink_with_the_hold_back(measured: Measured) -> None:
    level = evaluation.report_arm(measured, RESIDUAL)["level"]
    found = evaluation.releases(measured, RESIDUAL, level, "0", 10)
    statistic = [0.0]
    for score in HAZARD:
        statistic.append(0.88 * statistic[-1] + 0.12 * score)
    first = next(i for i, value in enumerate(statistic[1:]) if value > level)
    means = [found[str(hold_back)]["mean"]["value"] for hold_back in (0, 4, 8, 16)]
    assert means == [max(0, first - 10 - hold_back) for hold_back in (0, 4, 8, 16)]
    assert means[0] > means[1]
    missed = evaluation.releases(measured, RESIDUAL, level, "400", 10)
    assert missed["16"]["mean"]["value"] == 15
    assert missed["16"]["none"]["value"] == 0.5


def test_difference_of_arms(measured: Measured) -> None:
    values = guard_figures.highest(measured.report.scores[TOKENS], evaluation.STATISTIC)
    hazard, benign = (side.values for side in by_class(measured.report.exchanges, values))
    difference = evaluation.difference(measured, RESIDUAL, TOKENS)
    assert difference.value == pytest.approx(1 - guard_figures.auroc(hazard, benign))
    assert 0 < difference.low <= difference.value <= difference.high


def test_a_cascade_judges_what_its_first_stage_passes_on(measured: Measured) -> None:
    """The second stage would stop everything; the first passes on the hazards and a tenth of the benign exchanges."""
    for each in (measured.benign, measured.report):
        each.scores[BOTH] = each.scores[RESIDUAL]  # type: ignore[index]
    found = evaluation.cascade(measured)
    assert found["noticed"]["value"] == 1
    assert found["escalated"]["value"] == pytest.approx(0.1, abs=0.1)
    assert found["false_alarms"]["value"] <= found["escalated"]["value"]
    measured.report.scores[BOTH] = [np.full(40, 100.0)] * 40  # type: ignore[index]
    found = evaluation.cascade(measured)
    assert found["false_alarms"] == found["escalated"]


def test_either_guard_is_enough_to_stop(measured: Measured) -> None:
    found = evaluation.either(measured)
    alone = [evaluation.report_arm(measured, arm) for arm in (RESIDUAL, TOKENS)]
    for each in alone:
        assert found["noticed"]["value"] >= each["noticed"]["value"]
        assert found["padding"]["400"]["noticed"]["value"] >= each["padding"]["400"]["noticed"]["value"]
    assert found["false_alarms"]["value"] <= sum(each["false_alarms"]["value"] for each in alone)
    blind = [np.full(len(scores), -100.0) for scores in measured.padded["400"].scores[RESIDUAL]]
    measured.padded["400"].scores[RESIDUAL] = blind  # type: ignore[index]
    unseen = evaluation.either(measured)["padding"]["400"]["noticed"]
    assert unseen["value"] == alone[1]["padding"]["400"]["noticed"]["value"]


def test_padding_keeps_bos_in_front_and_the_excerpt_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rudder.sae_models.analysis.exchanges.leading_token", lambda _: 0)
    whole = exchange(0, 1.0, (0, 11, 12, 13, 14))
    other = exchange(1, 0.0, (0, 21, 22, 23, 24))
    excerpt = excerpt_of(whole, 3)
    # Never with the text of its own section.
    assert {each.ids for each in padded([excerpt] * 9, [whole, other], 2, 1, None)} == {(0, 21, 22, 11, 12, 23)}
    assert padded([excerpt], [other], 0, 0, None)[0].ids == excerpt.ids
