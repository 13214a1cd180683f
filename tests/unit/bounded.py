"""Reading what may be hostile: within a time and a memory, or refused."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rudder.sae_models.formats.source import FormatError

SECONDS = 5.0
MEMORY = 96 << 20


def peak() -> int:
    """The most memory that the process has held since `forget_peak`, in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))


def forget_peak() -> None:
    """Starts `peak` anew."""
    Path("/proc/self/clear_refs").write_text("5")


def attempt(read: Callable[[Path], Any], path: Path) -> Any:
    """What is read, or the FormatError, within time and memory; anything else raised fails the test."""
    forget_peak()
    before, began = peak(), time.process_time()
    try:
        found = read(path)
    except FormatError as error:
        found = error
    assert time.process_time() - began < SECONDS
    assert peak() - before < MEMORY
    return found


def refused(read: Callable[[Path], Any], path: Path) -> str:
    """The message of the FormatError, which names the file."""
    found = attempt(read, path)
    assert isinstance(found, FormatError), found
    assert path.name in str(found)
    return str(found)
