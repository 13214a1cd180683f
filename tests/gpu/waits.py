"""Places at which the worker's own part of a step lets the host wait for the device."""

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rudder.server.engine.worker.driver import Driver
from rudder.server.engine.worker.reader import Reader
from rudder.server.engine.worker.worker import SteeringWorker

# What runs in a step beside vLLM's own code: before the forward pass, and behind it.
REGIONS: tuple[tuple[type, str], ...] = (
    (SteeringWorker, "update_requests"),
    (Driver, "write_token_metadata"),
    (Reader, "read"),
)
WORKER_FOLDER = "engine/worker"
SYNCHRONISES = "called a synchronizing CUDA operation"


class UnpinnedCopies(TorchDispatchMode):
    """Records operators on tensors of the host and of the device together, where the host's are not pinned.

    Copies from such memory are none that PyTorch's own debug mode knows of, if they are `non_blocking`.
    """

    def __init__(self, is_pinned: Callable[[Tensor], bool] = Tensor.is_pinned) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_pinned = is_pinned
        self.places: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, Tensor)]
        host = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        if len(host) < len(tensors) and not all(map(self.is_pinned, host)):
            self.places.add(f"{func} at {place()}")
        return result


def place() -> str:
    """Return the innermost line of the worker's code that is running."""
    frame = sys._getframe()
    while frame.f_back and WORKER_FOLDER not in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


@dataclass
class Watch:
    """Notes the places at which the host waits for the device, while it is `on`."""

    on: bool = False
    places: set[str] = field(default_factory=set)

    def over(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that is watched."""

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return function(*args, **kwargs)
            mode = torch.cuda.get_sync_debug_mode()
            with warnings.catch_warnings(record=True) as caught, UnpinnedCopies() as copies:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    return function(*args, **kwargs)
                finally:
                    torch.cuda.set_sync_debug_mode(mode)
                    self.places |= copies.places
                    waits = (w for w in caught if SYNCHRONISES in str(w.message))
                    self.places |= {f"{Path(w.filename).name}:{w.lineno}" for w in waits}

        return run
