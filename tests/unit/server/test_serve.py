"""The engine is stopped in whatever way a server ends."""

import asyncio
import os
import signal
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from rudder.server import config, serve
from rudder.server.engine import selftest
from rudder.server.grpc.health import Health
from rudder.server.process import free_port
from rudder.server.safety.store import PolicyStore


class FakeEngine:
    """An engine without a model; counts its stops."""

    def __init__(self) -> None:
        self.model = SimpleNamespace(name="m", sha256="", max_model_len=100, vocab_size=10)
        self.registry = SimpleNamespace(layout=SimpleNamespace(sites=()))
        self.bundles: dict[str, Any] = {}
        self.programs: dict[str, Any] = {}
        self.epoch, self.healthy, self.stalled, self.hub = "e", True, False, SimpleNamespace(lost=None)
        self.stops = 0

    async def stop(self) -> None:
        self.stops += 1


class FakeDoor:
    """A door that records what is done to it."""

    name = "fake"

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.events: list[Any] = []

    async def start(self) -> str:
        if self.error:
            raise self.error
        return "nowhere"

    async def set_serving(self, serving: bool) -> None:
        self.events.append(serving)

    async def stop(self, grace_s: float) -> None:
        self.events.append(grace_s)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """`serve` starts this engine, which passes its self-test, and gets SIGTERM at once."""
    fake = FakeEngine()

    async def start(*_: Any) -> tuple[FakeEngine, PolicyStore]:
        return fake, PolicyStore(fake)  # type: ignore[arg-type]

    async def passed(_: Any) -> None:
        pass

    def stop_signals() -> "asyncio.Queue[signal.Signals]":
        queue: asyncio.Queue[signal.Signals] = asyncio.Queue()
        queue.put_nowait(signal.SIGTERM)
        return queue

    monkeypatch.setattr(serve, "start_with_policies", start)
    monkeypatch.setattr(selftest, "run", passed)
    monkeypatch.setattr(serve, "stop_signals", stop_signals)
    monkeypatch.setattr(serve, "REGISTRY", CollectorRegistry())
    return fake


def configured() -> config.Config:
    ports = {"listen.port": "0", "listen.metrics_port": "0", "listen.accept_s": "0", "listen.drain_s": "7"}
    return config.load(overrides=ports)


async def run(monkeypatch: pytest.MonkeyPatch, door: FakeDoor) -> int:
    monkeypatch.setattr(serve, "GrpcDoor", lambda _: door)
    return await serve.serve(configured())


async def test_signal_drains_doors_then_stops_the_engine(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    door = FakeDoor()
    assert await run(monkeypatch, door) == 0
    assert door.events[:4] == [True, False, 7 + serve.FAILED_ANSWERS_S, 0]
    assert engine.stops == 1


@pytest.mark.usefixtures("engine")
async def test_probes_are_answered_until_the_drain_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    listen = config.Listen(port=0, metrics_port=0, health_port=free_port(), accept_s=0)
    answers = []

    class Probed(FakeDoor):
        health = Health(())

        async def set_serving(self, serving: bool) -> None:
            await self.health.set(serving, alive=True)

        async def stop(self, grace_s: float) -> None:
            if grace_s:
                async with grpc.aio.insecure_channel(listen.address(listen.health_port or 0)) as channel:
                    stub: Any = health_pb2_grpc.HealthStub(channel)
                    for name in ("readiness", "liveness"):
                        answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=20)
                        answers.append(answer.status)

    monkeypatch.setattr(serve, "GrpcDoor", lambda _: Probed())
    assert await serve.serve(config.Config(listen=listen)) == 0
    assert answers == [health_pb2.HealthCheckResponse.NOT_SERVING, health_pb2.HealthCheckResponse.SERVING]


async def test_dead_engine_ends_the_server_with_status_1(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "stop_signals", asyncio.Queue)
    engine.healthy = False
    door = FakeDoor()
    assert await run(monkeypatch, door) == 1
    # Calls fail by themselves, and their answers leave before the door closes.
    assert door.events[:4] == [False, False, 2 * serve.FAILED_ANSWERS_S, 0]
    assert engine.stops == 1


async def test_doors_say_not_serving_while_the_engine_is_stalled(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "HEALTH_CHECK_S", 0.001)
    door, engine.stalled = FakeDoor(), True
    until: asyncio.Future[signal.Signals] = asyncio.get_running_loop().create_future()
    watching = asyncio.ensure_future(serve.serve_while_healthy([door], engine, until))  # type: ignore[arg-type]
    await asyncio.sleep(0.02)
    engine.stalled = False
    await asyncio.sleep(0.02)
    until.set_result(signal.SIGTERM)
    await asyncio.wait_for(watching, 5)
    assert door.events == [False, True]


async def test_failed_self_test_stops_the_engine(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    async def failed(_: Any) -> None:
        raise selftest.SelfTestFailed("off by 2")

    monkeypatch.setattr(selftest, "run", failed)
    with pytest.raises(selftest.SelfTestFailed):
        await run(monkeypatch, FakeDoor())
    assert engine.stops == 1
    assert 'ERROR rudder.server.serve: the server failed error="SelfTestFailed: off by 2"' in capfd.readouterr().err


async def test_door_that_cannot_start_stops_the_engine(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    door = FakeDoor(OSError("in use"))
    with pytest.raises(OSError, match="in use"):
        await run(monkeypatch, door)
    assert (door.events, engine.stops) == ([0], 1)


async def test_failed_drain_stops_the_engine(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def failed(*_: Any) -> None:
        raise RuntimeError("drain")

    monkeypatch.setattr(serve, "drain", failed)
    with pytest.raises(RuntimeError, match="drain"):
        await run(monkeypatch, FakeDoor())
    assert engine.stops == 1


async def test_sighup_and_a_look_at_the_folder_reload_the_policies(tmp_path: Path) -> None:
    reloaded, spawned = asyncio.Event(), list[Any]()

    async def reload() -> None:
        reloaded.set()

    async def watch_folder(interval_s: float) -> None:
        spawned.append(interval_s)

    engine = SimpleNamespace(spawn=lambda work: asyncio.ensure_future(work))
    policies: Any = SimpleNamespace(engine=engine, folder=tmp_path, reload=reload, watch_folder=watch_folder)
    async with AsyncExitStack() as stack:
        serve.reload_policies(policies, config.load(overrides={"policies.reload_s": "2.5"}), stack)
        os.kill(os.getpid(), signal.SIGHUP)
        async with asyncio.timeout(5):
            await reloaded.wait()
    assert spawned == [2.5]
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
