"""Receives the worker's frames and sorts them into one inbox per request.

Steady decoding sends frame after frame of the same shape. They lie in the socket until someone asks, are kept as they
came and sorted together: what a step costs here does not grow with the requests in flight unless they read features.
"""

import asyncio
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from server.engine.channel import Receiver
from server.engine.telemetry import Array, Capture, Frame, TelemetryLost, column, unseal
from server.steering import wire

# Frames kept before they are sorted, whoever asks: bounds memory.
LONGEST_RUN = 64
# Frames that nobody awaits are taken in this often: a wake-up for each of them would take the model's cores from it.
UNASKED_S = 0.1


class Features(NamedTuple):
    """Of n tokens in a row, from position `first` on: active [n, rows], top_latents and top_values [n, sites, k].

    Columns that nobody asked for may be of no token.
    """

    first: int
    active: Array
    top_latents: Array
    top_values: Array

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.first + len(self.active)

    def reordered(self, columns: tuple[int, ...] | None) -> "Features":
        """With the columns of `active` in this order; None: as they are."""
        return self if columns is None else self._replace(active=self.active[:, list(columns)])

    def between(self, begin: int, end: int) -> "Features":
        """Those of the tokens at positions begin <= p < end."""
        begin = max(begin, self.first)
        cut = slice(begin - self.first, max(end - self.first, 0))
        return Features(begin, self.active[cut], self.top_latents[cut], self.top_values[cut])


def no_features(rows: int, sites: int, k: int) -> Features:
    """Features of no token."""
    top = np.zeros((0, sites, k), np.float32)
    return Features(0, np.zeros((0, rows), np.float32), top, top)


@dataclass
class Inbox:
    """A request's telemetry, joined by position. `covered`: the position after the last token that ran.

    `moved`: (positions after each step [n], tokens that each edit touched in it [n, edits]).
    """

    request: wire.Request
    first: int = -1
    covered: int = 0
    chunks: list[Features] = field(default_factory=list)
    delivered: int = 0
    moved: list[tuple[Array, Array]] = field(default_factory=list)
    captures: list[Capture] = field(default_factory=list)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        stages = self.request.stages
        # Rows reported per token, and counts in the `moved` column.
        self.watched = sum(len(site.watch) for site in stages[0])
        self.edits = sum(len(s.edits) + bool(s.blend) for stage in stages for s in stage)
        self.top = (len(self.request.top_k_sites), self.request.top_k)
        self.reports = bool(self.watched or self.request.top_k_sites)
        self.nothing = no_features(self.watched, *self.top)

    def take(self) -> Features:
        """What has been sorted since the last take. A position that ran again after a preemption is not told twice."""
        parts = []
        for chunk in self.chunks:
            end = chunk.end
            parts.append(chunk if chunk.first >= self.delivered else chunk.between(self.delivered, end))
            self.delivered = max(self.delivered, end)
        self.chunks.clear()
        if len(parts) < 2:
            return parts[0] if parts else self.nothing
        if any(part.first != before.end for before, part in pairwise(parts)):
            raise TelemetryLost(f"features of positions after {parts[0].first} are missing")
        firsts, *columns = zip(*parts, strict=True)
        return Features(firsts[0], *map(np.concatenate, columns))

    def moved_before(self, end: int) -> tuple[int, ...]:
        """Tokens touched per edit among positions before `end`."""
        counts = [np.zeros(self.edits, np.int64), *(count[ends <= end].sum(0) for ends, count in self.moved)]
        return tuple(np.sum(counts, axis=0).tolist())


@dataclass
class Run:
    """Consecutive frames of one shape: the same requests in the same order, each going on where it stopped."""

    frames: list[Frame]
    starts: Array
    lengths: Array

    def continues(self, frame: Frame) -> bool:
        """Whether `frame` can be appended."""
        last = self.frames[-1]
        return (
            len(self.frames) < LONGEST_RUN
            and frame.handles == last.handles
            and frame.lengths == last.lengths
            and len(frame.moved) == len(last.moved)
            and len(frame.active) == len(last.active)
            and len(frame.top_values) == len(last.top_values)
            and bool((column(frame.starts, "<i4") == self.starts + len(self.frames) * self.lengths).all())
        )


class Hub:
    """The server's end of the telemetry channel. `totals` is given each step's sums of the pinned rows."""

    def __init__(self, totals: Callable[[Array], None], released: Callable[[int], None]) -> None:
        self.totals, self.on_released = totals, released
        self.key = secrets.token_bytes(32)
        self.inboxes: dict[int, Inbox] = {}
        self.run: Run | None = None
        self.arrived = asyncio.Event()
        self.awaiting = 0
        self.expected = 0
        self.lost: TelemetryLost | None = None

    def bind(self, address: str) -> None:
        """Where the worker's frames arrive, sealed with `key`."""
        self.channel = Receiver(address)

    @property
    def over(self) -> bool:
        """Whether nothing more is taken in: telemetry is lost, or the engine has died, which vLLM tells."""
        return self.lost is not None or self.channel.ended

    def open(self, handle: int, request: wire.Request) -> Inbox:
        """Expect telemetry of a request from now on."""
        inbox = self.inboxes[handle] = Inbox(request)
        return inbox

    async def listen(self) -> TelemetryLost:
        """Take in what nobody asks for, until telemetry is lost."""
        while self.lost is None:
            self.receive()
            await asyncio.sleep(UNASKED_S)
        return self.lost

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Within it, frames are taken in as they come."""
        loop = asyncio.get_running_loop()
        if not self.awaiting and not self.over:
            loop.add_reader(self.channel.socket, self.receive)
        self.awaiting += 1
        try:
            yield
        finally:
            self.awaiting -= 1
            if not self.awaiting:
                loop.remove_reader(self.channel.socket)

    def receive(self) -> None:
        """Take in every frame that has come. A lost one fails every request in flight and all that follow."""
        for message in [] if self.lost else self.channel.messages():
            self.arrived.set()
            try:
                frame = unseal(message, self.key, self.expected)
            except TelemetryLost as lost:
                self.lost = lost
                break
            self.expected += 1
            self.take(frame)
        if self.over:
            asyncio.get_running_loop().remove_reader(self.channel.socket)

    def update(self) -> None:
        """Bring the inboxes up to date."""
        self.receive()
        self.sort()

    def take(self, frame: Frame) -> None:
        """Take in a frame; its columns are sorted when someone asks."""
        if frame.handles:
            if self.run and self.run.continues(frame):
                self.run.frames.append(frame)
            else:
                self.sort()
                self.run = Run([frame], column(frame.starts, "<i4"), column(frame.lengths, "<i4"))
        for capture in frame.captures:
            if inbox := self.inboxes.get(capture.handle):
                inbox.captures.append(capture)
        if frame.pinned:
            self.totals(column(frame.pinned, "<f8").reshape(-1, 4))
        for handle in column(frame.released, "<i8").tolist():
            self.sort()
            if inbox := self.inboxes.pop(handle, None):
                inbox.released.set()
            self.on_released(handle)

    def sort(self) -> None:
        """Sort what has come into the inboxes."""
        if self.run is None:
            return
        run, self.run = self.run, None
        reader = RunReader(run)
        handles = column(run.frames[0].handles, "<i8").tolist()
        for handle, start, length in zip(handles, run.starts.tolist(), run.lengths.tolist(), strict=True):
            if inbox := self.inboxes.get(handle):
                reader.read(inbox, start, length)


class RunReader:
    """Cuts the columns of a run of n frames into requests, in the order in which the worker wrote them."""

    def __init__(self, run: Run) -> None:
        self.steps = len(run.frames)
        self.moved, self.active = self.stacked(run, "moved", "<i4"), self.stacked(run, "active", "<f4")
        self.latents, self.values = self.stacked(run, "top_latents", "<i4"), self.stacked(run, "top_values", "<f4")
        self.moved_at = self.active_at = self.top_at = 0

    def stacked(self, run: Run, name: str, dtype: str) -> Array:
        """A column of all frames, [n, size]."""
        return column(b"".join(getattr(frame, name) for frame in run.frames), dtype).reshape(self.steps, -1)

    def read(self, inbox: Inbox, start: int, length: int) -> None:
        """Take the next request's part: `length` tokens a step from position `start` on."""
        if start < inbox.covered:
            inbox.moved = [(ends[ends <= start], count[ends <= start]) for ends, count in inbox.moved]
        inbox.first = start if inbox.first < 0 else min(inbox.first, start)
        inbox.covered = start + self.steps * length
        if inbox.edits:
            counts = self.moved[:, self.moved_at : self.moved_at + inbox.edits]
            inbox.moved.append((start + length * np.arange(1, self.steps + 1), counts))
            self.moved_at += inbox.edits
        if inbox.reports:
            self.read_features(inbox, start, length)

    def read_features(self, inbox: Inbox, start: int, length: int) -> None:
        """Take the part of a request that reports features."""
        request, rows = inbox.request, inbox.watched
        prompt = 0 if request.watch_prompt else request.prompt_tokens
        cut = min(length, prompt - start) if start < prompt else 0
        tokens = length - cut
        total = self.steps * tokens
        active = self.active[:, self.active_at : self.active_at + tokens * rows].reshape(total, rows)
        self.active_at += tokens * rows
        latents, values = self.read_top(inbox, tokens) if request.top_k_sites else inbox.nothing[2:]
        if total:
            inbox.chunks.append(Features(start + cut, active, latents, values))

    def read_top(self, inbox: Inbox, tokens: int) -> tuple[Array, Array]:
        """(latents, values) [n * tokens, sites, k]; the worker writes site by site."""
        sites, k = inbox.top
        here = slice(self.top_at, self.top_at + tokens * sites * k)
        self.top_at = here.stop
        parts = (column[:, here].reshape(self.steps, sites, tokens, k) for column in (self.latents, self.values))
        latents, values = (part.swapaxes(1, 2).reshape(self.steps * tokens, sites, k) for part in parts)
        return latents, values
