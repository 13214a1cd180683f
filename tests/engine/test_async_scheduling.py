"""Asynchronous scheduling: a step starts before the last one's tokens are sampled, so one token too many may run."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from vllm.engine.arg_utils import AsyncEngineArgs

from rudder.server import config as configuration
from rudder.server.engine import adapter, selftest
from rudder.server.engine.call import Call, Output
from rudder.server.engine.engine import Engine
from rudder.server.engine.start import start_engine
from rudder.server.engine.telemetry.hub import Inbox
from rudder.server.program import wire
from rudder.server.program.watch import compile_watch
from rudder.v1 import program_pb2 as pb
from tests.engine.conftest import SMALL
from tests.engine.device import ON_GPU
from tests.engine.test_traps import SITE, greedy, ids, outcome, positions, prompt, push, run, usage
from tests.engine.workers import use_worker


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    """Changes for this module."""
    with pytest.MonkeyPatch.context() as patched:
        yield patched


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def sequential(engine: Engine) -> AsyncIterator[Engine]:
    """The small engine with one step in flight: as vLLM starts it on a CPU."""
    if not ON_GPU:
        yield engine
        return
    args = adapter.engine_args
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(adapter, "engine_args", lambda *a: replace(args(*a), async_scheduling=False))
        started = await start_engine(configuration.load(None, SMALL))
    assert started.llm.vllm_config.max_concurrent_batches == 1
    await selftest.run(started)
    yield started
    await started.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def overlapping(patch: pytest.MonkeyPatch, engine: Engine) -> AsyncIterator[Engine]:
    """The small engine with two steps in flight: as vLLM starts it on a GPU; its CPU platform would disable them."""
    if ON_GPU:
        assert engine.llm.vllm_config.max_concurrent_batches == 2
        yield engine
        return
    create = AsyncEngineArgs.create_engine_config

    def with_overlap(self: AsyncEngineArgs, *more: Any, **named: Any) -> Any:
        config = create(self, *more, **named)
        config.scheduler_config.async_scheduling = True
        return config

    patch.setattr(AsyncEngineArgs, "create_engine_config", with_overlap)
    use_worker(patch, "tests.engine.worker_async.Worker")
    started = await start_engine(configuration.load(None, SMALL))
    assert started.llm.vllm_config.max_concurrent_batches == 2
    await selftest.run(started)
    yield started
    await started.stop()


def activations(outputs: list[Output]) -> np.ndarray:
    """All activations reported, [tokens, features]."""
    return np.concatenate([output.features.activations for output in outputs])


def calls(engine: Engine, stop: list[int]) -> list[Call]:
    """Plain, edited, edited in one phase, watched, and one that ends early at a stop token."""
    rows = [(SITE, pb.Row(feature=pb.Feature(index=i))) for i in range(8)]
    watch = compile_watch(rows, engine.registry, "watch")
    everywhere = compile_watch(rows, engine.registry, "watch", prompt=True)
    generated = push(engine, 0.5, 2, pb.PHASE_GENERATED)
    ends = greedy(60, stop_token_ids=stop)
    return [
        Call(prompt(engine, 20), greedy(24)),
        Call(prompt(engine, 120, 5), greedy(24), push(engine, 1.0)),
        Call(prompt(engine, 30, 9), greedy(24), generated),
        Call(prompt(engine, 40, 3), greedy(24), watch=everywhere),
        Call(prompt(engine, 25, 7), ends, generated, watch=watch),
    ]


async def test_asynchronous_scheduling_changes_no_answer_and_no_report(
    sequential: Engine, overlapping: Engine, patch: pytest.MonkeyPatch
) -> None:
    *_, last = calls(sequential, [])
    stop = [ids(await run(sequential, last))[10]]
    opened: list[Inbox] = []
    open_inbox = overlapping.hub.open

    def open_and_record(handle: int, request: wire.Request) -> Inbox:
        opened.append(open_inbox(handle, request))
        return opened[-1]

    patch.setattr(overlapping.hub, "open", open_and_record)
    expected = await asyncio.gather(*(run(sequential, call) for call in calls(sequential, stop)))
    overlapped = await asyncio.gather(*(run(overlapping, call) for call in calls(overlapping, stop)))
    for ours, theirs in zip(overlapped, expected, strict=True):
        assert ids(ours) == ids(theirs)
        assert outcome(ours) == outcome(theirs)
        assert positions(ours) == positions(theirs)
        np.testing.assert_allclose(activations(ours), activations(theirs), atol=1e-4)
    ended = outcome(overlapped[-1])
    assert ended.finish_reason == "stop"
    # The engine computed the stop token too, whose edits the outcome does not count.
    assert opened[-1].num_computed_tokens == ended.prompt_tokens + ended.generated_tokens
    assert sum(ended.moved) == ended.generated_tokens - 1


async def test_a_request_aborted_between_two_steps_releases_everything(overlapping: Engine) -> None:
    long = [Call(prompt(overlapping, 20, n), greedy(200), push(overlapping, 0.5, n)) for n in range(6)]
    neighbour = Call(prompt(overlapping, 20), greedy(40))
    alone = ids(await run(overlapping, neighbour))
    running = asyncio.create_task(run(overlapping, neighbour))
    for stream in map(overlapping.stream, long):
        await anext(stream)
        await stream.aclose()
    assert ids(await running) == alone
    assert await usage(overlapping) == {"slots": 0, "rows": [0, 0, 0], "requests": 0}
    assert overlapping.healthy
