"""Processes that end with their parent: an engine must not keep its memory when its server was killed.

The kernel sends SIGKILL (prctl(2), PR_SET_PDEATHSIG). A thread also compares the parent's process id, since the kernel
says nothing of a parent that ended before it was asked.
"""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pkgutil import resolve_name
from typing import Any

PR_SET_PDEATHSIG = 1
# Time for a process that has failed to end by itself. It waits for its threads, and one may wait for ever: then whoever
# watches for its end would, too.
LEAVE_S = 10.0
CHECK_S = 0.5


@cache
def end_with_parent(parent: int) -> None:
    """Kill this process as soon as process `parent`, which started it, has ended.

    The kernel counts the thread that started this process as its parent: start it from one that lives as long as it.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=watch_parent, args=(parent,), name="rudder-parent", daemon=True).start()


def watch_parent(parent: int) -> None:
    """Wait until this process has another parent, then kill it."""
    while os.getppid() == parent:
        time.sleep(CHECK_S)
    os.kill(os.getpid(), signal.SIGKILL)


class Target:
    """A function to run in a process of `multiprocessing`, which ends with its parent, and soon after an exception.

    `errors` receives the text of an exception that ends the function.
    """

    def __init__(self, function: Callable[..., Any], errors: Connection | None = None) -> None:
        self.function, self.errors = function, errors

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Run the function."""
        parent = parent_process()
        if parent:
            end_with_parent(parent.pid or os.getppid())
        try:
            self.function(*args, **kwargs)
        except Exception as error:
            if parent:
                leave_soon(LEAVE_S)
            # After the start, the parent no longer listens.
            with suppress(OSError):
                if self.errors:
                    self.errors.send(text_of(error))
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        """Unpickle in two steps: the first one, before vLLM is imported for the function, sets the process up."""
        name = f"{self.function.__module__}:{self.function.__qualname__}"
        return new_target, (os.getpid(),), {"name": name, "errors": self.errors}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # By name: pickle would refuse a function of vLLM that a target has replaced for the time of the start.
        self.__init__(resolve_name(state["name"]), state["errors"])  # type: ignore[misc]


def leave_soon(seconds: float) -> None:
    """Let this process end within so many seconds, whatever its threads do."""
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()


def new_target(parent: int) -> Target:
    """Return a target without its attributes, in a process that from now on ends with `parent`.

    It has a process group of its own: vLLM's engine would abort all requests at a signal that a terminal or a service
    manager sends to the parent's group. The parent decides what a signal means.
    """
    os.setpgid(0, 0)
    end_with_parent(parent)
    return Target.__new__(Target)


def text_of(error: BaseException) -> str:
    """Return the type and message of an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
