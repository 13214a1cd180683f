"""Policies: the second stage of the calls that they bind, and rows that are held from the start."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch

from rudder.server import config as configuration
from rudder.server.caller import ANONYMOUS
from rudder.server.engine import adapter, selftest
from rudder.server.engine.adapter import SamplingParams
from rudder.server.engine.call import Call, Outcome
from rudder.server.engine.engine import Engine
from rudder.server.engine.start import start_engine
from rudder.server.program.compile import compile_program
from rudder.server.program.errors import ProgramError
from rudder.server.program.watch import compile_watch
from rudder.server.safety.binding import binding_policy
from rudder.v1 import program_pb2 as pb

SITE = "layers.2.resid_post"
POLICY = """
name: always-low
sites:
- site: layers.2.resid_post
  edits:
  - row: {feature: {index: 7}}
    set: 3.0
"""
PROMPT = (1, *range(200, 216))
ROWS = 12
SMALL = {
    "engine.enforce_eager": "true",
    "engine.max_model_len": "128",
    "engine.kv_cache_memory_bytes": str(1 << 27),
    "engine.rows": str(ROWS),
    "programs.folder": "null",
    "policies.default": "always-low",
    "limits.request_share": "1",
}


def second_policy(index: int) -> str:
    """Return a policy file that edits another latent."""
    return POLICY.replace("always-low", "second").replace("index: 7", f"index: {index}")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def bound(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Engine]:
    """Start an engine with two policies, of which one is the default, self-tested in both stages."""
    folder: Path = tmp_path_factory.mktemp("policies")
    (folder / "always-low.yaml").write_text(POLICY)
    (folder / "second.yaml").write_text(second_policy(9))
    started = await start_engine(configuration.load(None, SMALL | {"policies.folder": str(folder)}))
    await selftest.run(started)
    yield started
    await started.stop()


def bound_call(engine: Engine, max_tokens: int, **fields: Any) -> Call:
    """Build a call of an anonymous caller, with the policy that binds it."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return Call(PROMPT, params, policy=binding_policy(engine, ANONYMOUS), **fields)


async def outcome(engine: Engine, call: Call) -> Outcome:
    """Run a call and return its outcome."""
    last = [output async for output in engine.stream(call)][-1].outcome
    assert last is not None
    return last


def residuals(engine: Engine, outcome: Outcome, name: str) -> np.ndarray:
    """Return the residuals `before` or `after` the edits at the site, [tokens, d]."""
    parts = [np.frombuffer(getattr(capture, name), "<f4") for capture in outcome.captures if capture.site == 0]
    stream: np.ndarray = np.concatenate(parts).reshape(-1, engine.model.hidden_size)[: len(PROMPT)]
    return stream


def opposing_program() -> pb.Program:
    """Build a program that steers hard against the policy's feature."""
    edit = pb.Edit(row=pb.Row(feature=pb.Feature(index=7)), add=-50.0)
    return pb.Program(sites=[pb.SiteEdits(site=SITE, edits=[edit])])


async def test_default_policy_binds_every_caller_and_is_attested(bound: Engine) -> None:
    last = await outcome(bound, bound_call(bound, 4))
    assert last.moved == ()
    assert last.policy_moved == (len(PROMPT) - 1 + 3,)


async def test_request_cannot_cancel_a_policy(bound: Engine) -> None:
    compiled = compile_program(opposing_program(), bound.registry)
    last = await outcome(bound, bound_call(bound, 1, compiled=compiled, capture=True))
    before, after = residuals(bound, last, "before"), residuals(bound, last, "after")
    sae = next(iter(bound.bundles.values())).sae
    row = sae.exact_rows(torch.tensor([7]))
    pushed = before + (-50.0) * row.decoder.numpy()
    z = pushed @ row.encoder.numpy()[0] + float(row.bias[0])
    f = np.where(z > float(row.threshold[0]), z, 0.0)
    expected = pushed + (3.0 - f)[:, None] * row.decoder.numpy()
    np.testing.assert_allclose(after[1:], expected[1:], rtol=1e-3, atol=1e-3)
    assert last.moved == last.policy_moved == (len(PROMPT) - 1,)


async def test_policy_does_not_touch_calls_that_it_does_not_bind(bound: Engine) -> None:
    call = bound_call(bound, 4, capture=True)
    free, last = await asyncio.gather(outcome(bound, replace(call, policy=None)), outcome(bound, call))
    np.testing.assert_array_equal(residuals(bound, free, "after"), residuals(bound, free, "before"))
    assert (free.moved, free.policy_moved) == ((), ())
    assert last.policy_moved == (len(PROMPT) - 1 + 3,)


async def test_calls_bound_by_different_policies_run_in_one_batch(bound: Engine) -> None:
    call = bound_call(bound, 1, capture=True)
    other = replace(call, policy=bound.policies["second"].compiled)
    first, second = await asyncio.gather(outcome(bound, call), outcome(bound, other))
    sae = next(iter(bound.bundles.values())).sae
    for last, latent in ((first, 7), (second, 9)):
        before, after = residuals(bound, last, "before"), residuals(bound, last, "after")
        encoded = sae.encode(torch.from_numpy(before.copy()))[:, latent].numpy()
        expected = before + (3.0 - encoded)[:, None] * sae.decoder[latent].float().numpy()
        np.testing.assert_allclose(after[1:], expected[1:], rtol=1e-3, atol=1e-3)


async def test_bound_call_needs_a_slot_but_no_rows(bound: Engine) -> None:
    rows = [(SITE, pb.Row(feature=pb.Feature(index=100 + i))) for i in range(ROWS - 2)]
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    filling = bound.stream(Call(PROMPT, params, watch=compile_watch(rows, bound.registry, "watch")))
    await anext(filling)
    assert bound.admission.ledger.rows_used(0) == ROWS
    (worker,) = await bound.llm.collective_rpc("rudder_usage")
    assert (worker["rows"], worker["slots"]) == ([ROWS], 0)
    # A prompt of its own: what the prefix cache has is not edited again.
    last = await outcome(bound, replace(bound_call(bound, 4), prompt_ids=(1, *range(300, 316))))
    assert last.policy_moved == (len(PROMPT) - 1 + 3,)
    assert bound.admission.ledger.rows_used(0) == ROWS
    await filling.aclose()


async def test_rows_of_policies_are_held_when_nothing_runs(bound: Engine) -> None:
    for _ in range(100):
        if set(bound.admission.ledger.leases) == {0}:
            break
        await asyncio.sleep(0.05)
    (worker,) = await bound.llm.collective_rpc("rudder_usage")
    assert (bound.admission.ledger.rows_used(0), worker["rows"], worker["slots"]) == (2, [2], 0)


async def test_call_that_needs_the_rows_of_policies_is_refused(bound: Engine) -> None:
    rows = [(SITE, pb.Row(feature=pb.Feature(index=100 + i))) for i in range(ROWS - 1)]
    params = SamplingParams(temperature=0.0, max_tokens=1)
    with pytest.raises(ProgramError, match=r"^report\.features: 13 distinct rows at layers\.2\.resid_post"):
        await outcome(bound, Call(PROMPT, params, watch=compile_watch(rows, bound.registry, "watch")))


async def test_unknown_default_policy_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(configuration.ConfigError, match=r"policies\.default: 'always-low' is not in"):
        await start_engine(configuration.load(None, SMALL | {"policies.folder": str(tmp_path)}))


async def test_invalid_policy_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "always-low.yaml").write_text(POLICY.replace("index: 7", "index: 99999"))
    with pytest.raises(ProgramError, match="feature"):
        await start_engine(configuration.load(None, SMALL | {"policies.folder": str(tmp_path)}))


@pytest.mark.parametrize("checked_early", [True, False])
async def test_policies_that_do_not_fit_stop_the_start_and_vllm(
    checked_early: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "always-low.yaml").write_text(POLICY)
    (tmp_path / "second.yaml").write_text(second_policy(9))
    started, stopped = list[bool](), list[bool]()
    start_llm = adapter.start_llm

    def recorded(*args: Any) -> Any:
        started.append(True)
        llm = start_llm(*args)
        shutdown = llm.shutdown

        def shutdown_recorded() -> None:
            stopped.append(True)
            shutdown()

        llm.shutdown = shutdown_recorded
        return llm

    monkeypatch.setattr(adapter, "start_llm", recorded)
    if not checked_early:
        monkeypatch.setattr("rudder.server.engine.start.check_programs", lambda *_: None)
    with pytest.raises(ProgramError, match=r"^policy second: 2 distinct rows at layers\.2\.resid_post, which has 1"):
        await start_engine(configuration.load(None, SMALL | {"policies.folder": str(tmp_path), "engine.rows": "1"}))
    assert len(started) == len(stopped) == int(not checked_early)
