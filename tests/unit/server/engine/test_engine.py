"""Lost telemetry fails every call at once, with the loss as its reason, and no token leaves after it is known."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

from rudder.sae_models.bundle.manifest import Context
from rudder.server.engine import engine as engines
from rudder.server.engine.adapter import EngineDeadError, RequestOutputCollector, RequestOutputKind, SamplingParams
from rudder.server.engine.admission import Admission
from rudder.server.engine.call import Call, Output
from rudder.server.engine.engine import Engine
from rudder.server.engine.telemetry.channel import Sender
from rudder.server.engine.telemetry.frame import Frame, TelemetryLost
from rudder.server.engine.telemetry.hub import POLL_S, Hub
from rudder.server.monitoring import series
from rudder.server.monitoring.metrics import Metrics
from rudder.server.program import wire
from rudder.server.program.exclusion import Exclusion
from rudder.server.program.layout import Layout
from rudder.server.program.rows import Registry

LAYOUT = Layout(("layers.0.resid_post",), rows=4, slots=2)
CALL = Call((1, 5, 9), SamplingParams(max_tokens=400))


class FakeLLM:
    """vLLM without an engine process."""

    errored, is_running = False, True

    async def abort(self, *_: Any, **__: Any) -> None:
        """Nothing runs."""

    async def collective_rpc(self, *_: Any, **__: Any) -> list[bool]:
        """The worker holds nothing."""
        return [False]


def tokens(*ids: int, finish_reason: str | None = None) -> Any:
    """An output of vLLM."""
    choice = SimpleNamespace(
        text="x", token_ids=list(ids), logprobs=None, finish_reason=finish_reason, stop_reason=None
    )
    return SimpleNamespace(outputs=[choice], num_cached_tokens=0, prompt_logprobs=None)


class Rig:
    """An engine with a real channel, and the queues of the outputs of its calls, in the order in which they begin."""

    def __init__(self, folder: Path) -> None:
        model: Any = SimpleNamespace(max_model_len=512, bos_token_id=1)
        self.llm: Any = FakeLLM()
        admission = Admission(LAYOUT, 8)
        hub = Hub(lambda _: None, admission.release)
        self.engine = Engine(
            self.llm,
            model,
            Registry(LAYOUT, 8, {}),
            {},
            {},
            admission,
            hub,
            Metrics.create(),
        )
        self.engine.self_tested = True
        hub.bind(f"{folder}/telemetry")
        self.worker = Sender(f"{folder}/telemetry", hub.key)
        hub.channel.accept()
        self.queues: list[RequestOutputCollector] = []
        self.begun = asyncio.Condition()

    async def add_request(self, *_: Any) -> RequestOutputCollector:
        """Return the queue of a request's outputs, as vLLM does."""
        self.queues.append(RequestOutputCollector(RequestOutputKind.DELTA, f"{len(self.queues)}"))
        async with self.begun:
            self.begun.notify_all()
        return self.queues[-1]

    async def start(self, number: int) -> tuple[list[list[Output]], list["asyncio.Task[None]"]]:
        """Begin calls; return their outputs and tasks once all wait for tokens."""
        outputs: list[list[Output]] = [[] for _ in range(number)]

        async def read(received: list[Output]) -> None:
            async for output in self.engine.stream(CALL):
                received += [output]

        tasks = [asyncio.create_task(read(received)) for received in outputs]
        async with self.begun:
            await self.begun.wait_for(lambda: len(self.queues) == number)
        return outputs, tasks


@pytest_asyncio.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    """Start an engine that listens."""
    started = Rig(tmp_path)
    monkeypatch.setattr(engines, "add_request", started.add_request)
    monkeypatch.setattr(engines, "DEATH_CHECKS", 10)
    started.engine.spawn(started.engine.listen())
    yield started
    for task in started.engine.tasks:
        task.cancel()


async def errors_of(tasks: list["asyncio.Task[None]"]) -> set[type[BaseException]]:
    """Wait for the calls' ends; return the types of their exceptions."""
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 4 * POLL_S)
    return {type(result) for result in results if isinstance(result, BaseException)} if None not in results else set()


@pytest.mark.parametrize("kind", ["gap", "forged", "closed"])
async def test_lost_telemetry_fails_all_calls_though_they_read_nothing(rig: Rig, kind: str) -> None:
    outputs, tasks = await rig.start(5)
    for queue in rig.queues:
        queue.put(tokens(7))
    await asyncio.sleep(0.01)
    if kind == "gap":
        rig.worker.send(Frame(1))
    elif kind == "forged":
        rig.worker.send_message(b"no frame")
    else:
        rig.worker.socket.close()
    assert await errors_of(tasks) == {TelemetryLost}
    assert [len(received) for received in outputs] == [1] * 5
    assert rig.engine.metrics.values[series.TELEMETRY_LOST].values == {(): 1.0}
    assert not rig.engine.healthy
    assert not rig.engine.queues
    with pytest.raises(TelemetryLost):
        await anext(rig.engine.stream(CALL))


async def test_no_output_leaves_after_a_loss_is_known(rig: Rig) -> None:
    outputs, tasks = await rig.start(3)
    rig.worker.send(Frame(1))
    rig.engine.hub.receive()
    # Outputs that vLLM has delivered before the calls were woken, the last of a call among them.
    rig.queues[0].put(tokens(7))
    rig.queues[1].put(tokens(7, finish_reason="stop"))
    assert await errors_of(tasks) == {TelemetryLost}
    assert outputs == [[], [], []]


async def test_call_in_which_the_loss_is_found_returns_no_token(rig: Rig) -> None:
    """It receives the frames that it waits for before its last token leaves."""
    (outputs,), tasks = await rig.start(1)
    rig.worker.send(Frame(1))
    rig.queues[0].put(tokens(7, finish_reason="stop"))
    assert await errors_of(tasks) == {TelemetryLost}
    assert outputs == []


async def test_dead_engine_process_is_not_taken_for_a_loss(rig: Rig) -> None:
    _, tasks = await rig.start(2)
    rig.worker.socket.close()
    await asyncio.sleep(0.05)
    rig.llm.errored = True
    assert await errors_of(tasks) == {EngineDeadError}
    assert rig.engine.hub.lost is None


async def test_call_that_enters_while_telemetry_is_lost_fails(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    add_request = rig.add_request

    async def lost_meanwhile(*_: Any) -> RequestOutputCollector:
        rig.worker.send(Frame(1))
        rig.engine.hub.receive()
        return await add_request()

    monkeypatch.setattr(engines, "add_request", lost_meanwhile)
    _, tasks = await rig.start(1)
    assert await errors_of(tasks) == {TelemetryLost}


def test_the_exclusion_is_the_union_over_all_bundles() -> None:
    contexts = (Context(), Context(32, True, (0, 4)), Context(64, None, (2, 4), (9,)), Context(excluded_tokens=(7,)))
    assert engines.exclusion_of(contexts) == Exclusion((0, 2, 4), frozenset((7, 9)))
    assert engines.exclusion_of([]) == engines.exclusion_of([Context()]) == Exclusion()


async def test_excluded_positions_are_those_of_all_bundles(rig: Rig) -> None:
    """Whichever bundle a call reads or edits by: no client can lift the operator's rule."""
    contexts = Context(32, True, (0, 6)), Context(excluded_tokens=(9, 77))
    manifests = (SimpleNamespace(manifest=SimpleNamespace(context=context)) for context in contexts)
    bundles: Any = dict(enumerate(manifests))
    engine = replace(rig.engine, bundles=bundles)
    call = Call((5, 9, 8, 9), SamplingParams(max_tokens=3))
    request, _ = engine.compile(call)
    assert (request.bos, request.excluded, engine.uncounted(call)) == (False, (0, 1, 3, 6), (0, 1, 3, 6))
    assert engine.compile(replace(call, prompt_ids=(1, 8)))[0].excluded == (0,)
    assert rig.engine.compile(call)[0].excluded == rig.engine.uncounted(call) == ()
    assert rig.engine.uncounted(replace(call, prompt_ids=(1, 8))) == (0,)


def test_share_is_of_the_counted_tokens() -> None:
    gate = wire.Gate(sequence=wire.Sequence(0, binary=0.5))
    stages = ((wire.Site(0, (wire.Row("toy", 0),), gate=gate),),)
    request = wire.Request(4, 9, True, stages, excluded=(2, 3))
    for end, statistic, share in ((7, 2.0, 0.5), (1, 0.0, 0.0)):
        (outcome,) = engines.gate_outcomes(request, (0,), (statistic,), end)
        assert outcome.statistic == share
