"""Batches of vectors in an order that mixes documents and can be resumed at any batch.

The order depends on the seed alone: each epoch permutes all chunks, loads them in blocks that fit in memory, and
permutes the vectors of each block. The number of a batch is therefore the whole state of the stream.
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

from rudder.sae_models.activations import norms
from rudder.sae_models.activations.corpus import Windows
from rudder.sae_models.activations.harvest import WINDOWS_PER_PASS, chunk_activations
from rudder.sae_models.activations.hooks import Site
from rudder.sae_models.errors import UserError

Vectors = Mapping[str, Tensor]
"""Site name to vectors [n, d]; index i is the same token at every site."""


class VectorSource(Protocol):
    """Vectors in numbered chunks, loadable in any order."""

    @property
    def chunk_sizes(self) -> Sequence[int]:
        """Number of vectors in each chunk."""

    def load(self, chunks: Sequence[int]) -> Vectors:
        """Return the vectors of some chunks, concatenated."""


@dataclass(frozen=True)
class BatchOrder:
    """Vectors per batch, vectors held in memory at once (a block), and the seed of the permutations."""

    batch_size: int
    block_size: int
    seed: int


@dataclass(frozen=True)
class TextSource:
    """A vector source over windows of text; the model runs over a chunk of windows when it is loaded."""

    trunk: Any
    sites: tuple[Site, ...]
    windows: Windows

    @cached_property
    def chunk_sizes(self) -> list[int]:
        """Number of counted tokens in each chunk."""
        return [int(self.windows.counted[index].sum()) for index in self._indices]

    @cached_property
    def _indices(self) -> list[Tensor]:
        return self.windows.chunks(WINDOWS_PER_PASS)

    def load(self, chunks: Sequence[int]) -> Vectors:
        """Run the model on some chunks."""
        # Passes stay within a chunk: batching chunks together would change the rounding of their vectors.
        batches = [self._vectors(self.windows.take(self._indices[chunk]).trimmed()) for chunk in chunks]
        return {
            str(site): torch.cat([vectors[position] for vectors in batches]) for position, site in enumerate(self.sites)
        }

    def _vectors(self, chunk: Windows) -> list[Tensor]:
        counted = chunk.counted.to(self.trunk.device)
        return [x[counted] for x in chunk_activations(self.trunk, self.sites, chunk)]


def by_window(source: VectorSource, sites: Sequence[str], windows: Windows) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Yield what `harvest.text_activations` yields, without the model: from a source of vectors of the same windows, or
    of more windows after them. Tokens that the source lacks are not counted.
    """
    for number, index in enumerate(windows.chunks(WINDOWS_PER_PASS)):
        chunk = windows.take(index).trimmed()
        loaded = source.load([number]) if number < len(source.chunk_sizes) else {}
        vectors = [loaded[site] for site in sites] if loaded else [torch.zeros(0, 0) for _ in sites]
        # The last chunk of the windows, or of the source, may be cut.
        window, position = (at[: len(vectors[0])] for at in chunk.counted.nonzero(as_tuple=True))
        vectors = [x[: len(window)].float() for x in vectors]
        counted = torch.zeros_like(chunk.counted)
        counted[window, position] = norms.within_limit(vectors)
        results = [x.new_zeros(*counted.shape, x.shape[1]) for x in vectors]
        for result, x in zip(results, vectors, strict=True):
            result[window, position] = x
        yield results, counted


@dataclass(frozen=True)
class LabelledSource:
    """A text source that also returns one label per window [n], repeated for each of its tokens, as [tokens, 1] under
    `name`.
    """

    source: VectorSource
    windows: Windows
    name: str
    labels: Tensor

    @property
    def chunk_sizes(self) -> Sequence[int]:
        """Number of counted tokens in each chunk."""
        return self.source.chunk_sizes

    def load(self, chunks: Sequence[int]) -> Vectors:
        """Return the source's vectors and the labels."""
        indices = self.windows.chunks(WINDOWS_PER_PASS)
        selected = torch.cat([indices[chunk] for chunk in chunks])
        per_token = self.labels[selected].repeat_interleave(self.windows.counted[selected].sum(1))
        return {**self.source.load(chunks), self.name: per_token[:, None]}


@dataclass(frozen=True)
class SourceSubset:
    """A vector source restricted to some chunks of another."""

    source: VectorSource
    chunks: Sequence[int]

    @cached_property
    def chunk_sizes(self) -> Sequence[int]:
        """Number of vectors in each chunk."""
        return [self.source.chunk_sizes[chunk] for chunk in self.chunks]

    def load(self, chunks: Sequence[int]) -> Vectors:
        """Return the source's vectors."""
        return self.source.load([self.chunks[chunk] for chunk in chunks])


def batches(source: VectorSource, order: BatchOrder, start: int = 0) -> Iterator[Vectors]:
    """Yield float32 batches from number `start` on, without end, in which no vector is an attention sink (`norms`). The
    incomplete batch at the end of an epoch is dropped.

    Raise ValueError if the source holds fewer vectors than a batch.
    """
    batches_per_epoch = sum(source.chunk_sizes) // order.batch_size
    if batches_per_epoch == 0:
        raise UserError(f"batch: {order.batch_size} vectors, the data hold {sum(source.chunk_sizes)}")
    epoch, skipped = divmod(start, batches_per_epoch)
    while True:
        yield from _epoch_batches(source, order, epoch, skipped * order.batch_size)
        epoch, skipped = epoch + 1, 0


def _epoch_batches(source: VectorSource, order: BatchOrder, epoch: int, skipped: int) -> Iterator[Vectors]:
    """Yield the batches of one epoch after its first `skipped` vectors, a multiple of the batch size."""
    # A batch may straddle two blocks: the vectors beyond the last whole batch of a block go in front of the next.
    remainder: Vectors = {}
    for index, (chunks, size) in enumerate(_blocks(source.chunk_sizes, order, epoch)):
        # Skipped blocks are never loaded, so resuming late in an epoch costs nothing.
        if skipped >= size:
            skipped -= size
            continue
        shuffled = np.random.default_rng((order.seed, epoch, 1 + index)).permutation(size)[skipped:]
        skipped = 0
        indices = torch.from_numpy(shuffled)
        loaded = norms.with_outliers_replaced(source.load(chunks))
        block = {name: _concatenate(remainder.get(name), x[indices.to(x.device)]) for name, x in loaded.items()}
        count = (len(indices) + len(next(iter(remainder.values()), ()))) // order.batch_size * order.batch_size
        for first in range(0, count, order.batch_size):
            yield {name: x[first : first + order.batch_size].float() for name, x in block.items()}
        remainder = {name: x[count:].clone() for name, x in block.items()}


def _concatenate(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else torch.cat([first, second])


def _blocks(chunk_sizes: Sequence[int], order: BatchOrder, epoch: int) -> Iterator[tuple[list[int], int]]:
    """Yield all chunks in random order, grouped into blocks of at least `block_size` vectors, with the size of each
    block.
    """
    group, size = [], 0
    for chunk in np.random.default_rng((order.seed, epoch, 0)).permutation(len(chunk_sizes)).tolist():
        group.append(chunk)
        size += chunk_sizes[chunk]
        if size >= order.block_size:
            yield group, size
            group, size = [], 0
    if size:
        yield group, size


def prefetch(vectors: Iterator[Vectors], depth: int = 2) -> Generator[Vectors]:
    """Yield the same batches, with up to `depth` computed ahead by a thread; re-raise exceptions of that thread."""
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
            # The producer may be blocked in put(); make room until it sees the event.
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
