"""Load hostile input within limits of time and memory."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rudder.sae_models.formats.source import FormatError

SECONDS = 5.0
MEMORY = 96 << 20


def peak() -> int:
    """Return the peak resident memory of the process since `reset_peak`, in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))


def reset_peak() -> None:
    """Reset the peak resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def attempt(load: Callable[[Path], Any], path: Path) -> Any:
    """Return the loaded object or the FormatError, within time and memory limits; propagate other exceptions."""
    reset_peak()
    before, start = peak(), time.process_time()
    try:
        result = load(path)
    except FormatError as error:
        result = error
    assert time.process_time() - start < SECONDS
    assert peak() - before < MEMORY
    return result


def refused(load: Callable[[Path], Any], path: Path) -> str:
    """Return the message of the FormatError; assert that it names the file."""
    result = attempt(load, path)
    assert isinstance(result, FormatError), result
    assert path.name in str(result)
    return str(result)
