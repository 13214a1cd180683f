"""Callers take turns by tokens: none runs more than a quantum and its longest request beyond another."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from rudder.server.engine.turns import QUANTUM, Turns

QUEUES = st.lists(st.lists(st.integers(1, 5000), min_size=1, max_size=60), min_size=2, max_size=5)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(QUEUES)
def test_callers_that_always_wait_run_as_many_tokens_as_each_other(lists: list[list[int]]) -> None:
    queues = {str(i): list(costs) for i, costs in enumerate(lists)}
    longest = max(map(max, lists))
    turns, ran = Turns(), Counter[str]()
    for caller in queues:
        turns.join(caller)
    while all(queues.values()):
        costs = {caller: float(costs[0]) for caller, costs in queues.items()}
        caller = turns.next(costs)
        ran[caller] += queues[caller].pop(0)
        assert max(ran[c] for c in queues) - min(ran[c] for c in queues) <= 2 * (QUANTUM + longest)


def test_who_has_nothing_to_run_saves_nothing() -> None:
    turns = Turns()
    turns.join("a")
    turns.join("b")
    for _ in range(50):
        assert turns.next({"a": QUANTUM}) == "a"
    assert turns.deficits["b"] == 0
    order = [turns.next({"a": QUANTUM, "b": QUANTUM}) for _ in range(6)]
    assert order.count("a") == order.count("b") == 3


def test_a_caller_that_left_joins_at_the_end_without_what_it_saved() -> None:
    turns = Turns()
    turns.join("a")
    turns.join("b")
    turns.next({"a": 1, "b": 1})
    turns.leave("a")
    turns.join("a")
    assert list(turns.deficits) == ["b", "a"]
    assert turns.deficits["a"] == 0


def test_a_very_long_request_takes_no_loop_over_its_rounds() -> None:
    turns = Turns()
    turns.join("a")
    assert turns.next({"a": 1e15}) == "a"
