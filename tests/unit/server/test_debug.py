"""`rudder debug ledger` over a real door: what is held is shown, and `--wait` says whether it is nothing."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from rudder.server.cli import debug
from rudder.server.grpc.server import GrpcDoor
from rudder.server.program import wire
from rudder.server.service.serving import Serving
from tests.fuzz.process import serving_without_engine


@pytest.fixture(scope="module")
def serving() -> Serving:
    return serving_without_engine()


@pytest.fixture
async def address(serving: Serving) -> AsyncIterator[str]:
    door = GrpcDoor(serving)
    door.listen = type(door.listen)(port=0)
    yield await door.start()
    await door.stop(0)


async def test_ledger_of_a_server_without_calls_is_empty(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert await asyncio.to_thread(debug.main, ["ledger", "--wait", "10", "--address", address]) == 0
    shown = capsys.readouterr().out
    assert "worker_leases" in shown
    assert "resident_bytes" in shown


async def test_ledger_shows_a_lease_and_fails_while_it_is_held(
    serving: Serving, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    admission = serving.engine.admission
    await admission.acquire(10**6, wire.Request(1, 4, True))
    assert await asyncio.to_thread(debug.main, ["ledger", "--wait", "0.1", "--address", address]) == 1
    assert await asyncio.to_thread(debug.main, ["ledger", "--address", address]) == 0
    assert any(line.split() == ["│", "leases", "│", "1", "│"] for line in capsys.readouterr().out.splitlines())
    admission.release(10**6)
    assert await asyncio.to_thread(debug.main, ["ledger", "--wait", "10", "--address", address]) == 0
