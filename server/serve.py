"""A server from its configuration to its exit: engine, self-test, doors, drain."""

import asyncio
import gc
import hashlib
import logging
import signal
import time
from contextlib import AsyncExitStack
from typing import Any, Protocol

from prometheus_client import REGISTRY

from rudder.server import __version__, unsafe
from rudder.server import config as configuration
from rudder.server.config import Config
from rudder.server.engine import adapter, selftest
from rudder.server.engine.engine import Engine
from rudder.server.grpc.health import HealthListener
from rudder.server.grpc.server import GrpcDoor
from rudder.server.http.server import HttpDoor
from rudder.server.monitoring import logs
from rudder.server.monitoring.exposition import serve_metrics
from rudder.server.monitoring.logs import fields
from rudder.server.monitoring.metrics import LATENCY_BOUNDS, TOKEN_BOUNDS, Metrics
from rudder.server.monitoring.spans import Spans
from rudder.server.process import Interrupted, busy_message, stop_signals, until_signal
from rudder.server.safety.audit.trail import Trail, open_trail
from rudder.server.safety.start import start_with_policies
from rudder.server.safety.store import PolicyStore
from rudder.server.service.auditing import audit_changes
from rudder.server.service.serving import Serving

HEALTH_CHECK_S = 1.0
# Calls fail by themselves when the engine dies or telemetry is lost: time for their answers to leave.
FAILED_ANSWERS_S = 5.0

logger = logging.getLogger(__name__)


class Door(Protocol):
    """A transport through which clients call: gRPC, or another in the same process."""

    name: str

    async def start(self) -> str:
        """Listen, not serving yet, and return the address."""

    async def set_serving(self, serving: bool) -> None:
        """Tell health checks and load balancers whether to route calls here."""

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, and abort those that still run after `grace_s`. May be called again with less grace."""


async def serve(config: Config) -> int:
    """Start, serve until SIGTERM, SIGINT or the engine's death, drain; return the exit status.

    A signal during the start gives up the start, and the status is 128 and its number; a thread may still load the
    model then. The engine is stopped in whatever way this ends.
    """
    with logs.configured(config.logs.format, config.logs.level):
        try:
            async with AsyncExitStack() as stack:
                died = await run_server(config, stack)
        except Interrupted as interrupted:
            logger.info("stopped", extra=fields(reason=f"{interrupted} during the start"))
            return interrupted.status
        except Exception as error:
            logger.error("the server failed", extra=fields(error=f"{type(error).__name__}: {error}"))
            raise
        logger.info("stopped", extra=fields(reason="engine died" if died else "signal"))
    return int(died)


async def run_server(config: Config, stack: AsyncExitStack) -> bool:
    """Start, serve and drain, with the clean-up of each part on `stack`; return whether the engine died."""
    stop = stop_signals()
    log_start(config)
    metrics = metrics_of(config.monitoring)
    note_unsafe(config, metrics)
    trail = await open_audit(config, metrics, stack)
    engine, policies = await until_signal(start_tested_engine(config, metrics, stack), stop)
    if trail:
        audit_changes(trail, policies)
    metrics.built(__version__, adapter.VLLM_VERSION, engine.model.name)
    serving = Serving.around(engine, config, metrics, policies, trail)
    stack.callback(serving.tokenizers.shutdown)
    if config.monitoring.traces_endpoint:
        serving.spans = Spans(config.monitoring.traces_endpoint, config.monitoring.traces_share, __version__)
        stack.callback(serving.spans.close)
    # Everything so far lives as long as the process: keep the garbage collector from walking it again and again.
    gc.freeze()
    stack.callback(gc.unfreeze)
    metrics_host = config.listen.metrics_host or config.listen.host
    metrics_server = serve_metrics(REGISTRY, config.listen.metrics_port, metrics_host)
    stack.callback(metrics_server.shutdown)
    grpc_door = GrpcDoor(serving)
    doors: list[Door] = [grpc_door]
    if config.listen.http_port is not None:
        doors.append(HttpDoor(serving))
    addresses = {}
    for door in doors:
        stack.push_async_callback(door.stop, 0)
        addresses[door.name] = await door.start()
    if config.listen.health_port is not None:
        # No door: it answers until the drain has ended.
        probes = HealthListener(grpc_door.health, config.listen)
        stack.push_async_callback(probes.stop)
        addresses["health"] = await probes.start(config.listen.health_port)
    reload_policies(policies, config, stack)
    await set_serving(doors, engine.healthy)
    metrics_address = config.listen.metrics_address(metrics_server.server_port)
    logger.info("serving", extra=fields(model=engine.model.name, **addresses, metrics=metrics_address))
    await serve_until_stopped(doors, serving, stop)
    return not engine.healthy


def metrics_of(monitoring: configuration.Monitoring) -> Metrics:
    """Return the series of this process."""
    return Metrics.create(
        REGISTRY,
        max_series=monitoring.max_series,
        latency_bounds=monitoring.latency_bounds_s or LATENCY_BOUNDS,
        token_bounds=monitoring.token_bounds_s or TOKEN_BOUNDS,
    )


def note_unsafe(config: Config, metrics: Metrics) -> None:
    """Log and export what the server starts in spite of."""
    for name in unsafe.check(config):
        logger.warning("the server starts in spite of what is unsafe", extra=fields(allowed=name))
        metrics.allowed_unsafe(name)


async def open_audit(config: Config, metrics: Metrics, stack: AsyncExitStack) -> Trail | None:
    """Open the audit log of the configuration, to be closed by `stack` after all else; warn if it has none."""
    trail = await asyncio.to_thread(open_trail, config.audit, metrics)
    if trail:
        stack.callback(trail.close)
        logger.info("audit log opened", extra=fields(folder=config.audit.folder, entries=trail.log.end.count))
    elif config.policies.folder:
        logger.warning("policies are in force without an audit log: audit.folder is null")
    return trail


def reload_policies(policies: PolicyStore, config: Config, stack: AsyncExitStack) -> None:
    """Read the policies again on SIGHUP and, if so configured, whenever a file has changed."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, lambda: policies.engine.spawn(policies.reload()))
    stack.callback(loop.remove_signal_handler, signal.SIGHUP)
    if policies.folder and config.policies.reload_s:
        policies.engine.spawn(policies.watch_folder(config.policies.reload_s))


async def start_tested_engine(config: Config, metrics: Metrics, stack: AsyncExitStack) -> tuple[Engine, PolicyStore]:
    """Start the engine with its policies, to be stopped by `stack`, and run its self-test."""
    engine, policies = await start_with_policies(config, metrics)
    stack.push_async_callback(engine.stop)
    log_engine(engine)
    await run_self_test(engine)
    return engine, policies


async def run_self_test(engine: Engine) -> None:
    """Run the self-test, which must pass before anything is served."""
    started = time.monotonic()
    await selftest.run(engine)
    sites = engine.registry.layout.sites
    logger.info("self-test passed", extra=fields(sites=sites, seconds=round(time.monotonic() - started, 3)))


async def serve_until_stopped(doors: list[Door], serving: Serving, stop: "asyncio.Queue[signal.Signals]") -> None:
    """Wait for a signal or the engine's death; then say NOT_SERVING, soon refuse new calls, and let running ones end.

    A second signal aborts them.
    """
    first_signal = asyncio.ensure_future(stop.get())
    await serve_while_healthy(doors, serving.engine, first_signal)
    await set_serving(doors, False)
    second_signal = asyncio.ensure_future(stop.get())
    listen, healthy = serving.config.listen, serving.engine.healthy
    if not healthy:
        log_death(serving.engine)
    received = first_signal.result() if first_signal.done() else None
    # Load balancers learn of SIGTERM later than this process does; SIGINT comes from a terminal, without one.
    accept_s = listen.accept_s if healthy and received is signal.SIGTERM else 0
    if accept_s:
        logger.info("accepting calls until load balancers have noticed", extra=fields(seconds=accept_s))
    await asyncio.wait([second_signal], timeout=accept_s)
    serving.draining = True
    grace_s = listen.drain_s if healthy else FAILED_ANSWERS_S
    await drain(doors, serving, 0 if second_signal.done() else grace_s, second_signal)
    for task in (first_signal, second_signal):
        task.cancel()


async def serve_while_healthy(doors: list[Door], engine: Engine, until: "asyncio.Future[signal.Signals]") -> None:
    """Wait for a signal or the engine's death. While the engine is stalled, the doors say NOT_SERVING."""
    stalled = False
    while not until.done() and engine.healthy:
        if engine.stalled != stalled:
            stalled = engine.stalled
            await set_serving(doors, not stalled)
        await asyncio.wait([until], timeout=HEALTH_CHECK_S)


async def drain(doors: list[Door], serving: Serving, grace_s: float, abort: "asyncio.Future[signal.Signals]") -> None:
    """Stop all doors. Calls may run for `grace_s`, or until `abort`; then they fail with DRAINING."""
    started = time.monotonic()
    logger.info("drain begins", extra=fields(grace_s=grace_s))
    stopping = asyncio.ensure_future(stop_doors(doors, grace_s + FAILED_ANSWERS_S))
    waited: list[asyncio.Future[Any]] = [stopping, abort]
    await asyncio.wait(waited, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
    serving.abort()
    await asyncio.wait([stopping], timeout=FAILED_ANSWERS_S)
    await stop_doors(doors, 0)
    await stopping
    logger.info("drain ended", extra=fields(seconds=round(time.monotonic() - started, 3), aborted=abort.done()))


async def stop_doors(doors: list[Door], grace_s: float) -> None:
    """Stop all doors at once."""
    await asyncio.gather(*(door.stop(grace_s) for door in doors))


async def set_serving(doors: list[Door], serving: bool) -> None:
    """Set the health of all doors."""
    for door in doors:
        await door.set_serving(serving)


def log_start(config: Config) -> None:
    """Log what is about to start."""
    digest = hashlib.sha256(configuration.show(config).encode()).hexdigest()[:16]
    values = fields(config=digest, model=config.engine.model, bundles=config.engine.bundles)
    logger.info("starting the engine", extra=values)
    if adapter.runs_on_cpu(config.engine.device) and (message := busy_message()):
        logger.warning(message)


def log_engine(engine: Engine) -> None:
    """Log what the engine loaded: model, sites, bundles and programs, each by its hash."""
    model, layout = engine.model, engine.registry.layout
    values = fields(model=model.name, model_sha256=model.sha256, sites=layout.sites, epoch=engine.epoch)
    logger.info("engine started", extra=values)
    for bundle in engine.bundles.values():
        manifest = bundle.manifest
        values = fields(bundle=manifest.name, sha256=bundle.sha256, site=manifest.site, latents=manifest.latents)
        logger.info("bundle loaded", extra=values)
    for name, program in engine.programs.items():
        logger.info("program loaded", extra=fields(program=name, digest=program.compiled.digest))


def log_death(engine: Engine) -> None:
    """Log why the engine can serve no more."""
    if engine.hub.lost:
        logger.error("telemetry lost", extra=fields(cause=str(engine.hub.lost)))
    else:
        logger.error("the engine died")
