"""Copies between the host and a device: the host waits for none, and reads none before it has arrived."""

from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from rudder.server.engine.worker import transfer
from tests.unit.pretended_gpu import DEVICE, pretended_gpu

VALUES = np.arange(6.0).reshape(2, 3)


def test_no_copy_makes_the_host_wait() -> None:
    with pretended_gpu() as gpu, patch.object(transfer, "record_event", lambda _: transfer.Reached()):
        there = transfer.to_device(VALUES, DEVICE)
        columns = transfer.to_device(torch.from_numpy(VALUES).T, DEVICE)
        copy = transfer.HostCopy({"rows": there, "columns": columns})
        assert (there.device, columns.device) == (DEVICE, DEVICE)
        assert gpu.waits == []
        arrays = copy.arrays()
    np.testing.assert_array_equal(arrays["rows"], VALUES)
    np.testing.assert_array_equal(arrays["columns"], VALUES.T)


@pytest.mark.parametrize(
    ("copy", "wait"),
    [
        (lambda host, _: host.to(DEVICE), "blocking copy to the device"),
        (lambda host, _: host.to(DEVICE, non_blocking=True), "copy from pageable memory"),
        (lambda host, _: host.pin_memory().to(DEVICE), "blocking copy to the device"),
        (lambda _, there: there.to("cpu"), "blocking copy from the device"),
        (lambda host, there: host.copy_(there, non_blocking=True), "copy to pageable memory"),
    ],
)
def test_other_copies_are_noticed(copy: Callable[[Tensor, Tensor], Tensor], wait: str) -> None:
    with pretended_gpu() as gpu:
        there = transfer.to_device(VALUES, DEVICE)
        copy(torch.from_numpy(VALUES.copy()), there)
    assert gpu.waits == [wait]


def test_values_are_read_when_the_event_behind_their_copies_has_occurred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the host's memory holds what was there by chance."""
    begun: list[str] = []
    tensor = torch.zeros(2)

    class Arrival:
        """An event with which the values arrive."""

        def __init__(self, _: torch.device) -> None:
            begun.append("event")

        def synchronize(self) -> None:
            """Wait."""
            tensor.fill_(7.0)

    def to_host(value: Tensor) -> Tensor:
        begun.append("copy")
        return value

    monkeypatch.setattr(transfer, "to_host", to_host)
    monkeypatch.setattr(transfer, "record_event", Arrival)
    copy = transfer.HostCopy({"f": tensor, "g": tensor})
    assert begun == ["copy", "copy", "event"]
    assert tensor.tolist() == [0.0, 0.0]
    assert copy.arrays()["f"].tolist() == [7.0, 7.0]
