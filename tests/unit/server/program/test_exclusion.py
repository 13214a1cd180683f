"""Excluded positions of a call, by position and by token of the prompt."""

from hypothesis import given
from hypothesis import strategies as st

from rudder.server.program.exclusion import Exclusion

numbers = st.lists(st.integers(0, 12), unique=True).map(lambda values: tuple(sorted(values)))


@given(numbers, numbers, st.lists(st.integers(0, 12), min_size=1, max_size=12), st.integers(0, 8))
def test_positions_are_those_of_the_definition(
    positions: tuple[int, ...], tokens: tuple[int, ...], prompt: list[int], generated: int
) -> None:
    end = len(prompt) + generated
    expected = [p for p in range(end) if p in positions or (p < len(prompt) and prompt[p] in tokens)]
    assert Exclusion(positions, frozenset(tokens)).of(tuple(prompt), end) == tuple(expected)
