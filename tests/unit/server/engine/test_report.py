"""Views of a call's telemetry: what the client and the guards get of the columns that the worker reports."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rudder.server.engine.adapter import SamplingParams
from rudder.server.engine.call import MAX_HIDDEN, Call
from rudder.server.engine.report import NO_FEATURES, views_of
from rudder.server.engine.telemetry.hub import Features
from rudder.server.program import wire
from rudder.server.program.watch import Watched, merge_watched

PROMPT = 6
flags = st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=4)


def watched(rows: list[tuple[int, bool]]) -> tuple[Watched, ...]:
    """Watch these latents, with or without prompt tokens."""
    return tuple(Watched(latent % 2, wire.Row("toy", latent), prompt) for latent, prompt in rows)


def activation(latent: int, position: int) -> float:
    """Return a value that identifies a latent and a position."""
    return 100.0 * (latent + 1) + position


def reported(call: Call, begin: int, end: int) -> tuple[Features, tuple[int, ...]]:
    """Return what the worker reports of tokens begin <= p < end, and the columns of the call's rows."""
    sites, columns = merge_watched((), (*call.watch, *call.guard))
    latents = [site.rows[row].latent for site in sites for row in site.watch]
    begin = begin if call.reads_prompt else max(begin, PROMPT)
    active = [[activation(latent, position) for latent in latents] for position in range(begin, end)]
    top = np.ones((max(0, end - begin), len(call.top_k_sites), call.top_k), np.float32)
    return Features(begin, np.array(active, "<f4").reshape(len(top), len(latents)), top, top), columns


@settings(max_examples=300, deadline=None, derandomize=True)
@given(flags, flags, st.booleans(), st.booleans(), st.integers(0, 9), st.integers(1, 9))
def test_each_reader_gets_its_rows_at_the_positions_that_it_wants(
    client: list[tuple[int, bool]], guard: list[tuple[int, bool]], top: bool, top_prompt: bool, begin: int, tokens: int
) -> None:
    call = Call(
        (0,) * PROMPT, SamplingParams(), watch=watched(client), guard=watched(guard),
        top_k=2 * top, top_k_sites=("site",) * top, top_k_prompt=top_prompt,
    )  # fmt: skip
    end = begin + tokens
    features, columns = reported(call, begin, end)
    for view, rows, has_top in zip(views_of(call, columns), (client, guard), (top, False), strict=True):
        part = view.select(features)
        if not rows and not has_top:
            assert part is NO_FEATURES
            continue
        wants_prompt = any(prompt for _, prompt in rows) or (has_top and top_prompt)
        positions = range(begin if wants_prompt else max(begin, PROMPT), end)
        assert list(range(part.first, part.end)) == list(positions)
        expected = [
            [activation(latent, p) if prompt or p >= PROMPT else 0.0 for latent, prompt in rows] for p in positions
        ]
        np.testing.assert_array_equal(part.activations, np.array(expected, "<f4").reshape(len(positions), len(rows)))
        assert part.top_values.shape == (len(positions), int(has_top), 2 * top)
        shown = [bool(values.any()) for values in part.top_values]
        assert shown == [has_top and (top_prompt or p >= PROMPT) for p in positions]


def test_selecting_does_not_change_the_telemetry() -> None:
    call = Call((0,) * PROMPT, SamplingParams(), watch=watched([(0, False), (1, True)]))
    features, columns = reported(call, 0, 8)
    before = features.activations.copy()
    client, _ = views_of(call, columns)
    assert not client.select(features).activations[:PROMPT, 0].any()
    np.testing.assert_array_equal(features.activations, before)


@pytest.mark.parametrize("guard", [[], [(2, True)]])
def test_columns_in_order_are_not_copied(guard: list[tuple[int, bool]]) -> None:
    call = Call((0,) * PROMPT, SamplingParams(), watch=watched([(0, True), (2, True)]), guard=watched(guard))
    features, columns = reported(call, 0, 8)
    assert views_of(call, columns)[0].select(features).activations is features.activations


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.integers(1, 4),
    st.sets(st.integers(0, 9), max_size=4),
    st.sets(st.integers(0, 9), max_size=4),
    st.integers(0, 99),
)
def test_hidden_latents_are_left_out_and_others_take_their_places(
    k: int, first: set[int], second: set[int], seed: int
) -> None:
    hidden = (tuple(sorted(first)), tuple(sorted(second)))
    call = Call((0,) * PROMPT, SamplingParams(), top_k=k, top_k_sites=("a", "b"), top_k_prompt=True, hidden=hidden)
    assert call.ranked == k + max(len(first), len(second))
    rng = np.random.default_rng(seed)
    latents = np.stack([[rng.permutation(10) for _ in hidden] for _ in range(5)]).astype(np.int32)[:, :, : call.ranked]
    values = -np.sort(-rng.random(latents.shape, np.float32), axis=2)
    features = Features(0, np.zeros((5, 0), np.float32), latents, values)
    client, _ = views_of(call, ())
    part = client.select(features)
    assert part.top_latents.shape == part.top_values.shape == (5, 2, k)
    for token in range(5):
        for site, left_out in enumerate(hidden):
            ranked = [
                (i, v) for i, v in zip(latents[token, site], values[token, site], strict=True) if i not in left_out
            ]
            assert list(zip(part.top_latents[token, site], part.top_values[token, site], strict=True)) == ranked[:k]


@pytest.mark.parametrize("hidden", [3, 300, 40_000])
def test_latents_that_a_policy_hides_widen_the_ranking_by_a_bound(hidden: int) -> None:
    call = Call((0,), SamplingParams(), top_k=2, top_k_sites=("a",), hidden=(tuple(range(hidden)),))
    assert call.ranked == 2 + min(hidden, MAX_HIDDEN) <= 2 + 256


def test_latents_hidden_beyond_the_bound_leave_fewer_and_are_never_shown() -> None:
    hidden = tuple(range(MAX_HIDDEN + 100))
    call = Call((0,), SamplingParams(), top_k=2, top_k_sites=("a",), top_k_prompt=True, hidden=(hidden,))
    latents = np.arange(call.ranked, dtype=np.int32).reshape(1, 1, -1)
    features = Features(0, np.zeros((1, 0), np.float32), latents, np.ones(latents.shape, np.float32))
    assert not views_of(call, ())[0].select(features).top_values.any()
