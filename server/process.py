"""Processes and ports: stop signals of this process, free ports, a server as a child process."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rich.console import Console

from rudder.server.config import ConfigError, Listen, address_of
from rudder_client import Client, RudderError

STARTED_S, STOPPED_S = 600.0, 60.0
SIGNAL_CHECK_S, CANCEL_S = 0.1, 1.5
# Exit status of a process that a signal ended, less the signal's number, as shells count it.
FIRST_SIGNAL_STATUS = 128
STAT, BUSY_CORES = Path("/proc/stat"), 0.5
SERVER = """
import sys
from rudder.server.engine.parent import end_with_parent
end_with_parent(int(sys.argv.pop(1)))
from rudder.server.cli import main
sys.exit(main(["serve", *sys.argv[1:]]))
"""
T = TypeVar("T")

err = Console(stderr=True, highlight=False, soft_wrap=True)


def stop_signals() -> "asyncio.Queue[signal.Signals]":
    """Return a queue of the SIGTERM and SIGINT that this process receives from now on."""
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    return signals


class Interrupted(Exception):
    """A signal ended the start of a server, of which a thread may still run. `status`: exit status of the process."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received.name)
        self.status = FIRST_SIGNAL_STATUS + received


async def until_signal(work: Coroutine[Any, Any, T], signals: "asyncio.Queue[signal.Signals]") -> T:
    """Run `work`, and cancel it when a signal arrives, which stays in the queue otherwise. Raises Interrupted."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait([task], timeout=SIGNAL_CHECK_S))[0]:
            if not signals.empty():
                task.cancel()
                await asyncio.wait([task], timeout=CANCEL_S)
                if task.done() and not task.cancelled():
                    task.exception()
                raise Interrupted(signals.get_nowait())
        return await task
    finally:
        task.cancel()


def leave(status: int) -> NoReturn:
    """Exit without waiting for threads, which may still start an engine: its process ends with this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def server_command(*arguments: str) -> list[str]:
    """Return the command of `rudder serve` as a child of this process, which ends with it."""
    return [sys.executable, "-c", SERVER, str(os.getpid()), *arguments]


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def require_free(listen: Listen) -> None:
    """Raise ConfigError if the server cannot listen on its ports: better now than after the engine's start."""
    require_distinct(listen)
    for field, host_field in ports(listen).items():
        require_bindable(f"listen.{host_field}", getattr(listen, host_field), f"listen.{field}", getattr(listen, field))


def require_distinct(listen: Listen) -> None:
    """Raise ConfigError if two listeners of this server have the same address."""
    taken = dict[tuple[str, int], str]()
    for field, host_field in ports(listen).items():
        address = getattr(listen, host_field), getattr(listen, field)
        if address[1] and address in taken:
            raise ConfigError(f"listen.{field}", f"{address[1]} is {taken[address]} too")
        taken[address] = f"listen.{field}"


def ports(listen: Listen) -> dict[str, str]:
    """Return the field of each port that the server listens on, with the field of its host."""
    hosts = {"port": "host", "metrics_port": "metrics_host" if listen.metrics_host else "host"}
    return hosts | {field: "host" for field in ("health_port", "http_port") if getattr(listen, field) is not None}


def require_bindable(host_field: str, host: str, port_field: str, port: int) -> None:
    """Raise ConfigError, which names one of the fields, if nothing can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        # A name that is no host name, or cannot be encoded.
        except (socket.gaierror, TypeError, ValueError) as error:
            raise ConfigError(host_field, f"{host!r}: {error}") from error
        except OSError as error:
            problem = f"cannot listen on {address_of(host, port)}: {error.strerror}"
            raise ConfigError(port_field, problem) from error


def busy_message(seconds: float = 0.25) -> str:
    """Return a line that says how busy other processes keep the processor, "" if they leave it alone.

    The threads of a model wait for each other at every operator: one that shares its core holds up all.
    """
    others = other_cores(seconds)
    if others < BUSY_CORES:
        return ""
    return f"other processes keep {others:.1f} of {os.cpu_count()} cores busy: the model may be many times slower"


def other_cores(seconds: float) -> float:
    """Return how many cores other processes take, measured for `seconds`; 0 where /proc/stat does not tell."""

    def busy() -> float:
        # Ticks of user, nice, system, idle, iowait, irq, softirq, steal.
        ticks = [int(word) for word in STAT.read_text().split()[1:9]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK") - time.process_time()

    if not STAT.is_file():
        return 0.0
    before = busy()
    time.sleep(seconds)
    return max(busy() - before, 0.0) / seconds


def wait_serving(process: "subprocess.Popen[bytes]", address: str) -> None:
    """Wait until the server serves. Raises RudderError if it exits, or after STARTED_S."""
    started = time.monotonic()
    with Client(address) as client, err.status("starting the server") as status:
        while True:
            try:
                client.wait_ready(timeout=1.0)
                return
            except RudderError:
                seconds = time.monotonic() - started
                if process.poll() is not None or seconds > STARTED_S:
                    raise
                status.update(f"starting the server: {seconds:.0f} s")


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Stop a server with SIGINT, as a terminal does; kill it after STOPPED_S."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOPPED_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
