"""Batches of vectors in an order that mixes documents and that can be entered anywhere.

The order is a function of the seed alone: each pass over the data permutes all chunks, gathers them in blocks that fit
in memory, and permutes the vectors of each block. A position is the number of a batch.
"""

import queue
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rudder.sae_models.activations.corpus import Windows
from rudder.sae_models.activations.harvest import WINDOWS_A_PASS, text_activations
from rudder.sae_models.activations.hooks import Site
from rudder.sae_models.errors import UserError

Vectors = Mapping[str, Tensor]
"""By the name of the site, [n, d]; the same row is the same token at every site."""


class Source(Protocol):
    """Vectors in numbered chunks."""

    @property
    def sizes(self) -> Sequence[int]:
        """Vectors in each chunk."""

    def load(self, chunks: Sequence[int]) -> Vectors:
        """The vectors of some chunks, one after the other."""


@dataclass(frozen=True)
class Order:
    """How a source is read: vectors a batch, vectors in memory, and the seed of the permutations."""

    batch: int
    block: int
    seed: int


@dataclass(frozen=True)
class Live:
    """Windows as a source: each pass of the model is a chunk, harvested when it is asked for."""

    trunk: Any
    sites: tuple[Site, ...]
    windows: Windows

    @cached_property
    def sizes(self) -> list[int]:
        """Counted tokens of each pass."""
        return [int(counted.sum()) for counted in self.windows.counted.split(WINDOWS_A_PASS)]

    def load(self, chunks: Sequence[int]) -> Vectors:
        """Runs the model."""
        rows = torch.arange(len(self.windows)).split(WINDOWS_A_PASS)
        # A pass is the same whatever passes are asked for with it.
        found = [self._harvested(self.windows.take(rows[chunk])) for chunk in chunks]
        return {str(site): torch.cat([parts[at] for parts in found]) for at, site in enumerate(self.sites)}

    def _harvested(self, windows: Windows) -> list[Tensor]:
        ((seen, counted),) = text_activations(self.trunk, self.sites, windows)
        return [x[counted] for x in seen]


@dataclass(frozen=True)
class Labelled:
    """A source of windows, and beside its vectors a number of each token's window, [n, 1], under a name of its own."""

    source: Source
    windows: Windows
    name: str
    number: Tensor

    @property
    def sizes(self) -> Sequence[int]:
        """Counted tokens of each pass."""
        return self.source.sizes

    def load(self, chunks: Sequence[int]) -> Vectors:
        """The source's vectors, and the numbers."""
        rows = torch.arange(len(self.windows)).split(WINDOWS_A_PASS)
        chosen = torch.cat([rows[chunk] for chunk in chunks])
        numbers = self.number[chosen].repeat_interleave(self.windows.counted[chosen].sum(1))
        return {**self.source.load(chunks), self.name: numbers[:, None]}


@dataclass(frozen=True)
class Part:
    """Some chunks of a source."""

    source: Source
    chunks: Sequence[int]

    @cached_property
    def sizes(self) -> Sequence[int]:
        """Vectors in each."""
        return [self.source.sizes[chunk] for chunk in self.chunks]

    def load(self, chunks: Sequence[int]) -> Vectors:
        """The source's vectors."""
        return self.source.load([self.chunks[chunk] for chunk in chunks])


def batches(source: Source, order: Order, start: int = 0) -> Iterator[Vectors]:
    """Batches from the one numbered `start` on, float32, without end. What is left at the end of a pass is dropped.

    ValueError: there are fewer vectors than a batch.
    """
    a_pass = sum(source.sizes) // order.batch
    if a_pass == 0:
        raise UserError(f"batch: {order.batch} vectors, the data hold {sum(source.sizes)}")
    number, skipped = divmod(start, a_pass)
    while True:
        yield from _pass(source, order, number, skipped * order.batch)
        number, skipped = number + 1, 0


def _pass(source: Source, order: Order, number: int, skipped: int) -> Iterator[Vectors]:
    """The batches of one pass, less the first `skipped` vectors."""
    rest: Vectors = {}
    for index, (chunks, size) in enumerate(_blocks(source.sizes, order, number)):
        if skipped >= size:
            skipped -= size
            continue
        shuffled = np.random.default_rng((order.seed, number, 1 + index)).permutation(size)[skipped:]
        skipped = 0
        rows = torch.from_numpy(shuffled)
        block = {name: _joined(rest.get(name), x[rows.to(x.device)]) for name, x in source.load(chunks).items()}
        count = (len(rows) + len(next(iter(rest.values()), ()))) // order.batch * order.batch
        for first in range(0, count, order.batch):
            yield {name: x[first : first + order.batch].float() for name, x in block.items()}
        rest = {name: x[count:].clone() for name, x in block.items()}


def _joined(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else torch.cat([first, second])


def _blocks(sizes: Sequence[int], order: Order, number: int) -> Iterator[tuple[list[int], int]]:
    """All chunks in a random order, in groups of at least a block, and the vectors of each group."""
    group, held = [], 0
    for chunk in np.random.default_rng((order.seed, number, 0)).permutation(len(sizes)).tolist():
        group.append(chunk)
        held += sizes[chunk]
        if held >= order.block:
            yield group, held
            group, held = [], 0
    if held:
        yield group, held


def prefetched(vectors: Iterator[Vectors], depth: int = 2) -> Generator[Vectors]:
    """The same, with up to `depth` batches made ahead in a thread; what the thread raises is raised here."""
    ready: queue.Queue[Vectors | BaseException] = queue.Queue(depth)
    stop = threading.Event()
    thread = threading.Thread(target=_fill, args=(vectors, ready, stop), daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), BaseException):
            yield item
        if not isinstance(item, StopIteration):
            raise item
    finally:
        stop.set()
        while thread.is_alive():
            _drain(ready)
            thread.join(0.01)


def _fill(vectors: Iterator[Vectors], ready: "queue.Queue[Vectors | BaseException]", stop: threading.Event) -> None:
    try:
        for item in vectors:
            ready.put(item)
            if stop.is_set():
                return
        ready.put(StopIteration())
    except BaseException as error:
        ready.put(error)


def _drain(ready: "queue.Queue[Vectors | BaseException]") -> None:
    while not ready.empty():
        ready.get_nowait()
