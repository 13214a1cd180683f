"""Excluded positions of a call: the union of what all bundles exclude, by position and by token of the prompt."""

from hypothesis import given
from hypothesis import strategies as st

from rudder.sae_models.bundle.manifest import Context
from rudder.server.program.exclusion import Exclusion, exclusion_of

numbers = st.lists(st.integers(0, 12), unique=True).map(lambda values: tuple(sorted(values)))


def test_the_rule_is_the_union_over_all_bundles() -> None:
    contexts = (Context(), Context(32, True, (0, 4)), Context(64, None, (2, 4), (9,)), Context(excluded_tokens=(7,)))
    assert exclusion_of(contexts) == Exclusion((0, 2, 4), frozenset((7, 9)))
    assert exclusion_of([]) == exclusion_of([Context()]) == Exclusion()


@given(numbers, numbers, st.lists(st.integers(0, 12), min_size=1, max_size=12), st.integers(0, 8))
def test_positions_are_those_of_the_definition(
    positions: tuple[int, ...], tokens: tuple[int, ...], prompt: list[int], generated: int
) -> None:
    end = len(prompt) + generated
    expected = [p for p in range(end) if p in positions or (p < len(prompt) and prompt[p] in tokens)]
    assert Exclusion(positions, frozenset(tokens)).of(tuple(prompt), end) == tuple(expected)
