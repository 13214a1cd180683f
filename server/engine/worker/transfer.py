"""Copies between the host and the device for which the host does not wait.

All of them go through PyTorch's pinned memory: its allocator records an event with each copy, and reuses a buffer only
when the copies from and to it have run. On a CPU nothing is copied.
"""

from collections.abc import Mapping
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
K = TypeVar("K")


class Event(Protocol):
    """A point in the device's work."""

    def synchronize(self) -> None:
        """Wait until the device has reached it."""


class Reached:
    """An event on a CPU, which computes at once."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


class HostCopy(Generic[K]):
    """Tensors by name on their way to the host."""

    def __init__(self, tensors: Mapping[K, Tensor]) -> None:
        """Begin to copy. On a CPU the tensors themselves are read later: they must not change."""
        self.copies = {name: to_host(tensor) for name, tensor in tensors.items()}
        devices = {tensor.device for tensor in tensors.values()}
        self.events = [record_event(device) for device in devices]

    def arrays(self) -> dict[K, Array]:
        """Wait for the copies, and view them."""
        for event in self.events:
            event.synchronize()
        return {name: copy.numpy() for name, copy in self.copies.items()}


def record_event(device: torch.device) -> Event:
    """Record an event behind all work that the current stream has so far."""
    if device.type == "cpu":
        return Reached()
    # Blocking: a thread that waits must not spin on a core.
    event: Event = torch.cuda.Event(blocking=True)
    event.record()  # type: ignore[attr-defined]
    return event


def to_host(tensor: Tensor) -> Tensor:
    """Begin to copy a tensor to pinned memory of the host; on a CPU, return it."""
    return tensor.to("cpu", non_blocking=True)


def to_device(values: Array | Tensor, device: torch.device) -> Tensor:
    """Copy values of the host to the device; on a CPU, and of a tensor that is there, view them."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    return tensor if tensor.device.type == device.type else pinned(tensor).to(device, non_blocking=True)


def pinned(tensor: Tensor) -> Tensor:
    """Copy a tensor of the host to pinned memory: from other memory the driver copies while the host waits."""
    return tensor.contiguous().pin_memory()
