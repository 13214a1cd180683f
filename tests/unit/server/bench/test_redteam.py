"""What an attack counts as, and that every attack of the threat model is there or said to be missing."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from rudder.server.bench.redteam import run
from rudder.server.bench.redteam.attack import Attack, Result, carry_out
from rudder.server.bench.redteam.target import Refused

NOBODY: Any = None


def attack(with_guard: float | str, without: float | str, **fields: Any) -> Attack:
    """An attack that has this figure, or is refused for this reason, with its guard and without it."""

    async def attempt(_: Any, guarded: bool) -> float:
        found = with_guard if guarded else without
        if isinstance(found, str):
            raise Refused(found, "no")
        return found

    return Attack("A0", "attack", "L0", attempt, "figure", "the guard", 0.5, **fields)


async def result(with_guard: float | str, without: float | str, **fields: Any) -> Result:
    return await carry_out(attack(with_guard, without, **fields), NOBODY)


@pytest.mark.parametrize(
    ("with_guard", "without", "fields", "outcome", "control", "passed"),
    [
        (0.2, 0.5, {"holds": 0.2}, "holds", "succeeds", True),
        (0.3, 0.9, {"holds": 0.2}, "broken", "succeeds", False),
        (0.1, 0.4, {"holds": 0.2}, "holds", "fails", False),
        (0.1, "ROW_LOCKED", {"holds": 0.2}, "holds", "refused:ROW_LOCKED", False),
        (float("nan"), 1.0, {"holds": 0.2}, "broken", "succeeds", False),
        ("ROW_LOCKED", 1.0, {"holds": 0.2}, "refused:ROW_LOCKED", "succeeds", False),
        ("ROW_LOCKED", 1.0, {"refused": "ROW_LOCKED"}, "refused:ROW_LOCKED", "succeeds", True),
        ("INTERNAL", 1.0, {"refused": "ROW_LOCKED"}, "refused:INTERNAL", "succeeds", False),
        ("ROW_LOCKED", "ROW_LOCKED", {"refused": "ROW_LOCKED"}, "refused:ROW_LOCKED", "refused:ROW_LOCKED", False),
        (0.0, 1.0, {"refused": "ROW_LOCKED"}, "broken", "succeeds", False),
        (0.9, 1.0, {}, "reported", "succeeds", True),
    ],
)
async def test_outcome(
    with_guard: float | str, without: float | str, fields: Any, outcome: str, control: str, passed: bool
) -> None:
    found = await result(with_guard, without, **fields)
    assert (found.outcome, found.control_outcome, found.passed) == (outcome, control, passed)
    assert (found.document()["outcome"], found.document()["passed"]) == (outcome, passed)


async def test_report_counts_what_has_no_bound_apart_and_what_is_not_built_not_at_all() -> None:
    found = [await result(0.1, 1.0, holds=0.2), await result(0.9, 1.0, holds=0.2), await result(0.9, 1.0)]
    report = run.report({}, found)
    assert (report["held"], report["failed"], report["reported"]) == (1, 1, 1)
    assert report["not_built"] == run.NOT_BUILT


def test_every_attack_of_the_threat_model_is_built_or_named() -> None:
    named = {attack.id for attack in run.ATTACKS} | run.NOT_BUILT.keys()
    assert named == {f"A{number}" for number in range(1, 28)}


def test_attacks_have_names_of_their_own_and_one_kind_of_outcome() -> None:
    assert [key for key, count in Counter(attack.key for attack in run.ATTACKS).items() if count > 1] == []
    assert [attack.key for attack in run.ATTACKS if attack.refused and attack.holds is not None] == []
    # A control that succeeds at what the guarded attempt may reach would show nothing.
    assert [a.key for a in run.ATTACKS if a.holds is not None and a.wins <= a.holds] == []


def test_without_a_bound_it_is_reported() -> None:
    assert replace(attack(0, 1), holds=0.25).expected == "holds:figure <= 0.25"
    assert attack(0, 1, refused="ROW_LOCKED").expected == "refused:ROW_LOCKED"
    assert attack(0, 1).expected == "reported"
