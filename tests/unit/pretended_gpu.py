"""A device beside the CPU on a machine without one: finds operations on tensors of two devices, and waits for it.

A tensor on `DEVICE` computes on the CPU, but says that it is elsewhere, and operations refuse what CUDA refuses. Code
that has a `device` can be run on it; streams, events, graphs and Triton are not pretended.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

# PyTorch's place for devices that are registered in Python.
NAME = "pretended"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)

aten = torch.ops.aten
# Their index tensors may be on the CPU.
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._unsafe_index.Tensor)
# The size of what they return, or their value, is known only when the device has computed it.
WAITS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default)
NEW_TENSOR = torch.tensor


class DeviceTensor(Tensor):
    """A tensor on `DEVICE`; `host` holds its values."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> "DeviceTensor":
        """Wrap a tensor of the CPU, whose memory it shares."""
        wrapped: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
        )
        wrapped.host = host
        return wrapped

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{NAME}:{self.host!r}"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatch(function, args, kwargs or {}, [])


class PretendedGpu(TorchDispatchMode):
    """`waits`: the operations that made the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(function, args, kwargs or {}, self.waits)


@contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """Within the block, `DEVICE` can be used; yields the record of waits."""
    with patch.object(torch, "tensor", new_tensor), PretendedGpu() as mode:
        yield mode


def new_tensor(data: Any, device: Any = None, **options: Any) -> Tensor:
    """`torch.tensor`, which asks no dispatch mode where to put its result."""
    host = NEW_TENSOR(data, **options)
    return host if device is None else host.to(device)


def dispatch(function: Any, args: Sequence[Any], kwargs: dict[str, Any], waits: list[str]) -> Any:
    """Run an operation on the CPU on the tensors' values, and put the results where the operation would."""
    if function in (aten._pin_memory.default, aten.pin_memory.default):
        pinned: Tensor = args[0].clone()
        pinned.is_pretended_pinned = True  # type: ignore[attr-defined]
        return pinned
    if function in (aten.copy_.default, aten._to_copy.default):
        return copy(function, args, kwargs, waits)
    tensors = tensors_in((args, kwargs))
    check_devices(function, args, tensors)
    on_device = any(map(is_on_device, tensors))
    if on_device and (function in WAITS or uses_mask(function, args)):
        waits.append(str(function))
    return on_values(function, args, kwargs, on_device or names_device(kwargs.get("device")))


def copy(function: Any, args: Sequence[Any], kwargs: dict[str, Any], waits: list[str]) -> Any:
    """Copy between devices. The host waits unless the copy is non-blocking and its memory is pinned.

    Memory that a non-blocking copy to the host allocates itself is: PyTorch's `_to_copy` takes it from its pinned pool.
    """
    source = args[1] if function is aten.copy_.default else args[0]
    if function is aten.copy_.default:
        arrives, other, blocking = is_on_device(args[0]), args[0], not (args[2] if len(args) > 2 else False)
    else:
        device = kwargs.get("device")
        arrives, other, blocking = (
            is_on_device(source) if device is None else names_device(device),
            None,
            not kwargs.get("non_blocking", False),
        )
    if arrives != is_on_device(source):
        host = source if arrives else other
        if blocking:
            waits.append(f"blocking copy {'to' if arrives else 'from'} the device")
        elif host is not None and not is_pinned(host):
            waits.append(f"copy {'from' if arrives else 'to'} pageable memory")
    return on_values(function, args, kwargs, arrives)


def on_values(function: Callable[..., Any], args: Any, kwargs: dict[str, Any], to_device: bool) -> Any:
    """Run an operation on the CPU. An argument that it returns stays the same tensor."""
    known = {id(t.host): t for t in tensors_in((args, kwargs)) if isinstance(t, DeviceTensor)}
    if kwargs.get("device") is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    args, kwargs = tree_map(lambda x: x.host if isinstance(x, DeviceTensor) else x, (args, kwargs))
    result = function(*args, **kwargs)
    return tree_map(lambda x: known.get(id(x), DeviceTensor(x)) if to_device and isinstance(x, Tensor) else x, result)


def check_devices(function: Any, args: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    """Raise RuntimeError for tensors of two devices. A scalar on the CPU goes with any device."""
    if function in INDEXING:
        indices = {id(index) for index in tensors_in(args[1])}
        tensors = [t for t in tensors if id(t) not in indices]
    if any(map(is_on_device, tensors)) and any(not is_on_device(t) and t.dim() for t in tensors):
        raise RuntimeError(f"{function}: tensors are on {DEVICE} and on the CPU")


def uses_mask(function: Any, args: Sequence[Any]) -> bool:
    """Whether an operation indexes by a mask."""
    return function in INDEXING and any(index.dtype == torch.bool for index in tensors_in(args[1]))


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested arguments."""
    return [x for x in tree_flatten(value)[0] if isinstance(x, Tensor)]


def is_on_device(value: Any) -> bool:
    """Whether a tensor is on `DEVICE`."""
    return isinstance(value, DeviceTensor)


def names_device(device: Any) -> bool:
    """Whether a device argument is `DEVICE`."""
    return device is not None and torch.device(device).type == NAME


def is_pinned(host: Tensor) -> bool:
    """Whether a tensor on the CPU is, or is a view of, pinned memory."""
    return any(hasattr(tensor, "is_pretended_pinned") for tensor in (host, host._base))
