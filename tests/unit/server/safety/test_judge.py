"""A judge gives the same verdicts for every chunking of a choice's telemetry, and those of the offline evaluation."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rudder.sae_models.statistics import Statistic, exceeds
from rudder.sae_models.token_model import TokenModel
from rudder.server.engine.telemetry.frame import TelemetryLost
from rudder.server.engine.telemetry.hub import Features
from rudder.server.program import wire
from rudder.server.program.watch import Watched
from rudder.server.safety.guards import STOP, Guard
from rudder.server.safety.judge import Held, Judge

STATISTICS: list[tuple[str, *tuple[float, ...]]] = [
    ("none",), ("share", 0.2), ("moving_average", 0.3), ("window", 4), ("cusum", 0.1), ("agreement", 0.3, 5),
]  # fmt: skip


def guard(*statistic: Any, rows: int = 1, level: float = 0.4, **fields: Any) -> Guard:
    """Return a guard of probes with weights 1, 0.5, ..."""
    watched = tuple(Watched(0, wire.Row(latent=i)) for i in range(rows))
    weights = tuple(1.0 / (1 + i) for i in range(rows))
    return Guard("g", watched, weights, 0.05, statistic or ("none",), level, STOP, **fields)


def features(first: int, *rows: list[float]) -> Features:
    """Return features of tokens with these activations."""
    activations = np.array(rows, "<f4").reshape(len(rows), -1)
    top = np.zeros((len(rows), 0, 0), "<f4")
    return Features(first, activations, top, top)


def offline(one: Guard, activations: Any, prompt: int, uncounted: set[int]) -> Held | None:
    """Judge the whole text at once, from the definition."""
    first, last = (0 if one.prompt else prompt), (len(activations) if one.generated else prompt)
    positions = [p for p in range(first, last) if p not in uncounted]
    terms = [[w * float(a) for w, a in zip(one.weights, activations[p], strict=True)] for p in positions]
    scores = [sum(products, one.bias) for products in terms]
    values = Statistic(*one.statistic).update(np.array(scores, np.float64))
    for n, (position, value) in enumerate(zip(positions, values, strict=True), 1):
        if n >= one.min_tokens and exceeds(np.array([value]), one.level)[0]:
            return Held(position, float(value))
    return None


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    tokens=st.integers(1, 60),
    statistics=st.lists(st.sampled_from(STATISTICS), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
)
def test_verdicts_do_not_depend_on_chunks_and_equal_the_offline_evaluation(
    data: st.DataObject, tokens: int, statistics: list[Any], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    prompt = data.draw(st.integers(0, tokens))
    uncounted = sorted(data.draw(st.sets(st.integers(0, tokens))))
    phases = st.sampled_from([(True, True), (True, False), (False, True)])
    guards = [
        guard(
            *statistic, rows=int(rng.integers(1, 4)), level=float(rng.uniform(0, 1)),
            min_tokens=int(rng.integers(0, 9)), prompt=phase[0], generated=phase[1],
        )
        for statistic in statistics if (phase := data.draw(phases))
    ]  # fmt: skip
    activations = rng.normal(0.2, 0.5, size=(tokens, sum(len(g.rows) for g in guards))).astype("<f4")
    cuts = data.draw(st.lists(st.integers(0, tokens), max_size=8))
    judge = Judge(guards, prompt, uncounted)
    begin = judge.next_features
    for first, end in pairwise(sorted({begin, tokens, *(cut for cut in cuts if cut >= begin)})):
        judge.take(features(first, *activations[first:end].tolist()))
    columns = 0
    for one, track in zip(guards, judge.tracks, strict=True):
        part = activations[:, columns : columns + len(one.rows)]
        columns += len(one.rows)
        assert track.held == offline(one, part, prompt, set(uncounted))


def test_uncounted_tokens_pass_no_score_and_do_not_count_as_tokens() -> None:
    judge = Judge([guard("share", 0.0, level=0.5, min_tokens=2)], 3, (0, 2))
    judge.take(features(0, [9.0], [9.0], [9.0]))
    assert judge.tracks[0].held is None
    judge.take(features(3, [9.0]))
    assert judge.tracks[0].held == Held(3, 1.0)


def test_guard_that_judges_the_answer_begins_with_it() -> None:
    judge = Judge([guard("cusum", 0.0, level=2.5, prompt=False), guard("none", level=99)], 2)
    judge.take(features(0, *[[2.0, 0.0]] * 4))
    held = judge.tracks[0].held
    assert held
    assert held.position == 3
    assert held.statistic == pytest.approx(4.1)


def test_statistic_that_is_not_a_number_holds() -> None:
    judge = Judge([guard("moving_average", 0.1, level=1e9)], 2)
    judge.tracks[0].take(0, [0.0, float("nan")])
    held = judge.tracks[0].held
    assert held
    assert held.position == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_residual_that_is_not_finite_is_a_lost_verdict(value: float) -> None:
    """Of what is not finite, -inf and the 0 of a row that is not active would let a token pass."""
    judge = Judge([guard(rows=2)], 2)
    with pytest.raises(TelemetryLost, match="the residual of position 1 is not finite"):
        judge.take(features(0, [0.0, 0.0], [0.0, value], [0.0, 0.0]))


@pytest.mark.parametrize("first", [1, 3])
def test_missing_or_repeated_positions_are_lost_telemetry(first: int) -> None:
    judge = Judge([guard()], 4)
    judge.take(features(0, [0.0], [0.0]))
    with pytest.raises(TelemetryLost, match="where 2 was due"):
        judge.take(features(first, [0.0]))


def test_a_guard_of_the_prompt_has_judged_all_once_the_prompt_is_in() -> None:
    judge = Judge([guard(generated=False), guard()], 2)
    judge.take(features(0, [0.0, 0.0]))
    assert (judge.judged(0), judge.judged(1)) == (1, 1)
    judge.take(features(1, [0.0, 0.0]))
    assert (judge.judged(0), judge.judged(1)) == (float("inf"), 2)


def token_guard(rng: np.random.Generator, **fields: Any) -> Guard:
    """Return a guard with a token model of random weights."""
    model = TokenModel(rng.normal(size=1 << 10).astype(np.float32), 0.0, 3, "")
    return replace(guard("moving_average", 0.3, rows=0, level=0.8, **fields), rows=(), weights=(), token_model=model)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), tokens=st.integers(1, 40), seed=st.integers(0, 99))
def test_token_models_judge_ids_in_any_chunks_and_pass_over_uncounted_ones(
    data: st.DataObject, tokens: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    prompt, uncounted = data.draw(st.integers(0, tokens)), sorted(data.draw(st.sets(st.integers(0, tokens))))
    one = token_guard(rng, prompt=data.draw(st.booleans()))
    ids = rng.integers(0, 50, tokens).tolist()
    judge = Judge([one], prompt, uncounted)
    cuts = sorted({0, tokens, *data.draw(st.lists(st.integers(0, tokens), max_size=6))})
    for first, end in pairwise(cuts):
        judge.take_tokens(ids[first:end])
    positions = [p for p in range(tokens) if p not in uncounted]
    assert one.token_model
    scores = one.token_model.scores([ids[p] for p in positions])
    judged = [i for i, p in enumerate(positions) if one.prompt or p >= prompt]
    values = Statistic(*one.statistic).update(scores[judged])
    holds = np.flatnonzero(exceeds(values, one.level))
    expected = Held(positions[judged[holds[0]]], float(values[holds[0]])) if len(holds) else None
    assert judge.tracks[0].held == expected
    assert judge.judged(0) == tokens
