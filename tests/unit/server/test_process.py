"""A signal ends the start of a server, whatever a thread of it still does."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rudder.server import process
from rudder.server.process import CANCEL_S, Interrupted, server_command, until_signal


def signals(*received: signal.Signals) -> "asyncio.Queue[signal.Signals]":
    queue: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in received:
        queue.put_nowait(number)
    return queue


async def result(seconds: float = 0) -> int:
    await asyncio.sleep(seconds)
    return 7


async def test_work_that_ends_leaves_the_signal_to_others() -> None:
    assert await until_signal(result(), signals()) == 7
    queue = signals(signal.SIGTERM)
    assert await until_signal(result(), queue) == 7
    assert queue.qsize() == 1


async def test_error_of_the_work_is_raised() -> None:
    async def failing() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await until_signal(failing(), signals())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_signal_cancels_the_work(number: signal.Signals, status: int) -> None:
    with pytest.raises(Interrupted) as caught:
        await until_signal(result(60), signals(number))
    assert caught.value.status == status


async def test_work_that_does_not_end_is_not_waited_for() -> None:
    async def stubborn() -> None:
        end = time.monotonic() + 5
        while time.monotonic() < end:
            try:
                await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                continue

    begin = time.monotonic()
    with pytest.raises(Interrupted):
        await until_signal(stubborn(), signals(signal.SIGINT))
    assert time.monotonic() - begin < CANCEL_S + 0.4


SERVE = """
import asyncio, time
from rudder.server import config, serve
from rudder.server.cli import serve as command

async def start(*_):
    print("starting", flush=True)
    await asyncio.to_thread(time.sleep, 60)

serve.start_with_policies = start
raise SystemExit(command.run(config.load(overrides={"listen.port": "0", "listen.metrics_port": "0"})))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_leaves_while_a_thread_still_starts_the_engine(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    command = [sys.executable, "-c", SERVE]
    environment = os.environ | {"TMPDIR": str(tmp_path / "t")}
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline() == "starting\n"
        begin = time.monotonic()
        process.send_signal(number)
        assert process.wait(10) == 128 + number
        assert time.monotonic() - begin < 2
        log = process.stderr.read()
    assert f"{number.name} during the start" in log
    assert "Traceback" not in log
    # PyTorch has a cache there.
    assert list((tmp_path / "t").glob("rudder*")) == []


def test_server_of_a_command_is_a_command_line_that_ends_with_it() -> None:
    """It prints the error of a wrong flag, as `rudder serve` does."""
    result = subprocess.run(server_command("--engine.rowz", "1"), capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.splitlines()) == (
        2, ["rudder: engine.rowz: there is no such field; did you mean engine.rows?"],
    )  # fmt: skip


def test_a_processor_that_others_keep_busy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ticks(busy: int) -> str:
        return f"cpu  {busy} 0 0 1000 500 0 0 0 0 0\n"

    texts = iter([ticks(0), ticks(os.sysconf("SC_CLK_TCK"))])
    stat = tmp_path / "stat"
    stat.touch()
    monkeypatch.setattr(process, "STAT", stat)
    monkeypatch.setattr(Path, "read_text", lambda _: next(texts))
    # One second of the processor in half a second, less what this process took.
    monkeypatch.setattr(time, "process_time", lambda: 0.0)
    assert process.busy_message(0.5).startswith("other processes keep 2.0 of ")


def test_an_idle_processor_is_not_mentioned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stat").write_text("cpu  7 0 0 1000 500 0 0 0 0 0\n")
    monkeypatch.setattr(process, "STAT", tmp_path / "stat")
    assert process.busy_message(0.0001) == ""
    monkeypatch.setattr(process, "STAT", tmp_path / "nowhere")
    assert process.busy_message(0.0001) == ""
