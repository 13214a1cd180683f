"""From the engine's arrays to columns: active entries only, names once, each feature once per token."""

from dataclasses import dataclass

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rudder.server.engine.telemetry.hub import Features
from rudder.server.service.columns import Entries, Names, Pool, columns, entries_of, logprobs
from rudder.v1 import inference_pb2

SITES = ("layers.1.resid_post", "layers.3.resid_post")


def info(site: str, latent: int) -> inference_pb2.FeatureInfo:
    return inference_pb2.FeatureInfo(site=site, bundle=f"sae-{site}", index=latent, label=f"latent {latent}")


def features_of(start: int, active: list[list[float]], latents: object, values: object) -> Features:
    return Features(
        start, np.array(active, np.float32).reshape(len(active), -1),
        np.array(latents, np.int32), np.array(values, np.float32),
    )  # fmt: skip


def as_rows(entries: Entries) -> list[tuple[int, int, float]]:
    return list(zip(entries.positions.tolist(), entries.places.tolist(), entries.values.tolist(), strict=True))


def test_watched_rows_keep_their_place_and_zeros_are_left_out() -> None:
    names = Names([info(SITES[0], 7), info(SITES[0], 9)], (), info)
    entries = entries_of(features_of(4, [[0, 2], [0, 0], [-1, 3]], np.zeros((3, 0, 0)), np.zeros((3, 0, 0))), names)
    assert as_rows(entries) == [(4, 1, 2.0), (6, 0, -1.0), (6, 1, 3.0)]
    assert [i.index for i in names.take()] == [7, 9]
    assert names.take() == []


def test_strongest_latents_are_named_when_they_first_come() -> None:
    names = Names([info(SITES[1], 5)], SITES, info)
    names.take()
    first = features_of(0, [[8.0]], [[[3, 4], [5, 3]]], [[[2, 0], [8, 1]]])
    # Latent 5 of the second site is watched: it has one entry. Latent 4 is not active.
    assert as_rows(entries_of(first, names)) == [(0, 0, 8.0), (0, 1, 2.0), (0, 2, 1.0)]
    assert [(i.site, i.index) for i in names.take()] == [(SITES[0], 3), (SITES[1], 3)]
    second = features_of(1, [[0.0]], [[[3, 6], [3, 5]]], [[[9, 7], [6, 0]]])
    assert as_rows(entries_of(second, names)) == [(1, 1, 9.0), (1, 3, 7.0), (1, 2, 6.0)]
    assert [(i.site, i.index) for i in names.take()] == [(SITES[0], 6)]


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(0, 4), st.integers(0, 3))
def test_columns_say_what_the_arrays_say(seed: int, tokens: int, watched: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    active = rng.normal(size=(tokens, watched)) * (rng.random((tokens, watched)) < 0.5)
    latents = np.stack([[rng.permutation(9)[:k] for _ in SITES] for _ in range(tokens)])
    values = rng.random((tokens, 2, k)) * (rng.random((tokens, 2, k)) < 0.7)
    names = Names([info(SITES[0], 20 + i) for i in range(watched)], SITES, info)
    entries = entries_of(features_of(3, active.tolist(), latents, values), names)
    named = names.take()
    assert len(named) == names.count
    seen = {(p, named[i].site, named[i].index): v for p, i, v in as_rows(entries)}
    expected = {(3 + t, SITES[0], 20 + w): active[t, w] for t, w in zip(*np.nonzero(active), strict=True)}
    for t, s, r in zip(*np.nonzero(values), strict=True):
        expected[3 + t, SITES[s], int(latents[t, s, r])] = values[t, s, r]
    assert seen.keys() == expected.keys()
    assert len(seen) == len(entries.positions)
    for key, value in expected.items():
        assert np.isclose(seen[key], value)
    assert entries.positions.tolist() == sorted(entries.positions.tolist())
    told = columns(entries)
    assert len(told.positions) == len(told.features) == len(told.activations) == len(seen)


def test_pool_adds_up_over_outputs() -> None:
    pool = Pool()
    pool.add(Entries(np.array([0, 1]), np.array([1, 1]), np.array([2.0, 5.0], np.float32)), 2)
    pool.add(Entries(np.array([2, 2]), np.array([3, 1]), np.array([-1.0, 1.0], np.float32)), 3)
    told = {f.feature: (f.sum, f.max, f.active_tokens, f.tokens) for f in pool.features(always=1)}
    assert told == {0: (0, 0, 0, 5), 1: (8, 5, 3, 5), 3: (-1, -1, 1, 5)}


def test_a_pool_of_nothing_tells_the_watched() -> None:
    pool = Pool()
    assert [(f.feature, f.sum, f.tokens) for f in pool.features(always=2)] == [(0, 0, 0), (1, 0, 0)]


@dataclass
class Logprob:
    logprob: float


def test_logprobs_are_the_chosen_and_then_the_best() -> None:
    rows = [{4: Logprob(-3.0), 1: Logprob(-0.5), 2: Logprob(-1.5)}, {1: Logprob(-0.25), 9: Logprob(-2.0)}]
    told = logprobs(rows, 2)  # type: ignore[arg-type]
    assert told is not None
    assert list(told.chosen) == [-3.0, -0.25]
    assert list(told.alternative_ids) == [1, 2, 1, 9]
    assert list(told.alternatives) == [-0.5, -1.5, -0.25, -2.0]
    assert logprobs(None, 2) is None
