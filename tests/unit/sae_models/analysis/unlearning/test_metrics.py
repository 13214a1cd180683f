"""Figures of a study and its bars, on simulated answers and losses."""

from dataclasses import replace
from math import isnan, log

import pytest
import torch
from torch import Tensor

from rudder.sae_models.analysis.unlearning.bench import add_answers
from rudder.sae_models.analysis.unlearning.metrics import BARS, METRICS, Bar, Groups, by_book, figures
from rudder.sae_models.analysis.unlearning.statistics import Estimate, Resamples, Sums, resamples

BOOKS = ["micro"] * 60 + ["near"] * 60 + ["far"] * 60 + ["farther"] * 60
SECTIONS = torch.arange(len(BOOKS)).repeat_interleave(8)
GROUPS = Groups(["micro"], ["near"], ["far", "farther"])
ANSWERS = torch.randint(4, SECTIONS.shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def drawn() -> Resamples:
    return resamples(BOOKS, 500)


def scores(knowledge: float, books: list[str]) -> Tensor:
    """Return scores of options: the right one's are higher by `knowledge` where the section's book is in `books`."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(*SECTIONS.shape, 4, generator=generator)
    knows = torch.tensor([BOOKS[s] in books for s in SECTIONS.tolist()])
    return noise + knowledge * knows[:, None] * torch.nn.functional.one_hot(ANSWERS, 4)


def sums_of(scored: Tensor, nats: dict[str, float], hits: dict[str, float], answers: Tensor = ANSWERS) -> Sums:
    """Return what is measured of a model with these scores, losses a token and shares of hits in each book."""
    sums, section = Sums(len(BOOKS)), torch.arange(len(BOOKS))
    add_answers(sums, SECTIONS, scored, answers)
    tokens = 100 * torch.ones(len(BOOKS))
    loss, share = (torch.tensor([figure[book] for book in BOOKS]) for figure in (nats, hits))
    sums.add(section, tokens=tokens, nats=tokens * loss, hits=tokens * share, touched=0 * tokens)
    return sums


ALL, OTHERS = ["micro", "near", "far", "farther"], ["near", "far", "farther"]
KNOWN, EVEN = dict.fromkeys(ALL, 3.0), dict.fromkeys(ALL, 0.4)
PLAIN = sums_of(scores(1.5, ALL), KNOWN, EVEN)
TWIN = sums_of(scores(1.5, OTHERS), KNOWN | {"micro": 4.0}, EVEN | {"micro": 0.3})


def reached(drawn: Resamples, method: Sums) -> dict[str, bool]:
    result = figures(drawn, method, PLAIN, TWIN, GROUPS)
    return {bar.metric: bar.reached(result) for bar in BARS}


def test_a_policy_that_does_nothing_keeps_all_on_both_sides(drawn: Resamples) -> None:
    result = figures(drawn, PLAIN, PLAIN, TWIN, GROUPS)
    assert result["forget_retention"] == result["retain_retention"] == Estimate(1, 1, 1)
    assert result["alignment"].value == 0
    assert result["forget_loss_gap"].value == 0
    bars = reached(drawn, PLAIN)
    assert not bars["forget_cloze_against_twin"]
    assert not bars["forget_loss_gap"]
    assert bars["retain_top1_drop"]


def test_the_twin_itself_reaches_the_bars_of_knowledge(drawn: Resamples) -> None:
    bars = reached(drawn, TWIN)
    assert all(bars[name] for name in bars if name not in ("leak_at_8_against_twin", "fluency_ratio", "gibberish"))


def test_a_policy_that_blanks_everything_fails_retain(drawn: Resamples) -> None:
    blank = sums_of(scores(0, []), dict.fromkeys(KNOWN, 6.0), dict.fromkeys(EVEN, 0.1))
    bars = reached(drawn, blank)
    names = (
        "retain_top1_drop",
        "retain_top1_drop_worst",
        "neighbour_top1_drop",
        "neighbour_cloze_drop",
        "forget_loss_gap",
    )
    assert not any(bars[name] for name in names)


def test_a_policy_that_inverts_the_right_answers_fails_the_two_sided_target(drawn: Resamples) -> None:
    inverted = sums_of(-scores(1.5, ALL), KNOWN | {"micro": 4.0}, EVEN)
    result = figures(drawn, inverted, PLAIN, TWIN, GROUPS)
    assert result["forget_cloze"].high < result["forget_cloze"].value + 0.1 < 0.25
    assert not reached(drawn, inverted)["forget_cloze_against_twin"]


def test_shuffled_labels_give_chance(drawn: Resamples) -> None:
    order = torch.randperm(len(ANSWERS), generator=torch.Generator().manual_seed(2))
    shuffled = sums_of(scores(1.5, ALL), KNOWN, EVEN, ANSWERS[order])
    chance = figures(drawn, shuffled, PLAIN, TWIN, GROUPS)["forget_cloze"]
    assert chance.low < 0.25 < chance.high
    assert chance.high - chance.low < 0.1


def test_options_that_score_alike_are_right_by_chance(drawn: Resamples) -> None:
    even = sums_of(torch.zeros(*SECTIONS.shape, 4), KNOWN, EVEN)
    assert figures(drawn, even, PLAIN, TWIN, GROUPS)["forget_cloze"].value == pytest.approx(0.25, abs=0.06)


def test_worst_book_is_named_by_the_bar(drawn: Resamples) -> None:
    damaged = sums_of(scores(1.5, OTHERS), KNOWN, EVEN | {"far": 0.37})
    assert not reached(drawn, damaged)["retain_top1_drop_worst"]
    assert by_book(drawn, damaged, PLAIN)["far"]["top1_drop"].value == pytest.approx(0.03)
    assert by_book(drawn, damaged, PLAIN)["near"]["top1_drop"].value == pytest.approx(0)


def test_a_far_book_that_was_not_measured_does_not_count() -> None:
    used = torch.tensor([book != "farther" for book in BOOKS])
    result = figures(resamples(BOOKS, 50, used=used), PLAIN, PLAIN, TWIN, GROUPS)
    assert result["retain_top1_drop"] == Estimate(0, 0, 0)


def test_fluency_is_the_ratio_of_perplexities(drawn: Resamples) -> None:
    method, twin, section = Sums(len(BOOKS)), Sums(len(BOOKS)), torch.arange(60)
    for sums, nats in ((method, log(6)), (twin, log(4))):
        sums.add(section, continued=torch.ones(60), continued_nats=nats * torch.ones(60))
    assert figures(drawn, method, PLAIN, twin, GROUPS)["fluency_ratio"].value == pytest.approx(1.5)


def test_a_bar_is_on_the_bounds_not_on_the_figure() -> None:
    bar = Bar("gibberish", high=0.1)
    assert bar.reached({"gibberish": Estimate(0.05, 0.0, 0.1)})
    assert not bar.reached({"gibberish": Estimate(0.05, 0.0, 0.11)})
    assert not bar.reached({"gibberish": Estimate(float("nan"), float("nan"), float("nan"))})
    assert bar.excess(0.05, plain=0.0) == 0
    assert bar.excess(0.2, plain=0.0) == pytest.approx(1)
    assert bar.excess(0.2, plain=0.3) == 0
    assert bar.excess(0.6, plain=0.3) == pytest.approx(1)


def test_each_bar_is_of_a_metric() -> None:
    assert {bar.metric for bar in BARS} <= {*METRICS}


@pytest.mark.parametrize("group", ["neighbours", "far"])
def test_group_without_a_measured_book_has_no_figure(drawn: Resamples, group: str) -> None:
    """A corpus may have no neighbours, and a fold no text of them: that is no zero."""
    result = figures(drawn, PLAIN, PLAIN, TWIN, replace(GROUPS, **{group: ()}))
    name = {"neighbours": "neighbour_top1_drop", "far": "retain_top1_drop_worst"}[group]
    assert isnan(result[name].value)
    assert not next(bar for bar in BARS if bar.metric == name).reached(result)
    assert result["forget_loss_gap"].value == 0
