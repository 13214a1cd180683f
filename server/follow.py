"""A machine that follows: the ranks of a model that another machine serves (engine.nodes), from start to exit."""

import asyncio
import logging
import socket
from contextlib import AsyncExitStack
from math import inf

from rudder.server.config import Config, Engine
from rudder.server.engine import adapter
from rudder.server.engine.start import layout_of, load_bundles
from rudder.server.grpc.health import Health, HealthListener
from rudder.server.monitoring import logs
from rudder.server.monitoring.logs import fields
from rudder.server.process import stop_signals

LEADER_CHECK_S, CONNECT_S = 2.0, 2.0
# A leader that does not answer so often has ended.
MISSED_CHECKS = 3
# Reason of an end that was asked for.
STOPPED = "signal"

logger = logging.getLogger(__name__)


async def follow(config: Config) -> int:
    """Run this machine's ranks as long as machine 0 serves; return the exit status, which is 0 only after a signal.

    It takes no calls, and all machines get SIGTERM together: so after it, machine 0 has the time of its drain. The
    process must then `leave`, since the thread that runs the ranks never ends by itself.
    """
    with logs.configured(config.logs.format, config.logs.level):
        async with AsyncExitStack() as stack:
            stop = stop_signals()
            await serve_liveness(config, stack)
            values = fields(node_rank=config.engine.node_rank, leader=leader_of(config.engine))
            logger.info("starting the ranks of this machine", extra=values)
            ranks = asyncio.ensure_future(asyncio.to_thread(run_ranks, config))
            reason = await end_of(ranks, asyncio.ensure_future(stop.get()), config)
            logger.info("stopped", extra=fields(reason=reason))
            return int(reason != STOPPED)


async def end_of(ranks: "asyncio.Future[None]", signalled: "asyncio.Future[object]", config: Config) -> str:
    """Wait until the ranks end, the leader is gone, or a signal has had its time; return which."""
    listen, clock = config.listen, asyncio.get_running_loop().time
    misses, met, deadline = 0, False, inf
    while not ranks.done():
        await asyncio.wait([ranks], timeout=LEADER_CHECK_S)
        there = await asyncio.to_thread(is_there, config.engine)
        met, misses = met or there, 0 if there else misses + 1
        if signalled.done():
            deadline = min(deadline, clock() + listen.accept_s + listen.drain_s if met else 0)
        gone = met and misses >= MISSED_CHECKS
        if gone or clock() >= deadline:
            return STOPPED if signalled.done() else "the leader is gone"
    ranks.result()
    return STOPPED if signalled.done() else "a rank ended"


async def serve_liveness(config: Config, stack: AsyncExitStack) -> None:
    """Answer health checks: alive, and never ready, as no call is for this machine."""
    if config.listen.health_port is None:
        return
    state = Health(())
    await state.set(ready=False, alive=True)
    listener = HealthListener(state, config.listen)
    stack.push_async_callback(listener.stop)
    logger.info("serving health", extra=fields(health=await listener.start(config.listen.health_port)))


def run_ranks(config: Config) -> None:
    """Load the bundles, as machine 0 does, and run the ranks. Blocks until one of them ends."""
    adapter.run_follower(config, layout_of(config, load_bundles(config)))


def is_there(engine: Engine) -> bool:
    """Return whether the leader still listens where the ranks have met."""
    try:
        socket.create_connection((engine.leader_address, engine.leader_port), CONNECT_S).close()
    except OSError:
        return False
    return True


def leader_of(engine: Engine) -> str:
    """Return the address of the leader, for the log."""
    return f"{engine.leader_address}:{engine.leader_port}"
