"""No token leaves without its verdict when telemetry fails in mid-stream: over a real engine, channel and hold-back."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from rudder.server.engine import engine as engines
from rudder.server.engine.adapter import EngineDeadError, SamplingParams
from rudder.server.engine.call import Call
from rudder.server.engine.telemetry.frame import Frame, TelemetryLost, seal
from rudder.server.monitoring.metrics import Metrics
from rudder.server.safety.holdback import released
from rudder.server.safety.verdicts import Findings, Siblings
from tests.unit.server.engine.test_engine import Rig, tokens
from tests.unit.server.safety.scripted import guard, policy

PROMPT, HOLD_BACK = (1, 5, 9), 2


class Stream:
    """A guarded call, and what a worker and vLLM would send about it, step by step."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.left, self.steps = rig, list[int](), 0
        rig.engine.metrics = Metrics.create()
        self.findings = Findings()
        self.task = asyncio.create_task(self.read())

    async def read(self) -> None:
        """Read what leaves."""
        call = Call(PROMPT, SamplingParams(max_tokens=40))
        bound = policy(guard(0, hold_back=HOLD_BACK))
        async for output in released(self.rig.engine, call, [bound], self.findings, Siblings()):
            self.left += output.token_ids

    async def begun(self) -> None:
        """Wait until vLLM has the request."""
        async with self.rig.begun:
            await self.rig.begun.wait_for(lambda: bool(self.rig.queues))

    def frame(self, **changes: Any) -> Frame:
        """Return the frame of the next step: of the prompt, or of one token."""
        handle, length = next(iter(self.rig.engine.hub.inboxes)), 1 if self.steps else len(PROMPT)
        start = len(PROMPT) + self.steps - 1 if self.steps else 0
        values = np.zeros(length, "<f4").tobytes()
        fields: dict[str, Any] = {
            "sequence": self.rig.worker.sequence,
            "handles": np.array([handle], "<i8").tobytes(),
            "starts": np.array([start], "<i4").tobytes(),
            "lengths": np.array([length], "<i4").tobytes(),
            "activations": values,
        }
        return Frame(**(fields | changes))

    def token(self) -> None:
        """Let vLLM return the step's token."""
        self.rig.queues[0].put(tokens(10 + self.steps))
        self.steps += 1

    async def step(self) -> None:
        """Run a step without a fault."""
        self.rig.worker.send(self.frame())
        self.token()
        await asyncio.sleep(0.01)


@pytest_asyncio.fixture
async def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stream]:
    """Begin a guarded call and run eight steps of it."""
    rig = Rig(tmp_path)
    monkeypatch.setattr(engines, "add_request", rig.add_request)
    monkeypatch.setattr(engines, "DEATH_CHECKS", 10)
    monkeypatch.setattr(engines, "TELEMETRY_TIMEOUT_S", 0.3)
    rig.engine.spawn(rig.engine.listen())
    started = Stream(rig)
    await started.begun()
    for _ in range(8):
        await started.step()
    # Eight tokens; the scores of seven are in, and each has two behind it that are.
    assert started.left == [10, 11, 12, 13, 14]
    yield started
    for task in rig.engine.tasks:
        task.cancel()


def gap(stream: Stream) -> None:
    stream.rig.worker.send(stream.frame(sequence=stream.rig.worker.sequence + 1))


def repeated(stream: Stream) -> None:
    stream.rig.worker.send(stream.frame(sequence=stream.rig.worker.sequence - 1))


def forged(stream: Stream) -> None:
    stream.rig.worker.send_message(seal(stream.frame(), b"another key, of 32 bytes or less"))


def of_another_position(stream: Stream) -> None:
    """An authentic frame that leaves out a token of the request."""
    later = np.array([len(PROMPT) + stream.steps], "<i4").tobytes()
    stream.rig.worker.send(stream.frame(starts=later))


def without_activations(stream: Stream) -> None:
    stream.rig.worker.send(stream.frame(activations=b""))


def closed(stream: Stream) -> None:
    stream.rig.worker.socket.close()


def stalled(_: Stream) -> None:
    """Nothing arrives."""


FAULTS = [gap, repeated, forged, of_another_position, without_activations, closed, stalled]


@pytest.mark.parametrize("fault", FAULTS)
async def test_no_token_leaves_without_its_verdict(stream: Stream, fault: Any) -> None:
    before = list(stream.left)
    fault(stream)
    for _ in range(4):
        # vLLM goes on.
        stream.token()
        await asyncio.sleep(0.01)
    with pytest.raises(TelemetryLost):
        await asyncio.wait_for(stream.task, 3)
    assert stream.left == before


async def test_no_token_leaves_when_the_engine_dies(stream: Stream) -> None:
    before = list(stream.left)
    stream.rig.llm.errored = True
    stream.rig.worker.socket.close()
    stream.token()
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(stream.task, 3)
    assert stream.left == before


async def test_late_telemetry_is_waited_for(stream: Stream) -> None:
    frame = stream.frame()
    stream.token()
    await asyncio.sleep(0.1)
    assert stream.left[-1] == 14
    stream.rig.worker.send(frame)
    await asyncio.sleep(0.05)
    assert stream.left[-1] == 15
    stream.task.cancel()


async def test_what_has_been_judged_does_not_wait_for_a_preempted_request_to_compute_it_again(stream: Stream) -> None:
    stream.rig.worker.send(stream.frame())
    again = {"starts": 0, "lengths": 2}
    columns = {name: np.array([value], "<i4").tobytes() for name, value in again.items()}
    stream.rig.worker.send(stream.frame(**columns, activations=np.zeros(2, "<f4").tobytes()))
    stream.token()
    await asyncio.sleep(0.05)
    assert stream.left[-1] == 15
    stream.task.cancel()
