"""A machine that follows ends with its ranks or its leader, and outlives its leader's drain after a signal."""

import asyncio
import signal
import socket
from collections.abc import Iterator

import pytest

from rudder.server import config, follow


@pytest.fixture
def leader() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "LEADER_CHECK_S", 0.01)


def of(leader: socket.socket, drain_s: float = 1000) -> config.Config:
    engine = config.Engine(nodes=2, node_rank=1, tensor_parallel_size=2, leader_port=leader.getsockname()[1])
    return config.Config(engine=engine, listen=config.Listen(accept_s=0, drain_s=drain_s))


def pending() -> "asyncio.Future[None]":
    return asyncio.get_running_loop().create_future()


def received() -> "asyncio.Future[object]":
    future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    future.set_result(signal.SIGTERM)
    return future


async def test_it_follows_as_long_as_the_leader_is_there(leader: socket.socket) -> None:
    waiting = asyncio.ensure_future(follow.end_of(pending(), asyncio.Future(), of(leader)))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    leader.close()
    async with asyncio.timeout(20):
        assert await waiting == "the leader is gone"


async def test_it_waits_for_a_leader_that_is_still_to_come() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        configuration = of(free)
    waiting = asyncio.ensure_future(follow.end_of(pending(), asyncio.Future(), configuration))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    waiting.cancel()


async def test_a_signal_before_it_has_met_the_leader_ends_it_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        configuration = of(free)
    async with asyncio.timeout(20):
        assert await follow.end_of(pending(), received(), configuration) == follow.STOPPED


async def test_after_a_signal_it_stays_until_the_leader_has_drained(leader: socket.socket) -> None:
    waiting = asyncio.ensure_future(follow.end_of(pending(), received(), of(leader)))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    leader.close()
    async with asyncio.timeout(20):
        assert await waiting == follow.STOPPED


async def test_a_leader_that_does_not_end_has_the_time_of_its_drain(leader: socket.socket) -> None:
    async with asyncio.timeout(20):
        assert await follow.end_of(pending(), received(), of(leader, drain_s=0.1)) == follow.STOPPED


async def test_ranks_that_end_or_fail_end_it(leader: socket.socket) -> None:
    ended, failed = pending(), pending()
    ended.set_result(None)
    failed.set_exception(ValueError("no device"))
    assert await follow.end_of(ended, asyncio.Future(), of(leader)) == "a rank ended"
    with pytest.raises(ValueError, match="no device"):
        await follow.end_of(failed, asyncio.Future(), of(leader))
