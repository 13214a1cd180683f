"""Frames of steps that the device still computes: none is lost, all are as read behind their step, and no step waits.

There is no device here, so events that have not occurred stand in for it.
"""

from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
import pytest
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput

from rudder.sae_models.sparse.screening import prepare_screening
from rudder.server.engine.telemetry.channel import Receiver, Sender
from rudder.server.engine.telemetry.frame import Frame
from rudder.server.engine.worker import transfer
from rudder.server.engine.worker.driver import Driver
from rudder.server.engine.worker.outbox import Outbox
from rudder.server.engine.worker.reader import PendingFrame, Readable, Reader
from rudder.server.engine.worker.worker import SteeringWorker
from rudder.server.program import wire
from rudder.server.program.layout import Layout
from tests.unit.reference import BUNDLE, WIDTH, Floats, grid, make_driver, run_step, toy_sae
from tests.unit.server.engine.telemetry.test_channel import connected_pair

LAYOUT = Layout(("layers.0.resid_post", "layers.1.resid_post"), rows=16, slots=4, stages=2, capture_tokens=16)
ONES = wire.Row(decoder=np.ones(WIDTH, "<f4").tobytes())
HUGE = wire.Row(decoder=np.full(WIDTH, 3e38, "<f4").tobytes())
PROBE = wire.Row(encoder=np.ones(WIDTH, "<f4").tobytes(), threshold=-np.inf)
LATENT = wire.Row(BUNDLE, 1)
TOKENS = 10
# (request, start, tokens): chunks, steady decoding, another order, a request left out, and preemption.
STEPS = (
    [("all", 0, 3), ("edited", 0, 3)],
    [("all", 3, 1), ("edited", 3, 1)],
    [("all", 4, 1), ("edited", 4, 1)],
    [("all", 5, 1), ("edited", 5, 1)],
    [("edited", 6, 1), ("all", 6, 1)],
    [("edited", 7, 1)],
    [("edited", 8, 1), ("all", 0, 8)],
    [("edited", 9, 1), ("all", 8, 1)],
)


class Pending:
    """An event that occurs when someone waits for it; counts how often."""

    waits = 0

    def synchronize(self) -> None:
        """Wait."""
        Pending.waits += 1


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device has done nothing until someone waits for it."""
    monkeypatch.setattr(Pending, "waits", 0)
    monkeypatch.setattr(transfer, "record_event", lambda _: Pending())


@pytest.fixture
def channel() -> Iterator[tuple[Sender, Receiver]]:
    with connected_pair() as pair:
        yield pair


def parts() -> tuple[Driver, Reader]:
    """A driver and a reader with two requests that use all columns of a frame, and a pinned row."""
    driver = make_driver(LAYOUT, toy_sae(Random(0)))
    pinned = wire.Site(0, (LATENT,), watch=(0,))
    driver.admit("pinned", 0, wire.Request(0, 0, False, ((pinned,),)))
    gate = wire.Gate(((2, -9.0),), wire.Sequence(0, window=3, level=-9.0))
    own = wire.Site(0, (PROBE, ONES, LATENT), (wire.Edit(1, shift=1.0),), wire.Blend(1, 0.5), watch=(0, 2), gate=gate)
    overflows = wire.Site(1, (HUGE,), (wire.Edit(0, shift=9.0, prompt=False),))
    whole = wire.Request(
        3, TOKENS, True, ((own,), (overflows,)), True, top_k=2, top_k_sites=(0,), capture=True, excluded=(2, 5)
    )
    driver.admit("all", 1, whole)
    driver.admit("edited", 2, wire.Request(2, TOKENS, False, ((own,), ())))
    reader = Reader(driver.banks)
    reader.pin({0: driver.requests["pinned"].places(pinned)})
    reader.dictionaries[0] = Readable(prepare_screening(driver.saes[BUNDLE]), [0])
    return driver, reader


def residuals() -> dict[str, Floats]:
    return {name: grid(Random(n), 2, TOKENS, WIDTH, top=4) for n, name in enumerate(("all", "edited"))}


def received(receiver: Receiver) -> list[Frame]:
    return list(receiver.frames())


@pytest.mark.usefixtures("late")
def test_frames_sent_late_equal_those_sent_at_once(channel: tuple[Sender, Receiver]) -> None:
    """The banks have run all later steps, and the driver has released the requests, when the first frame is built."""
    driver, reader = parts()
    expected = []
    for number, step in enumerate(STEPS):
        run_step(driver, step, residuals())
        expected.append(reader.read(driver.step, [number]).frame(number))
    assert all(any(getattr(frame, name) for frame in expected) for name in Frame.__struct_fields__)

    Pending.waits = 0
    (driver, reader), outbox = parts(), Outbox(channel[0])
    for number, step in enumerate(STEPS):
        run_step(driver, step, residuals())
        outbox.put(reader.read(driver.step, [number]))
    for name in ("all", "edited"):
        driver.finish(name)
    for bank in driver.banks:
        for buffer in bank.buffers():
            buffer.zero_()
    assert Pending.waits == 0, "a step waited"
    assert received(channel[1]) == []
    outbox.send(3)
    assert received(channel[1]) == expected[:3]
    outbox.send(2)
    assert received(channel[1]) == []
    outbox.send(len(STEPS))
    assert received(channel[1]) == expected[3:]
    assert not outbox.pending


@pytest.mark.usefixtures("late")
def test_top_k_latents_alone_wait_for_their_residuals() -> None:
    """They are computed on a stream of their own, and no other column makes the host wait for them."""
    driver = make_driver(LAYOUT, toy_sae(Random(0)))
    driver.admit("all", 1, wire.Request(3, TOKENS, False, ((), ()), True, top_k=2, top_k_sites=(0,)))
    reader = Reader(driver.banks)
    reader.dictionaries[0] = Readable(prepare_screening(driver.saes[BUNDLE]), [0])
    run_step(driver, [("all", 0, 3)], residuals())
    pending = reader.read(driver.step, ())
    assert Pending.waits == 0
    assert pending.frame(0).top_values
    assert Pending.waits == 1


class Tokens(AsyncModelRunnerOutput):
    """The output of a step on its way to the host."""

    def __init__(self, step: int) -> None:
        self.step = step

    def get_output(self) -> Any:
        return self.step


class Runner:
    """In place of vLLM's worker: runs the bank, and samples tokens that are collected later."""

    driver: Driver
    steps = 0

    def execute_model(self, scheduler_output: Any, *_args: Any, **_named: Any) -> Any:
        """Run a step."""
        if not scheduler_output.total_num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        run_step(self.driver, scheduler_output.step, residuals())
        return None

    def sample_tokens(self, *_args: Any, **_named: Any) -> Any:
        """Sample the step's tokens."""
        self.steps += 1
        return Tokens(self.steps)


class Worker(SteeringWorker, Runner):
    """Rudder's part of a worker."""


class Scheduled:
    """What the scheduler says of a step."""

    scheduled_new_reqs = ()

    def __init__(self, step: list[tuple[str, int, int]], finished: tuple[str, ...] = ()) -> None:
        self.step, self.finished_req_ids = step, set(finished)
        self.total_num_scheduled_tokens = sum(length for *_, length in step)


@pytest.fixture
def worker(channel: tuple[Sender, Receiver]) -> Worker:
    worker = Worker()
    worker.driver, worker.reader = parts()
    worker.released, worker.outbox = [], Outbox(channel[0])
    return worker


@pytest.mark.usefixtures("late")
def test_a_frame_leaves_just_before_its_tokens_while_the_next_step_runs(
    worker: Worker, channel: tuple[Sender, Receiver]
) -> None:
    """As vLLM's asynchronous scheduling calls a worker: two steps are in flight; the last has none behind it."""
    outputs = []
    for number, step in enumerate(STEPS):
        assert worker.execute_model(Scheduled(step)) is None
        outputs.append(worker.sample_tokens(None))
        assert Pending.waits == 0, "a step waited"
        assert received(channel[1]) == []
        if number:
            assert outputs.pop(0).get_output() == number
            assert [frame.sequence for frame in received(channel[1])] == [number - 1]
            Pending.waits = 0
    assert outputs.pop().get_output() == len(STEPS)
    assert [frame.sequence for frame in received(channel[1])] == [len(STEPS) - 1]


@pytest.mark.usefixtures("late")
def test_a_step_without_tokens_releases_behind_the_steps_in_flight(
    worker: Worker, channel: tuple[Sender, Receiver]
) -> None:
    worker.execute_model(Scheduled(STEPS[0]))
    output = worker.sample_tokens(None)
    assert worker.execute_model(Scheduled([], ("1-ab",))) is EMPTY_MODEL_RUNNER_OUTPUT
    step, release = received(channel[1])
    assert (bool(step.handles), step.released) == (True, b"")
    assert (release.handles, np.frombuffer(release.released, "<i8").tolist()) == (b"", [1])
    assert output.get_output() == 1
    assert received(channel[1]) == []


@pytest.mark.usefixtures("late")
def test_a_request_is_not_held_only_when_all_its_frames_are_sent(
    worker: Worker, channel: tuple[Sender, Receiver]
) -> None:
    """The server drops its inbox then, without which it could not split a later frame."""
    worker.execute_model(Scheduled(STEPS[0]))
    worker.sample_tokens(None)
    assert worker.rudder_holds(1)
    assert len(received(channel[1])) == 1


def test_a_frame_that_could_not_be_sent_is_not_skipped(channel: tuple[Sender, Receiver]) -> None:
    class Failing(PendingFrame):
        def frame(self, sequence: int) -> Frame:
            raise RuntimeError(f"device lost at {sequence}")

    outbox = Outbox(channel[0])
    outbox.put(Failing(b""))
    outbox.put(PendingFrame(b"x" * 8))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="device lost"):
            outbox.send(2)
    assert received(channel[1]) == []
