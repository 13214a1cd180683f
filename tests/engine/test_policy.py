"""Policies: stages behind the request's own program, rows that are held for them, and changes while calls run."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from google.protobuf import json_format

from rudder.server.caller import ANONYMOUS
from rudder.server.engine.adapter import SamplingParams
from rudder.server.engine.call import Call, Outcome
from rudder.server.engine.engine import Engine
from rudder.server.program.compile import compile_program
from rudder.server.program.errors import ProgramError
from rudder.server.program.watch import compile_watch
from rudder.server.safety.binding import stages_of
from rudder.server.safety.problems import PolicyInvalid
from rudder.server.safety.store import PolicyStore
from rudder.v1 import policy_pb2
from rudder.v1 import program_pb2 as pb

SITE = "layers.2.resid_post"
PROMPT = (1, *range(200, 216))
COUNTED = len(PROMPT) - 1
SHADOW = "POLICY_MODE_SHADOW"


def removal(name: str, version: int) -> policy_pb2.Policy:
    """What takes a policy out of force."""
    return policy_pb2.Policy(name=name, version=version, removed=True)


@pytest_asyncio.fixture(loop_scope="session")
async def store(engine: Engine) -> AsyncIterator[PolicyStore]:
    """The policies of the shared engine, of which none is in force before and after a test."""
    policies = PolicyStore(engine, allow_uncertified=True)
    yield policies
    for policy in list(policies.in_force.values()):
        await policies.apply(removal(policy.name, policy.version + 1), "test")
    async with asyncio.timeout(10):
        while engine.admission.ledger.leases:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    (worker,) = await engine.llm.collective_rpc("rudder_usage")
    assert (sum(worker["rows"]), worker["slots"], worker["requests"]) == (0, 0, 0)


def latent(engine: Engine, index: int) -> dict[str, Any]:
    return {"feature": {"index": index, "bundle": next(iter(engine.bundles))}}


def setting(engine: Engine, index: int, value: float = 3.0, **rest: Any) -> dict[str, Any]:
    """A program that sets a latent."""
    return {"sites": [{"site": SITE, "edits": [{"row": latent(engine, index), "set": value}]}]} | rest


def message(engine: Engine, name: str, **fields: Any) -> policy_pb2.Policy:
    """A policy that binds everybody."""
    bundles = {name: bundle.sha256 for name, bundle in engine.bundles.items()}
    document = {"name": name, "version": 1, "binds": {"all": True}, "bundles": bundles} | fields
    return json_format.ParseDict(document, policy_pb2.Policy())


def bound_call(store: PolicyStore, max_tokens: int, **fields: Any) -> Call:
    """Build a call of an anonymous caller, with the programs of the policies that bind it."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    fields = {"policies": stages_of(store.binding(ANONYMOUS).policies)} | fields
    return Call(PROMPT, params, **fields)


async def run(engine: Engine, call: Call) -> tuple[list[int], Outcome]:
    """Run a call and return its tokens and its outcome."""
    outputs = [output async for output in engine.stream(call)]
    last = outputs[-1].outcome
    assert last is not None
    return [token for output in outputs for token in output.token_ids], last


async def outcome(engine: Engine, call: Call) -> Outcome:
    """Run a call and return its outcome."""
    return (await run(engine, call))[1]


def residuals(engine: Engine, outcome: Outcome, name: str) -> np.ndarray:
    """Return the residuals `before` or `after` the edits at the site, [tokens, d]."""
    site = engine.registry.layout.sites.index(SITE)
    parts = [np.frombuffer(getattr(capture, name), "<f4") for capture in outcome.captures if capture.site == site]
    stream: np.ndarray = np.concatenate(parts).reshape(-1, engine.model.hidden_size)[: len(PROMPT)]
    return stream


def activation(engine: Engine, x: np.ndarray, index: int) -> np.ndarray:
    """Return the activations of a latent at x [n, d]."""
    sae = next(iter(engine.bundles.values())).sae
    active: np.ndarray = sae.encode(torch.from_numpy(x.copy()))[:, index].numpy()
    return active


def with_latent_set(engine: Engine, x: np.ndarray, index: int, value: float) -> np.ndarray:
    """Return x [n, d] with a latent set."""
    decoder = next(iter(engine.bundles.values())).sae.decoder[index].float().numpy()
    return np.asarray(x + (value - activation(engine, x, index))[:, None] * decoder)


def opposing_program() -> pb.Program:
    """Build a program that steers hard against latent 7."""
    edit = pb.Edit(row=pb.Row(feature=pb.Feature(index=7)), add=-50.0)
    return pb.Program(sites=[pb.SiteEdits(site=SITE, edits=[edit])])


async def test_policies_run_one_behind_the_other_and_a_request_cannot_cancel_them(
    engine: Engine, store: PolicyStore
) -> None:
    await store.apply(message(engine, "b-second", program=setting(engine, 9, 2.0)), "test")
    await store.apply(message(engine, "a-first", program=setting(engine, 7, 3.0)), "test")
    compiled = compile_program(opposing_program(), engine.registry)
    last = await outcome(engine, bound_call(store, 1, compiled=compiled, capture=True))
    before, after = residuals(engine, last, "before"), residuals(engine, last, "after")
    pushed = before - 50.0 * next(iter(engine.bundles.values())).sae.decoder[7].float().numpy()
    expected = with_latent_set(engine, with_latent_set(engine, pushed, 7, 3.0), 9, 2.0)
    np.testing.assert_allclose(after[1:], expected[1:], rtol=1e-3, atol=1e-3)
    assert (last.moved, last.policy_moved) == ((COUNTED,), ((COUNTED,), (COUNTED,)))


async def test_policies_do_not_touch_calls_that_they_do_not_bind(engine: Engine, store: PolicyStore) -> None:
    for name, index in (("a", 7), ("b", 9)):
        await store.apply(message(engine, name, program=setting(engine, index)), "test")
    call = bound_call(store, 4, capture=True)
    other = replace(call, policies=call.policies[1:])
    free, last, second = await asyncio.gather(
        outcome(engine, replace(call, policies=())), outcome(engine, call), outcome(engine, other)
    )
    np.testing.assert_array_equal(residuals(engine, free, "after"), residuals(engine, free, "before"))
    assert (free.moved, free.policy_moved) == ((), ())
    assert (last.policy_moved, second.policy_moved) == (((COUNTED + 3,), (COUNTED + 3,)), ((COUNTED + 3,),))
    expected = with_latent_set(engine, residuals(engine, second, "before"), 9, 3.0)
    np.testing.assert_allclose(residuals(engine, second, "after")[1:], expected[1:], rtol=1e-3, atol=1e-3)


async def test_shadow_changes_no_token_and_counts_what_it_would_touch(engine: Engine, store: PolicyStore) -> None:
    trigger = {"site": SITE, "any_of": [{"row": latent(engine, 12), "above": 0.0}]}
    programs = [setting(engine, 7, 30.0, gate=trigger), setting(engine, 9, -40.0)]
    programs[1]["sites"][0]["blend"] = {"weight": 1.0, "bundle": next(iter(engine.bundles))}
    programs[1]["sites"][0]["restore_norm"] = True
    for name, program in zip("ab", programs, strict=True):
        await store.apply(message(engine, name, program=program, mode=SHADOW), "test")
    call = bound_call(store, 12, capture=True)
    (plain, free), (shadowed, last) = await asyncio.gather(run(engine, replace(call, policies=())), run(engine, call))
    assert shadowed == plain
    np.testing.assert_array_equal(residuals(engine, last, "after"), residuals(engine, last, "before"))
    np.testing.assert_array_equal(residuals(engine, last, "before"), residuals(engine, free, "after"))
    tokens = COUNTED + 11
    (gated,), (edited, blended) = last.policy_moved
    assert (edited, blended, last.tokens_seen) == (tokens, tokens, tokens + 1)
    (gate,) = last.gates
    active = int((activation(engine, residuals(engine, last, "before")[1:], 12) > 0).sum())
    assert active <= gate.open_tokens == gated < tokens
    # In force, the same programs do change what comes out.
    for name, program in zip("ab", programs, strict=True):
        await store.apply(message(engine, name, version=2, program=program), "test")
    enforced, _ = await run(engine, bound_call(store, 12))
    assert enforced != plain


async def test_guard_that_clamps_opens_the_gate_for_good(engine: Engine, store: PolicyStore) -> None:
    width, window = engine.model.hidden_size, 4
    weights = [float(value) for value in np.random.default_rng(5).normal(size=width)]
    free = await outcome(engine, bound_call(store, 1, capture=True))
    scores = residuals(engine, free, "before")[1:] @ np.array(weights, np.float32)

    def opened_by(above: float) -> np.ndarray:
        held = (scores > above).astype(float)
        shares = np.array([held[max(0, n + 1 - window) : n + 1].mean() for n in range(len(held))])
        opened: np.ndarray = np.logical_or.accumulate((shares > 0.6) & (np.arange(len(held)) >= window - 1))
        return opened

    ordered = np.sort(scores)
    levels = [float(level) for level in (ordered[1:] + ordered[:-1]) / 2]
    # Neither closed to the end, nor open as soon as it may be.
    above = next(level for level in levels if 0 < opened_by(level).sum() < len(scores) - window)
    opened = opened_by(above)
    guard = {
        "name": "topic", "action": "GUARD_ACTION_CLAMP", "level": 0.6, "minTokens": window,
        "agreement": {"above": above, "tokens": window},
        "score": {"terms": [{"site": SITE, "row": {"probe": {"weights": weights}}, "weight": 1}]},
    }  # fmt: skip
    await store.apply(message(engine, "low", program=setting(engine, 7), guards=[guard]), "test")
    last = await outcome(engine, bound_call(store, 1, capture=True))
    assert last.policy_moved == ((int(opened.sum()),),)
    moved = (residuals(engine, last, "after") != residuals(engine, last, "before")).any(1)
    assert moved.tolist() == [False, *opened.tolist()]


async def test_running_call_keeps_its_version_and_the_rows_of_it(engine: Engine, store: PolicyStore) -> None:
    site = engine.registry.layout.sites.index(SITE)
    await store.apply(message(engine, "low", program=setting(engine, 7)), "test")
    binding = store.binding(ANONYMOUS)
    store.acquire(binding.policies)
    stream = engine.stream(bound_call(store, 120))
    await anext(stream)
    await store.apply(message(engine, "low", version=2, program=setting(engine, 9, 1.0)), "test")
    assert engine.admission.ledger.rows_used(site) == 2
    new, (*_, old) = await asyncio.gather(outcome(engine, bound_call(store, 4, capture=True)), collected(stream))
    expected = with_latent_set(engine, residuals(engine, new, "before"), 9, 1.0)
    np.testing.assert_allclose(residuals(engine, new, "after")[1:], expected[1:], rtol=1e-3, atol=1e-3)
    assert old.outcome is not None
    assert old.outcome.policy_moved == ((COUNTED + 119,),)
    assert store.binding(ANONYMOUS).policies[0].version == 2
    store.release(binding.policies)
    async with asyncio.timeout(10):
        while engine.admission.ledger.rows_used(site) > 1:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    (worker,) = await engine.llm.collective_rpc("rudder_usage")
    assert worker["rows"][site] == 1


async def collected(stream: Any) -> list[Any]:
    """Return the outputs of a stream."""
    return [output async for output in stream]


def watching(engine: Engine, latents: Sequence[int]) -> Any:
    """Watch so many latents."""
    return compile_watch([(SITE, pb.Row(feature=pb.Feature(index=i))) for i in latents], engine.registry, "watch")


async def test_bound_call_needs_a_slot_but_no_rows(engine: Engine, store: PolicyStore) -> None:
    await store.apply(message(engine, "low", program=setting(engine, 7)), "test")
    site, rows = engine.registry.layout.sites.index(SITE), engine.registry.layout.rows
    halves = [range(100, 100 + rows // 2), range(200, 200 + rows - rows // 2 - 1)]
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    filling = [engine.stream(Call(PROMPT, params, watch=watching(engine, half))) for half in halves]
    for stream in filling:
        await anext(stream)
    assert engine.admission.ledger.rows_used(site) == rows
    # A policy that needs a row of its own has to wait for room.
    with pytest.raises(PolicyInvalid, match="cannot be held: the bank has no free rows"):
        await store.apply(message(engine, "more", program=setting(engine, 9)), "test")
    # A prompt of its own: what the prefix cache has is not edited again.
    last = await outcome(engine, replace(bound_call(store, 4), prompt_ids=(1, *range(300, 316))))
    assert last.policy_moved == ((COUNTED + 3,),)
    for stream in filling:
        await stream.aclose()


async def test_call_that_needs_the_rows_of_policies_is_refused(engine: Engine, store: PolicyStore) -> None:
    await store.apply(message(engine, "low", program=setting(engine, 7)), "test")
    rows = engine.registry.layout.rows
    params = SamplingParams(temperature=0.0, max_tokens=1)
    with pytest.raises(ProgramError, match=rf"^report\.features: {rows + 1} distinct rows at layers\.2\.resid_post"):
        await outcome(engine, Call(PROMPT, params, watch=watching(engine, range(100, 100 + rows))))


async def test_hidden_latents_are_not_among_the_strongest(engine: Engine, store: PolicyStore) -> None:
    call = bound_call(store, 1, top_k=4, top_k_sites=(SITE,), top_k_prompt=True)
    (seen,) = await collected(engine.stream(call))
    hidden = tuple(sorted(set(seen.features.top_latents[:, 0, 0].tolist())))
    (told,) = await collected(engine.stream(replace(call, hidden=(hidden,))))
    assert told.features.top_latents.shape == seen.features.top_latents.shape
    assert not np.isin(told.features.top_latents[told.features.top_values > 0], hidden).any()
    # Others take their places.
    assert (told.features.top_values[1:] > 0).all()
