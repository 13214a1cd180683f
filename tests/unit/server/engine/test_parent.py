"""Processes end with their parent, however it ends, from their first moment on; a target reports its error."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rudder.server.engine import parent
from rudder.server.engine.parent import Target, text_of

# A process with a child that would run for minutes; it prints the child's process id and waits.
PARENT = """
import multiprocessing, sys, time
from rudder.server.engine.parent import Target

if __name__ == "__main__":
    child = multiprocessing.get_context(sys.argv[1]).Process(target=Target(time.sleep), args=(120,))
    child.start()
    print(child.pid, flush=True)
    time.sleep(float(sys.argv[2]))
    print("ready", flush=True)
    time.sleep(120)
"""


def exists(process: int) -> bool:
    """Return whether a process is left that is not a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


def assert_ends(process: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while exists(process):
        assert time.monotonic() < deadline, f"process {process} is left"
        time.sleep(0.05)


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.parametrize("after_s", [0.0, 2.0])
def test_child_ends_with_a_killed_parent(method: str, after_s: float, tmp_path: Path) -> None:
    """After 0 s the child is still starting; after 2 s it runs."""
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py"), method, str(after_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        parent.stdout.readline()
        parent.kill()
        assert_ends(child, 10)


def test_child_of_a_parent_that_ended_before_it_asked() -> None:
    script = (
        "from rudder.server.engine.parent import end_with_parent\nend_with_parent(1 << 22)\nimport time; time.sleep(60)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=30, check=False).returncode == -signal.SIGKILL


def test_child_outlives_a_parent_that_it_was_not_tied_to() -> None:
    """The tests above would pass with any child that a killed parent takes along."""
    script = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, text=True) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        parent.kill()
    time.sleep(1)
    assert exists(child)
    os.kill(child, signal.SIGKILL)


def fail() -> None:
    raise ValueError("no\nroom")


def test_error_of_a_child_is_sent_in_one_line() -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("spawn").Process(target=Target(fail, sender))
    child.start()
    child.join(30)
    assert child.exitcode == 1
    assert receiver.recv() == "ValueError: no room"


def test_error_after_the_parent_stopped_listening_is_the_child_s_own() -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    receiver.close()
    with pytest.raises(ValueError, match="room"):
        Target(fail, sender)()


def test_text_of_an_error_without_message() -> None:
    assert text_of(MemoryError()) == "MemoryError"


def fails_while_a_thread_waits() -> None:
    """Raise, in a process whose end waits for a thread."""
    threading.Thread(target=threading.Event().wait).start()
    raise ValueError("no kernel")


def test_a_process_that_fails_ends_though_its_threads_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent, "LEAVE_S", 0.5)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    target = Target(fails_while_a_thread_waits, sender)
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(30)
    assert process.exitcode == 1
    assert receiver.recv() == "ValueError: no kernel"
