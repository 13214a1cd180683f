"""One real server process for all end-to-end tests: the shipped model and bundle, in float32 so that texts compare."""

import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rudder.server.process import free_port, stop
from rudder_client import AsyncClient, Client, RudderError

WRITE_TIMEOUT_S = 3
WATCHED = (7, 12)
FLAGS = {
    "engine.enforce_eager": "true",
    "engine.dtype": "float32",
    "engine.kv_cache_memory_bytes": str(256 << 20),
    "limits.write_timeout_s": str(WRITE_TIMEOUT_S),
    "limits.queue": "100",
    "listen.accept_s": "0",
    "policies.stages": "1",
    "policies.allow_apply": "true",
    "policies.allow_uncertified": "true",
    "watch": f"[{', '.join(f'{{index: {index}}}' for index in WATCHED)}]",
}


@dataclass(frozen=True)
class Running:
    """A server process, its addresses and its log file."""

    process: "subprocess.Popen[bytes]"
    port: int
    metrics_port: int
    log: Path
    http_port: int

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.http_port}/v1"

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of the samples with these labels."""
        text = urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics").read().decode()
        samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    def log_line(self, pattern: str, seconds: float = 5) -> str:
        """Wait for a line of the log in which `pattern` (a regular expression) matches, and return it."""
        deadline = time.monotonic() + seconds
        while True:
            for line in self.log.read_text().splitlines():
                if re.search(pattern, line):
                    return line
            assert time.monotonic() < deadline, f"no line of the log matches {pattern}"
            time.sleep(0.1)

    def held(self) -> tuple[float, ...]:
        """Return slots, choices, waiting requests, what vLLM runs, and rows beyond those pinned by `watch`."""
        return (
            self.metric("rudder_bank_slots", state="used"),
            self.metric("rudder_inflight_choices"),
            self.metric("rudder_queue_requests"),
            self.metric("vllm:num_requests_running"),
            self.metric("vllm:num_requests_waiting"),
            self.metric("rudder_bank_rows", state="used") - len(WATCHED),
        )

    def wait_idle(self, seconds: float = 10) -> None:
        """Wait until no request holds anything; fail after `seconds`."""
        deadline = time.monotonic() + seconds
        while any(self.held()):
            assert time.monotonic() < deadline, f"still held: {self.held()}"
            time.sleep(0.1)


@contextmanager
def running(folder: Path, module: str = "rudder.server", **flags: str) -> Iterator[Running]:
    """Run a server with these flags beside FLAGS, once it serves; stop it on exit.

    It has a process group of its own, to which a test can send signals.
    """
    names = ("listen.port", "listen.metrics_port", "listen.http_port")
    ports = {name: str(free_port()) for name in names}
    arguments = [f"--{name}={value}" for name, value in {**FLAGS, **ports, **flags}.items()]
    log = folder / "server.log"
    with log.open("wb") as out:
        command = [sys.executable, "-m", module, "serve", *arguments]
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
    port, metrics_port, http_port = (int(ports[name]) for name in names)
    server = Running(process, port, metrics_port, log, http_port)
    try:
        wait_serving(server)
        yield server
    finally:
        stop(process)


def wait_serving(server: Running) -> None:
    """Wait until health says SERVING; fail with the end of the log if the server exits."""
    deadline = time.monotonic() + 300
    with Client(server.address) as client:
        while True:
            try:
                return client.wait_ready(timeout=1)
            except RudderError:
                assert server.process.poll() is None, server.log.read_text()[-4000:]
                assert time.monotonic() < deadline, server.log.read_text()[-4000:]


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture
def client(server: Running) -> Iterator[Client]:
    with Client(server.address, timeout=60) as connected:
        yield connected
    server.wait_idle()


@pytest.fixture
async def aclient(server: Running) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address, timeout=120) as connected:
        yield connected
    server.wait_idle()
