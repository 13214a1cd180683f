"""From the engine's arrays to columns: zeros left out, each feature named once a stream and reported once a token."""

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rudder.server.engine.call import Output
from rudder.server.engine.telemetry.hub import Features, no_features
from rudder.server.service.columns import (
    MAX_SLICE_VALUES,
    Activations,
    FeatureTable,
    PoolingState,
    activations_of,
    feature_columns,
    logprobs,
    slices,
)
from rudder.server.service.deltas import Choice, delta_of
from rudder.v1 import inference_pb2

SITES = ("layers.1.resid_post", "layers.3.resid_post")


def info(site: str, latent: int) -> inference_pb2.FeatureInfo:
    return inference_pb2.FeatureInfo(site=site, bundle=f"sae-{site}", index=latent, label=f"latent {latent}")


def features_of(start: int, active: list[list[float]], latents: object, values: object) -> Features:
    return Features(
        start, np.array(active, np.float32).reshape(len(active), -1),
        np.array(latents, np.int32), np.array(values, np.float32),
    )  # fmt: skip


def as_tuples(activations: Activations) -> list[tuple[int, int, float]]:
    return list(zip(*(column.tolist() for column in activations), strict=True))


def test_watched_rows_keep_their_numbers_and_zeros_are_left_out() -> None:
    table = FeatureTable([info(SITES[0], 7), info(SITES[0], 9)], (), info)
    activations = activations_of(
        features_of(4, [[0, 2], [0, 0], [-1, 3]], np.zeros((3, 0, 0)), np.zeros((3, 0, 0))), table
    )
    assert as_tuples(activations) == [(4, 1, 2.0), (6, 0, -1.0), (6, 1, 3.0)]
    assert [i.index for i in table.take()] == [7, 9]
    assert table.take() == []


def test_top_k_latents_are_named_at_their_first_appearance() -> None:
    table = FeatureTable([info(SITES[1], 5)], SITES, info)
    table.take()
    first = features_of(0, [[8.0]], [[[3, 4], [5, 3]]], [[[2, 0], [8, 1]]])
    # Latent 5 of the second site is watched: it is reported once. Latent 4 is not active.
    assert as_tuples(activations_of(first, table)) == [(0, 0, 8.0), (0, 1, 2.0), (0, 2, 1.0)]
    assert [(i.site, i.index) for i in table.take()] == [(SITES[0], 3), (SITES[1], 3)]
    second = features_of(1, [[0.0]], [[[3, 6], [3, 5]]], [[[9, 7], [6, 0]]])
    assert as_tuples(activations_of(second, table)) == [(1, 1, 9.0), (1, 3, 7.0), (1, 2, 6.0)]
    assert [(i.site, i.index) for i in table.take()] == [(SITES[0], 6)]


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(0, 4), st.integers(0, 3))
def test_columns_equal_the_arrays(seed: int, tokens: int, watched: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    active = rng.normal(size=(tokens, watched)) * (rng.random((tokens, watched)) < 0.5)
    latents = np.stack([[rng.permutation(9)[:k] for _ in SITES] for _ in range(tokens)])
    values = rng.random((tokens, 2, k)) * (rng.random((tokens, 2, k)) < 0.7)
    table = FeatureTable([info(SITES[0], 20 + i) for i in range(watched)], SITES, info)
    activations = activations_of(features_of(3, active.tolist(), latents, values), table)
    named = table.take()
    assert len(named) == table.count
    seen = {(p, named[i].site, named[i].index): v for p, i, v in as_tuples(activations)}
    expected = {(3 + t, SITES[0], 20 + w): active[t, w] for t, w in zip(*np.nonzero(active), strict=True)}
    for t, s, r in zip(*np.nonzero(values), strict=True):
        expected[3 + t, SITES[s], int(latents[t, s, r])] = values[t, s, r]
    assert seen.keys() == expected.keys()
    assert len(seen) == len(activations.positions)
    for key, value in expected.items():
        assert np.isclose(seen[key], value)
    assert activations.positions.tolist() == sorted(activations.positions.tolist())
    message = feature_columns(activations)
    assert len(message.positions) == len(message.features) == len(message.activations) == len(seen)


def test_pooling_accumulates_over_outputs() -> None:
    pool = PoolingState()
    pool.add(Activations(np.array([0, 1]), np.array([1, 1]), np.array([2.0, 5.0], np.float32)), 2)
    pool.add(Activations(np.array([2, 2]), np.array([3, 1]), np.array([-1.0, 1.0], np.float32)), 3)
    pooled = {f.feature: (f.sum, f.max, f.active_tokens, f.tokens) for f in pool.features(always=1)}
    assert pooled == {0: (0, 0, 0, 5), 1: (8, 5, 3, 5), 3: (-1, -1, 1, 5)}


def test_pooling_without_activations_reports_the_watched_features() -> None:
    pool = PoolingState()
    assert [(f.feature, f.sum, f.tokens) for f in pool.features(always=2)] == [(0, 0, 0), (1, 0, 0)]


@dataclass
class Logprob:
    logprob: float


def test_logprobs_are_the_chosen_then_the_most_probable() -> None:
    tokens = [{4: Logprob(-3.0), 1: Logprob(-0.5), 2: Logprob(-1.5)}, {1: Logprob(-0.25), 9: Logprob(-2.0)}]
    message = logprobs(tokens, 2)
    assert message is not None
    assert list(message.chosen) == [-3.0, -0.25]
    assert list(message.alternative_ids) == [1, 2, 1, 9]
    assert list(message.alternatives) == [-0.5, -1.5, -0.25, -2.0]
    assert logprobs(None, 2) is None


def dense_features(tokens: int, watched: int, k: int) -> Features:
    rng = np.random.default_rng(0)
    latents = np.stack([[rng.permutation(5 * k + 1)[:k] for _ in SITES] for _ in range(tokens)])
    values = rng.random((tokens, len(SITES), k)) + 0.1
    return features_of(0, (rng.random((tokens, watched)) + 0.1).tolist(), latents, values)


@given(st.integers(0, 300), st.integers(0, 400), st.integers(0, 64))
def test_slices_are_bounded_and_together_the_whole(tokens: int, watched: int, k: int) -> None:
    top = np.zeros((tokens, 2, k), np.float32)
    features = Features(7, np.zeros((tokens, watched), np.float32), top, top)
    parts = list(slices(features))
    assert sum(len(part.activations) for part in parts) == tokens
    assert [part.first for part in parts] == [7, *(part.end for part in parts[:-1])]
    for part in parts:
        assert part.activations.size + part.top_values.size <= max(MAX_SLICE_VALUES, watched + 2 * k)


@pytest.mark.parametrize("pooled", [False, True])
async def test_features_of_a_long_prompt_let_other_streams_run_and_equal_those_in_one_piece(pooled: bool) -> None:
    features, turns = dense_features(500, 3, 64), 0
    nothing = no_features(0, 0, 0)
    table = FeatureTable([info(SITES[0], 1000 + i) for i in range(3)], SITES, info)
    job: Any = SimpleNamespace(features=table, report=inference_pb2.Report(pooled=pooled))
    call: Any = SimpleNamespace(sampling=SimpleNamespace(logprobs=None))
    record: Any = SimpleNamespace()
    choice = Choice(0, call, bos=True, record=record)
    output = Output("", [], 0, None, features, nothing, None)
    done = asyncio.Event()

    async def other_stream() -> None:
        nonlocal turns
        while not done.is_set():
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(other_stream())
    delta = await delta_of(job, choice, output)
    done.set()
    await other
    assert turns >= 500 * (3 + 2 * 64) // MAX_SLICE_VALUES
    numbered = table.take()
    whole_table = FeatureTable([info(SITES[0], 1000 + i) for i in range(3)], SITES, info)
    whole = activations_of(features, whole_table)
    whole_numbered = whole_table.take()

    def by_name(positions: Any, numbers: Any, values: Any, names: Any) -> dict[tuple[int, str, int], float]:
        rows = zip(positions, numbers, values, strict=True)
        return {(p, names[n].site, names[n].index): v for p, n, v in rows}

    columns = delta.activations
    sliced = by_name(columns.positions, columns.features, columns.activations, numbered)
    assert sliced == by_name(whole.positions.tolist(), whole.features.tolist(), whole.values.tolist(), whole_numbered)
    assert list(columns.positions) == sorted(columns.positions)
    if pooled:
        assert choice.pooling.tokens == 499
        assert choice.pooling.sums.sum() == pytest.approx(whole.values[whole.positions > 0].sum(), rel=1e-5)
