"""Statistics of guards equal those of gates in the graph, whatever the chunks."""

import math
from collections.abc import Iterator
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rudder.sae_models.edit import sequence_condition
from rudder.sae_models.operations import ENTRY, IDENTITY_ENTRY, TOKEN
from rudder.sae_models.statistics import GUARD_STATISTICS, Floats, Statistic, exceeds

RING = 8
OPERANDS: dict[str, tuple[float, ...]] = {
    "share": (0.2,), "moving_average": (0.12,), "window": (5,), "cusum": (0.3,), "agreement": (0.2, 6), "none": ()
}  # fmt: skip
NAMES = st.sampled_from(sorted(OPERANDS))
thorough = settings(max_examples=60, deadline=None, derandomize=True)


def scores_of(rng: Random, tokens: int) -> Floats:
    """Scores as a bank computes them, in float32."""
    return np.array([rng.gauss(0, 2) for _ in range(tokens)], np.float32).astype(np.float64)


def chunks(rng: Random, scores: Floats) -> Iterator[Floats]:
    """Cut scores into chunks of random length, some of them empty."""
    start = 0
    while start < len(scores):
        stop = start + rng.randint(0, 6)
        yield scores[start:stop]
        start = stop


def in_graph(name: str, scores: Floats) -> Floats:
    """The statistic of the graph over one request's tokens, in one step."""
    parameters = GUARD_STATISTICS[name](*OPERANDS[name])
    table = dict(zip(ENTRY, IDENTITY_ENTRY, strict=True)) | {"sequence": 1.0, "gain": 1.0} | parameters
    table["binarise"] = float("binary" in parameters)
    entry = torch.tensor([table[column] for column in ENTRY], dtype=torch.float64).repeat(len(scores), 1)
    token = torch.zeros(len(TOKEN), len(scores), dtype=torch.long)
    token[TOKEN.index("entry")], token[TOKEN.index("count")] = 1, torch.arange(len(scores)) + 1
    empty = torch.zeros(1).double(), torch.zeros(1, dtype=torch.long), torch.zeros(1, RING).double()
    f = torch.from_numpy(scores)[:, None].float()
    statistic = sequence_condition(f, entry, token, *empty, steps=len(scores).bit_length())[1].numpy()
    return statistic / np.arange(1, len(scores) + 1) if name == "share" else statistic


def test_every_statistic_is_tested() -> None:
    assert set(OPERANDS) == set(GUARD_STATISTICS)


@thorough
@given(st.integers(0, 2**32 - 1), NAMES)
def test_streamed_equals_in_graph(seed: int, name: str) -> None:
    rng = Random(seed)
    scores, statistic = scores_of(rng, rng.randint(1, 70)), Statistic(name, *OPERANDS[name])
    streamed = np.concatenate([statistic.update(chunk) for chunk in chunks(rng, scores)])
    assert streamed == pytest.approx(in_graph(name, scores), rel=1e-12, abs=1e-12)


@thorough
@given(st.integers(0, 2**32 - 1), NAMES)
def test_chunks_change_nothing(seed: int, name: str) -> None:
    rng = Random(seed)
    scores, statistic = scores_of(rng, 60), Statistic(name, *OPERANDS[name])
    streamed = np.concatenate([statistic.update(chunk) for chunk in chunks(rng, scores)])
    assert np.array_equal(streamed, Statistic(name, *OPERANDS[name]).update(scores))


@thorough
@given(st.integers(0, 2**32 - 1), NAMES)
def test_a_copy_goes_on_by_itself(seed: int, name: str) -> None:
    rng = Random(seed)
    scores, drafts = scores_of(rng, 40), scores_of(rng, 9)
    whole = Statistic(name, *OPERANDS[name]).update(scores)
    statistic = Statistic(name, *OPERANDS[name])
    statistic.update(scores[:13])
    before = statistic.copy()
    statistic.update(drafts)
    assert np.array_equal(before.copy().update(scores[13:]), whole[13:])
    assert np.array_equal(before.update(scores[13:]), whole[13:])


BY_HAND: dict[str, tuple[tuple[float, ...], list[float]]] = {
    "share": ((0.5,), [1, 1 / 2, 2 / 3, 2 / 4]),
    "moving_average": ((0.5,), [0.5, 0.25, 1.125, 0.0625]),
    "window": ((2,), [1, 0.5, 1, 0.5]),
    "cusum": ((0.5,), [0.5, 0, 1.5, 0]),
    "agreement": ((0.5, 2), [1, 0.5, 0.5, 0.5]),
    "none": ((), [1, 0, 2, -1]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name: str) -> None:
    operands, expected = BY_HAND[name]
    assert Statistic(name, *operands).update(np.array([1.0, 0.0, 2.0, -1.0])).tolist() == expected


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", OPERANDS)
def test_a_score_that_is_not_finite_exceeds_every_level(name: str, bad: float) -> None:
    statistic = Statistic(name, *OPERANDS[name])
    statistic.update(np.zeros(3))
    assert exceeds(statistic.update(np.array([bad])), 1e9).all()


def test_exceeds_is_strict() -> None:
    assert exceeds(np.array([0.9, 1.0, 1.1]), 1.0).tolist() == [False, False, True]
