"""`worker_cls` for asynchronous scheduling on a CPU, which vLLM switches off there: what it asks of CUDA does nothing.

A CPU computes in order, so there is nothing to wait for. Scheduler, queue of steps and model runner are vLLM's own.
"""

from contextlib import nullcontext
from typing import Any

import torch

from rudder.server.engine.worker.cpu import Worker as Worker


class Event:
    """An event that has happened."""

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
