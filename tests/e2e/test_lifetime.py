"""Nothing outlives a command that was killed, and a signal while the model loads acts at once."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import FLAGS

pytestmark = pytest.mark.e2e
GONE_S = 5.0
SERVE = ["serve", "--listen.port=0", "--listen.metrics_port=0", *(f"--{name}={value}" for name, value in FLAGS.items())]
BENCH = [
    "bench", "engine", "--shape=tiny", "--requests=4", "--new_tokens=800", "--rows=160", "--latents=1024",
    "--eager=true", "--cases=idle",
]  # fmt: skip
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


class Command:
    """A command in a session of its own, whose temporary files are in `temporary`."""

    def __init__(self, arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.log, self.temporary = folder / "log", folder / "t"
        self.temporary.mkdir()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rudder.server", *arguments], stdout=log, stderr=log, start_new_session=True,
                env=os.environ | {"TMPDIR": str(self.temporary)} | environment,
            )  # fmt: skip

    def members(self) -> list[str]:
        """Return the processes of the session that are alive, by command line."""
        processes = []
        for entry in Path("/proc").iterdir():
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(") ")[2].split()[:4]
                if int(session) == self.process.pid and state != "Z":
                    processes.append(f"{entry.name} {(entry / 'cmdline').read_text()[:200]}")
            except (OSError, ValueError):
                continue
        return processes

    def wait_log(self, pattern: str) -> None:
        """Wait for a text in the log."""
        deadline = time.monotonic() + 200
        while not re.search(pattern, self.log.read_text()):
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.05)

    def wait_members(self, count: int) -> None:
        """Wait until the session has so many processes."""
        deadline = time.monotonic() + 200
        while len(self.members()) < count:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < deadline, self.members()
            time.sleep(0.05)

    def assert_gone(self, seconds: float) -> None:
        """Wait until no process of the session is left."""
        deadline = time.monotonic() + seconds
        while left := self.members():
            assert time.monotonic() < deadline, left
            time.sleep(0.05)


@contextmanager
def started(arguments: list[str], folder: Path, environment: dict[str, str] | None = None) -> Iterator[Command]:
    """Start a command; kill whatever is left of its session in the end."""
    command = Command(arguments, folder, environment or {})
    try:
        yield command
    finally:
        for member in command.members():
            os.kill(int(member.split()[0]), signal.SIGKILL)
        command.process.wait()


@pytest.mark.long
def test_killed_server_takes_its_engine_and_workers_along(tmp_path: Path) -> None:
    arguments = [*SERVE, "--engine.tensor_parallel_size=2"]
    with started(arguments, tmp_path, TWO_RANKS) as server:
        server.wait_log("serve: serving ")
        assert len(server.members()) >= 4
        server.process.kill()
        server.assert_gone(GONE_S)


@pytest.mark.parametrize("pattern", ["starting the engine", "Initializing a V1 LLM engine", "Starting to load model"])
def test_killed_server_takes_an_engine_along_that_still_starts(tmp_path: Path, pattern: str) -> None:
    with started(SERVE, tmp_path) as server:
        server.wait_log(pattern)
        server.wait_members(2)
        server.process.kill()
        server.assert_gone(GONE_S)


@pytest.mark.parametrize(
    ("number", "pattern"),
    [
        (signal.SIGINT, "starting the engine"),
        (signal.SIGTERM, "Initializing a V1 LLM engine"),
        (signal.SIGINT, "Starting to load model"),
        pytest.param(signal.SIGTERM, "starting the engine", marks=pytest.mark.long),
        pytest.param(signal.SIGINT, "Initializing a V1 LLM engine", marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, "Starting to load model", marks=pytest.mark.long),
    ],
)
def test_signal_while_the_model_loads_acts_at_once(tmp_path: Path, pattern: str, number: signal.Signals) -> None:
    with started(SERVE, tmp_path) as server:
        server.wait_log(pattern)
        sent = time.monotonic()
        # As a terminal does: every process of the group gets it.
        os.killpg(server.process.pid, number) if number is signal.SIGINT else server.process.send_signal(number)
        assert server.process.wait(10) == 128 + number
        assert time.monotonic() - sent < 2
        server.assert_gone(GONE_S)
        assert "Traceback" not in server.log.read_text()
        # vLLM leaves the files of its sockets, and PyTorch its cache.
        assert list(server.temporary.glob("rudder*")) == []


def test_killed_benchmark_takes_its_engines_along(tmp_path: Path) -> None:
    with started(BENCH, tmp_path) as bench:
        # The benchmark, two sides, two engines, and a resource tracker of each.
        bench.wait_members(6)
        time.sleep(5)
        bench.process.kill()
        bench.assert_gone(GONE_S)


def test_killed_demo_takes_its_server_along(tmp_path: Path) -> None:
    with started(["demo", "--model=small"], tmp_path) as demo:
        children = Path(f"/proc/{demo.process.pid}/task/{demo.process.pid}/children")
        deadline = time.monotonic() + 60
        while not children.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server = int(children.read_text().split()[0])
        time.sleep(3)
        demo.process.kill()
        demo.process.wait()
        deadline = time.monotonic() + GONE_S
        # The server has a session of its own.
        while Path(f"/proc/{server}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
