"""Rows that guards read: the client's report is the same with and without them, and guards get theirs."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from rudder.server.engine.call import Call, Output
from rudder.server.engine.engine import Engine
from rudder.server.engine.telemetry.hub import Features
from rudder.server.program.watch import Watched, compile_watch
from rudder.v1 import program_pb2 as pb
from tests.engine.test_traps import SITE, frequency, greedy, ids, outcome, preemptions, prompt, push, run

OTHER_SITE = "layers.4.resid_post"
PROMPT_TOKENS, NEW_TOKENS = 300, 12


def frequent_latents(engine: Engine, count: int) -> list[int]:
    """Return the latents that are active on most tokens."""
    latents: list[int] = np.argsort(-frequency(engine).numpy())[:count].tolist()
    return latents


def watched(engine: Engine, latents: Sequence[int], *, prompt: bool = False) -> tuple[Watched, ...]:
    """Watch latents of the bundle."""
    rows = [(SITE, pb.Row(feature=pb.Feature(index=latent))) for latent in latents]
    return compile_watch(rows, engine.registry, "watch", prompt=prompt)


def probe(engine: Engine) -> tuple[Watched, ...]:
    """Watch a probe with activations above 0 at another site than the client's, prompt included."""
    weights = np.random.default_rng(5).normal(size=engine.model.hidden_size).tolist()
    row = pb.Row(probe=pb.Probe(name="guard", weights=weights, bias=50.0))
    return compile_watch([(OTHER_SITE, row)], engine.registry, "guard", prompt=True)


def joined(parts: Sequence[Features]) -> Features:
    """Join the features of consecutive outputs, and check that no position is missing or repeated."""
    parts = [part for part in parts if len(part.activations)]
    for before, after in pairwise(parts):
        assert after.first == before.end
    return Features(
        parts[0].first,
        np.concatenate([part.activations for part in parts]),
        np.concatenate([part.top_latents for part in parts]),
        np.concatenate([part.top_values for part in parts]),
    )


def client_features(outputs: Sequence[Output]) -> Features:
    """Return all features of the client's view."""
    return joined([output.features for output in outputs])


def guard_features(outputs: Sequence[Output]) -> Features:
    """Return all features of the guards' view."""
    return joined([output.guard_features for output in outputs])


def require_equal(features: Features, expected: Features) -> None:
    """Check that two views have the same positions, columns and values."""
    assert (features.first, features.activations.shape) == (expected.first, expected.activations.shape)
    np.testing.assert_allclose(features.activations, expected.activations, rtol=1e-3, atol=1e-3)
    assert features.top_values.shape == expected.top_values.shape
    np.testing.assert_allclose(features.top_values, expected.top_values, rtol=1e-3, atol=1e-3)


async def test_guard_reads_the_prompt_and_the_client_report_is_unchanged(engine: Engine) -> None:
    latents = frequent_latents(engine, 6)
    call = Call(
        prompt(engine, PROMPT_TOKENS, 13), greedy(NEW_TOKENS), push(engine, 0.2, 4),
        watch=watched(engine, latents[:4]), top_k=5, top_k_sites=(SITE,), cache_salt="guards",
    )  # fmt: skip
    alone = await run(engine, call)
    # One of the guards' latents is the client's, too, and the guards' order is not that of the columns.
    guards = (*probe(engine), *watched(engine, [latents[5], latents[0]], prompt=True))
    noise = [Call(prompt(engine, 70 + n, n), greedy(8), push(engine, 0.5, n)) for n in range(3)]
    both, *_ = await asyncio.gather(run(engine, replace(call, guard=guards)), *(run(engine, c) for c in noise))
    assert ids(both) == ids(alone)
    assert outcome(both).moved == outcome(alone).moved
    assert client_features(both).first == PROMPT_TOKENS
    assert client_features(both).activations.shape == (NEW_TOKENS - 1, 4)
    require_equal(client_features(both), client_features(alone))
    assert all(len(output.guard_features.activations) == 0 for output in alone)
    as_client = replace(call, watch=guards, top_k=0, top_k_sites=())
    expected = client_features(await run(engine, as_client))
    assert expected.activations.shape == (PROMPT_TOKENS + NEW_TOKENS - 1, 3)
    assert (expected.activations.max(0) > 0).all(), "a guard row is never active: this test shows nothing"
    reported = guard_features(both)
    assert reported.top_values.shape[1] == 0
    require_equal(reported, expected._replace(top_latents=reported.top_latents, top_values=reported.top_values))


async def test_client_without_a_report_gets_none_beside_a_guard(engine: Engine) -> None:
    call = Call(prompt(engine, 40), greedy(5), guard=watched(engine, frequent_latents(engine, 2), prompt=True))
    outputs = await run(engine, call)
    assert all(output.features.activations.shape == (0, 0) for output in outputs)
    assert guard_features(outputs).activations.shape == (44, 2)


async def test_guard_of_generated_tokens_gets_none_of_the_prompt(engine: Engine) -> None:
    latents = frequent_latents(engine, 3)
    client = watched(engine, latents[:2], prompt=True)
    call = Call(prompt(engine, 130, 3), greedy(6), watch=client, guard=watched(engine, latents[1:]))
    outputs = await run(engine, call)
    assert client_features(outputs).activations.shape == (135, 2)
    guard = guard_features(outputs)
    assert (guard.first, guard.activations.shape) == (130, (5, 2))
    np.testing.assert_array_equal(guard.activations[:, 0], client_features(outputs).activations[130:, 1])


async def test_row_without_prompt_is_zero_at_prompt_tokens_beside_one_with_prompt(engine: Engine) -> None:
    first, second = frequent_latents(engine, 2)
    call = Call(prompt(engine, 150, 3), greedy(6), watch=watched(engine, [first, second], prompt=True))
    whole = client_features(await run(engine, call))
    mixed = replace(
        call, watch=(*watched(engine, [first]), *watched(engine, [second], prompt=True)), top_k=3, top_k_sites=(SITE,)
    )
    features = client_features(await run(engine, mixed))
    assert features.activations.shape == whole.activations.shape == (155, 2)
    assert whole.activations[:150, 0].any()
    assert not features.activations[:150, 0].any()
    assert not features.top_values[:150].any()
    assert features.top_values[150:].any()
    np.testing.assert_allclose(features.activations[150:, 0], whole.activations[150:, 0], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(features.activations[:, 1], whole.activations[:, 1], rtol=1e-3, atol=1e-3)


async def test_outputs_carry_the_positions_of_their_tokens(engine: Engine) -> None:
    outputs = await run(engine, Call(prompt(engine, 110, 9), greedy(20, stream_interval=4)))
    positions = [output.first_position + i for output in outputs for i in range(len(output.token_ids))]
    assert positions == list(range(110, 130))
    assert max(len(output.token_ids) for output in outputs) > 1


async def test_preempted_calls_report_each_position_once_to_client_and_guards(engine: Engine) -> None:
    latents = frequent_latents(engine, 4)
    client, guards = watched(engine, latents[:2]), watched(engine, latents[2:], prompt=True)
    calls = [
        Call(prompt(engine, 60, n), greedy(190), push(engine, 0.5, n), watch=client, guard=guards) for n in range(10)
    ]
    alone = [await run(engine, replace(call, guard=())) for call in calls]
    before = preemptions()
    together = await asyncio.gather(*(run(engine, call) for call in calls))
    assert preemptions() > before, "nothing was preempted: this test shows nothing"
    for ours, expected in zip(together, alone, strict=True):
        assert ids(ours) == ids(expected)
        require_equal(client_features(ours), client_features(expected))
        assert guard_features(ours).first == 0
        assert guard_features(ours).activations.shape == (249, 2)
