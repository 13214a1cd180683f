"""No part of the worker's step waits for the device.

The banks are on PyTorch's `meta` device, whose tensors have no values: to look at one raises an error. What is copied
between the host and the device is counted.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor

from rudder.sae_models.sae import TopK
from rudder.sae_models.sparse.screening import prepare_screening
from rudder.server.engine.worker import transfer
from rudder.server.engine.worker.driver import Driver
from rudder.server.engine.worker.reader import PendingFrame, Readable, Reader
from rudder.server.engine.worker.worker import build_banks
from rudder.server.program import wire
from rudder.server.program.layout import Layout
from tests.gpu.waits import SYNCHRONISES, UnpinnedCopies, Watch
from tests.unit.reference import BUNDLE, WIDTH, toy_sae

META = torch.device("meta")
SITES = ("layers.0.resid_post", "layers.1.resid_post")
SELECTING = "selecting"
ONES = wire.Row(decoder=np.ones(WIDTH, "<f4").tobytes())
PROBE = wire.Row(encoder=np.ones(WIDTH, "<f4").tobytes(), threshold=-np.inf)
LATENT = wire.Row(BUNDLE, 1)


@dataclass
class Device:
    """Stands in for CUDA: memory that was pinned, and what was copied to the host. `unpinned`: all other copies."""

    pinned: list[Tensor] = field(default_factory=list)
    to_host: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.unpinned = UnpinnedCopies(lambda tensor: any(tensor is other for other in self.pinned))

    def pin(self, tensor: Tensor) -> Tensor:
        """Remember memory as pinned."""
        self.pinned.append(tensor.clone())
        return self.pinned[-1]

    def copy(self, tensor: Tensor) -> Tensor:
        """Note a copy to the host."""
        self.to_host.append(tensor)
        return tensor

    def run(self, function: Callable[..., object], *args: object) -> object:
        """Call a function; its copies must be from pinned memory."""
        with self.unpinned:
            result = function(*args)
        assert not self.unpinned.places
        return result


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(transfer, "pinned", device.pin)
    monkeypatch.setattr(transfer, "to_host", device.copy)
    monkeypatch.setattr(transfer, "record_event", lambda _: transfer.Reached())
    return device


def worker_parts() -> tuple[Driver, Reader]:
    """A driver and a reader whose banks and SAEs are on a device; one site holds an SAE with a selection whole."""
    sae = toy_sae(Random(0)).to(META)
    selecting = replace(sae, selection=TopK(2))
    layout = Layout(SITES, rows=16, slots=4, stages=2, window=4)
    driver = Driver(layout, build_banks(layout, WIDTH, 48, META, {SITES[1]: {SELECTING: selecting}}))
    driver.load_sae(BUNDLE, sae)
    driver.load_sae(SELECTING, selecting)
    reader = Reader(driver.banks)
    reader.dictionaries = {0: Readable(prepare_screening(sae), [0]), 1: Readable(selecting, [0, 1])}
    return driver, reader


def requests() -> dict[str, wire.Request]:
    """Requests that use all that a step may need, with excluded positions, in both stages and at both sites."""
    edits = (wire.Edit(1, shift=1.0), wire.Edit(2, scale=0.0, prompt=False))
    sequence = wire.Sequence(0, window=3, level=0.5)
    gate = wire.Gate(((2, 0.5),), sequence)
    own = wire.Site(0, (PROBE, ONES, LATENT), edits, wire.Blend(1, 0.5), watch=(0, 2), gate=gate)
    policy = wire.Site(1, (wire.Row(SELECTING, 3), ONES), (wire.Edit(1, shift=1.0),), watch=())
    return {
        "all": wire.Request(
            4, 20, True, ((own,), (policy,)), True, top_k=2, top_k_sites=(0, 1), capture=True, excluded=(2, 6)
        ),
        "edited": wire.Request(3, 20, False, ((own,), ())),
        "plain": wire.Request(3, 20, True, ((), ())),
    }


# (request, start, tokens): chunks, steady decoding, another order, a request left out, and preemption.
STEPS = (
    [("all", 0, 3), ("edited", 0, 3), ("plain", 0, 3)],
    [("all", 3, 1), ("edited", 3, 1), ("plain", 3, 1)],
    *([("all", n, 1), ("edited", n, 1), ("plain", n, 1)] for n in range(4, 10)),
    [("edited", 10, 1), ("all", 10, 1)],
    [("plain", 10, 1), ("all", 11, 1)],
    [("edited", 11, 1), ("all", 0, 9)],
)


def test_no_step_looks_at_the_devices_values_or_copies_from_unpinned_memory(device: Device) -> None:
    driver, reader = worker_parts()
    pinned = wire.Site(0, (LATENT, PROBE), watch=(0, 1))
    driver.admit("pinned", 0, wire.Request(0, 0, False, ((pinned,),)))
    reader.pin({0: driver.requests["pinned"].places(pinned)})
    for handle, (name, request) in enumerate(requests().items(), 1):
        device.run(driver.admit, name, handle, request)
    assert len(device.pinned) > 10, "rows and entries are copied"
    for number, parts in enumerate(STEPS):
        starts, lengths = (np.array([part[i] for part in parts]) for i in (1, 2))
        device.run(driver.write_token_metadata, [part[0] for part in parts], starts, lengths)
        before = len(device.to_host)
        frame = device.run(reader.read, driver.step, [number])
        assert isinstance(frame, PendingFrame)
        assert len(device.to_host) - before == len(frame.values.copies) > 0
        assert frame.top or "all" not in {part[0] for part in parts}
    for name in requests():
        device.run(driver.finish, name)


def test_steady_decoding_copies_each_column_once_and_nothing_to_the_device(device: Device) -> None:
    driver, reader = worker_parts()
    for name, request in requests().items():
        if name != "all":
            driver.admit(name, len(name), request)
    for number in (0, 3, 4, 5):
        device.pinned.clear()
        device.to_host.clear()
        lengths = np.full(2, 1 if number else 3)
        driver.write_token_metadata(["edited", "plain"], np.full(2, number), lengths)
        frame = reader.read(driver.step, ())
    assert len(device.pinned) == 0
    assert set(frame.values.copies) == {(name, 0) for name in ("activations", "flags", "rejected", "statistics")}
    assert len(device.to_host) == 4


def test_the_gpu_card_notes_each_place_while_it_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's warnings stand in for CUDA's."""
    modes: list[object] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    watch = Watch()

    def step(value: int) -> int:
        warnings.warn(SYNCHRONISES, stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        torch.empty(1, device=META).copy_(torch.ones(1))
        return value

    watched = watch.over(step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert watched(1) == 1
    assert not watch.places
    watch.on = True
    assert watched(2) == 2
    assert modes == ["warn", 0]
    copied, synchronised = sorted(watch.places)
    assert copied.startswith("aten.copy_.default at ")
    assert synchronised.startswith("test_waits.py:")


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: int(x[0, 0]),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.numpy(),
        lambda x: x.copy_(torch.ones(2, 2)),
        lambda x: x.copy_(torch.ones(2, 2), non_blocking=True),
        lambda x: torch.ones(2, 2).to(x.device, non_blocking=True),
        lambda x: torch.tensor([1.0], device=x.device) + torch.ones(1).to(x.device),
        lambda x: x[torch.tensor([0])],
        lambda x: x.index_fill_(0, torch.tensor([0]), 1.0),
    ],
)
def test_what_waits_is_noticed(device: Device, wait: Callable[[Tensor], object]) -> None:
    x = torch.empty(2, 2, device=META)
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError, TypeError)):
        device.run(wait, x)
