"""`worker_cls` for asynchronous scheduling on a CPU, where vLLM disables it: stubs for the parts of torch.cuda it uses.

A CPU computes in order, so there is nothing to wait for. Scheduler, queue of steps and model runner are vLLM's own.
"""

from contextlib import nullcontext
from typing import Any

import torch

from rudder.server.engine.worker.cpu import Worker as Worker


class Event:
    """An event that has already occurred."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        """Nothing to record."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class Stream:
    """The only stream."""

    def wait_stream(self, _: Any) -> None:
        """Nothing to wait for."""


torch.cuda.Event = Event  # type: ignore[assignment,misc]
torch.cuda.Stream = Stream  # type: ignore[assignment,misc]
torch.cuda.current_stream = lambda *_: Stream()  # type: ignore[assignment]
torch.cuda.stream = nullcontext  # type: ignore[assignment]
