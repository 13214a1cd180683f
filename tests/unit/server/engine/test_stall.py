"""An engine with work that makes no progress is noticed, recovers, or is given up."""

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from rudder.server.engine import engine as engines
from rudder.server.engine.adapter import EngineDeadError
from rudder.server.engine.engine import Engine
from rudder.server.engine.stall import Progress


def test_idle_time_counts_from_the_last_progress_while_requests_are_pending() -> None:
    progress = Progress()
    assert progress.idle_s(1, 10.0, pending=False) == 0
    assert progress.idle_s(1, 50.0, pending=False) == 0
    assert progress.idle_s(1, 60.0, pending=True) == 10
    assert progress.idle_s(2, 61.0, pending=True) == 0
    assert progress.idle_s(2, 71.0, pending=True) == 10


class Stalling:
    """What `watch_progress` needs of an engine."""

    watch_progress, note_stall, give_up, fail = Engine.watch_progress, Engine.note_stall, Engine.give_up, Engine.fail

    def __init__(self) -> None:
        self.llm: Any = SimpleNamespace(errored=False)
        self.hub: Any = SimpleNamespace(frames=0, receive=lambda: None)
        self.failed: list[Exception] = []
        self.admission: Any = SimpleNamespace(callers={}, fail=self.failed.append)
        self.queues: dict[int, Any] = {1: SimpleNamespace(put=self.failed.append)}
        self.gauge: list[bool] = []
        self.metrics: Any = SimpleNamespace(set_stalled=self.gauge.append)
        self.stalled = self.given_up = False

    @property
    def dead(self) -> bool:
        """As of an engine."""
        return self.given_up or bool(self.llm.errored)


async def until(condition: Any) -> None:
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not come")


async def test_stall_is_logged_once_ends_with_progress_and_is_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engines, "STALL_CHECK_S", 0.001)
    caplog.set_level(logging.INFO, "rudder")
    engine = Stalling()
    watch = asyncio.ensure_future(engine.watch_progress(0.02, 1e6))  # type: ignore[misc]
    await asyncio.sleep(0.05)
    assert not engine.stalled
    engine.admission.callers[1] = "a"
    await until(lambda: engine.stalled)
    await asyncio.sleep(0.02)
    engine.hub.frames += 1
    await until(lambda: not engine.stalled)
    watch.cancel()
    messages = [record.message for record in caplog.records]
    assert messages[:2] == ["the engine makes no progress", "the engine makes progress again"]
    assert not engine.failed
    await asyncio.wait_for(engine.watch_progress(0.01, 0.03), 10)  # type: ignore[misc]
    assert (engine.given_up, engine.dead) == (True, True)
    assert [type(error) for error in engine.failed] == [EngineDeadError] * 2
