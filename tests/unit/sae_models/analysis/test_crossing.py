"""First crossing: a larger budget never lowers the result, branches behind the first crossing are out of reach."""

from collections.abc import Callable
from math import exp

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rudder.sae_models.analysis.crossing import GRID, Budgets, first_crossing
from rudder.sae_models.concepts import Point

UNSTEERED = Point(0.0, perplexity=40.0, repetition=0.1, distinct=0.8, kl=0.0, response=0.0)


def at(dose: float, ratio: float = 1.0, repetition: float = 0.1, distinct: float = 0.8) -> Point:
    return Point(dose, 40.0 * ratio, repetition, distinct, 0.0, 0.0)


def crossing(ratio: Callable[[float], float], budgets: Budgets) -> float:
    return first_crossing(lambda dose: at(dose, ratio(dose)), lambda point: budgets.broken(point, UNSTEERED)).s_max


@given(
    costs=st.lists(st.floats(0.5, 4.0), min_size=1, max_size=40),
    budget=st.floats(1.0, 3.0),
    more=st.floats(0.0, 2.0),
)
def test_a_larger_budget_never_lowers_the_result(costs: list[float], budget: float, more: float) -> None:
    def cost(dose: float) -> float:
        return costs[int(dose * 1e4) % len(costs)]

    assert crossing(cost, Budgets(budget)) <= crossing(cost, Budgets(budget + more))


def bisection(cost: Callable[[float], float], budget: float, low: float, high: float) -> float:
    """Plain bisection for the largest dose within a budget."""
    for _ in range(20):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low


def test_a_branch_behind_the_first_crossing_is_not_taken() -> None:
    """Between doses 0.3 and 0.42 texts break down; beyond, they are fluent again until 3: they repeat themselves."""

    def cost(dose: float) -> float:
        return 3.0 if 0.3 < dose < 0.42 or dose > 3 else 1.0

    assert bisection(cost, 1.5, GRID[0], GRID[-1]) == pytest.approx(3, rel=0.01)
    assert 0.2 < crossing(cost, Budgets()) <= 0.3


def test_the_result_is_within_the_budget_and_near_the_crossing() -> None:
    result = first_crossing(lambda d: at(d, exp(d)), lambda point: Budgets().broken(point, UNSTEERED))
    # exp(d) is 1.5 at 0.405; a cell, halved twice, is 10 % wide.
    assert 0.405 / 1.11 < result.s_max <= 0.405466
    assert result.limit == "perplexity"
    assert [point.dose for point in result.points] == sorted(point.dose for point in result.points)
    assert result.s_max in [point.dose for point in result.points]


def test_only_doses_up_to_the_first_crossing_are_measured() -> None:
    measured = list[float]()

    def measure(dose: float) -> Point:
        measured.append(dose)
        return at(dose, 1.0 if dose < 0.2 else 9.0)

    first_crossing(measure, lambda point: Budgets().broken(point, UNSTEERED))
    assert max(measured) == next(dose for dose in GRID if dose >= 0.2)


def test_texts_that_repeat_themselves_are_rejected_though_they_are_likely() -> None:
    repeated = at(0.1, ratio=0.1, repetition=0.9, distinct=0.8)
    assert Budgets().broken(repeated, UNSTEERED) == "repetition"
    few_words = at(0.1, ratio=0.1, distinct=0.5)
    assert Budgets().broken(few_words, UNSTEERED) == "distinct"
    assert not Budgets().broken(at(0.1), UNSTEERED)


def test_figures_that_are_no_numbers_break_their_budget() -> None:
    assert Budgets().broken(at(0.1, ratio=float("nan")), UNSTEERED) == "perplexity"


def test_without_a_dose_within_the_budgets_the_result_is_0() -> None:
    result = first_crossing(lambda d: at(d, 9.0), lambda point: Budgets().broken(point, UNSTEERED))
    assert (result.s_max, result.limit, len(result.points)) == (0.0, "perplexity", 1)


def test_a_grid_within_the_budgets_ends_at_its_largest_dose() -> None:
    result = first_crossing(at, lambda point: Budgets().broken(point, UNSTEERED))
    assert (result.s_max, result.limit, len(result.points)) == (GRID[-1], "", len(GRID))


def test_the_grid_has_twelve_steps_of_equal_ratio() -> None:
    assert (len(GRID), GRID[0], GRID[-1]) == (12, pytest.approx(0.05), pytest.approx(4.0))
