"""A server from its configuration to its exit: engine, self-test, doors, and how it leaves."""

import asyncio
import gc
import logging
import signal

import grpc
from grpc_health.v1 import health
from prometheus_client import start_http_server

from rudder.server.config import Config
from rudder.server.engine import selftest
from rudder.server.engine.start import start_engine
from rudder.server.grpc.server import build, serving_of, set_health
from rudder.server.process import stop_signals
from rudder.server.service.serving import Serving

HEALTH_CHECK_S = 1.0

logger = logging.getLogger(__name__)


async def serve(config: Config) -> int:
    """Start, serve until SIGTERM or SIGINT or the engine's end, and leave; the exit status."""
    stop = stop_signals()
    logger.info("starting the engine with %s", config.engine.model)
    engine = await start_engine(config)
    await selftest.run(engine)
    serving = serving_of(config, engine)
    server, port, checks = await build(serving)
    # What is there now stays: collecting garbage is not to walk through it again and again.
    gc.freeze()
    metrics_server, _ = start_http_server(config.listen.metrics_port, config.listen.host)
    await server.start()
    await set_health(checks, serving=engine.healthy)
    where = f"{config.listen.host}:{port}"
    logger.info("serving %s on %s, metrics on port %d", engine.model.name, where, metrics_server.server_port)
    await leave_when_told(server, checks, serving, stop)
    died = not engine.healthy
    gc.unfreeze()
    metrics_server.shutdown()
    await engine.stop()
    serving.tokenizing.shutdown(wait=False)
    logger.info("left%s", ": the engine died" if died else "")
    return int(died)


async def leave_when_told(
    server: grpc.aio.Server, checks: health.aio.HealthServicer, serving: Serving, stop: "asyncio.Queue[signal.Signals]"
) -> None:
    """Wait for a signal or the engine's end; say NOT_SERVING, soon take no new calls, and let running ones finish.

    A second signal ends them at once.
    """
    told = asyncio.ensure_future(stop.get())
    while not told.done() and serving.engine.healthy:
        await asyncio.wait([told], timeout=HEALTH_CHECK_S)
    await set_health(checks, serving=False)
    again = asyncio.ensure_future(stop.get())
    listen, healthy = serving.config.listen, serving.engine.healthy
    # Whoever routes calls here learns of it later than this process does; nobody routes to a terminal's server.
    routed = healthy and told.done() and told.result() is signal.SIGTERM
    await asyncio.wait([again], timeout=listen.accept_s if routed else 0)
    serving.draining = True
    grace = listen.drain_s if healthy and not again.done() else 0
    logger.info("leaving; running requests have %g s", grace)
    stopping = asyncio.ensure_future(server.stop(grace))
    await asyncio.wait([stopping, again], return_when=asyncio.FIRST_COMPLETED)
    await server.stop(0)
    for task in (told, again):
        task.cancel()
