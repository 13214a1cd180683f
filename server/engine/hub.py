"""Receives the worker's frames and sorts them into one inbox per request."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import zmq
import zmq.asyncio

from server.engine.telemetry import Array, Capture, Frame, TelemetryLost, column, unseal
from server.steering import wire


@dataclass(frozen=True)
class Chunk:
    """What one step said of one request: [n] tokens from position `start` on."""

    start: int
    active: Array
    latents: Array
    values: Array


class Features(NamedTuple):
    """Of the tokens at `positions` [n]: active [n, rows], top_latents and top_values [n, sites, k]."""

    positions: Array
    active: Array
    top_latents: Array
    top_values: Array

    def reordered(self, columns: tuple[int, ...]) -> "Features":
        """With the columns of `active` in this order."""
        if columns == tuple(range(self.active.shape[1])):
            return self
        return self._replace(active=self.active[:, list(columns)])

    def before(self, position: int) -> "Features":
        """Those of positions before this one."""
        return Features(*(column[self.positions < position] for column in self))


def no_features(rows: int, sites: int, k: int) -> Features:
    """Features of no token."""
    top = np.zeros((0, sites, k), np.float32)
    return Features(np.zeros(0, np.int64), np.zeros((0, rows), np.float32), top, top)


@dataclass
class Inbox:
    """A request's telemetry, joined by position. `covered`: the position after the last token that ran."""

    request: wire.Request
    first: int = -1
    covered: int = 0
    chunks: list[Chunk] = field(default_factory=list)
    delivered: int = 0
    moved: list[tuple[int, Array]] = field(default_factory=list)
    captures: list[Capture] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        stages = self.request.stages
        # Rows reported per token, and counts in the `moved` column.
        self.watched = sum(len(site.watch) for site in stages[0])
        self.edits = sum(len(s.edits) + bool(s.blend) for stage in stages for s in stage)
        self.nothing = no_features(self.watched, len(self.request.top_k_sites), self.request.top_k)

    def take(self) -> "Features":
        """What has come since the last take.

        A position that ran again after a preemption is not told twice.
        """
        parts = []
        for chunk in self.chunks:
            skip, end = max(0, self.delivered - chunk.start), chunk.start + len(chunk.active)
            columns = (np.arange(chunk.start, end), chunk.active, chunk.latents, chunk.values)
            parts.append(Features(*(column[skip:] for column in columns)) if skip else Features(*columns))
            self.delivered = max(self.delivered, end)
        self.chunks.clear()
        if len(parts) < 2:
            return parts[0] if parts else self.nothing
        return Features(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def moved_before(self, end: int) -> tuple[int, ...]:
        """Tokens touched per edit among positions before `end`."""
        counts = [np.zeros(self.edits, np.int64), *(count for last, count in self.moved if last <= end)]
        return tuple(np.sum(counts, axis=0).tolist())


class Hub:
    """The server's end of the telemetry channel. `totals` is given each step's sums of the pinned rows."""

    def __init__(self, totals: Callable[[Array], None], released: Callable[[int], None]) -> None:
        self.totals, self.on_released = totals, released
        self.inboxes: dict[int, Inbox] = {}
        self.expected = 0
        self.lost: TelemetryLost | None = None

    def open(self, handle: int, request: wire.Request) -> Inbox:
        """Expect telemetry of a request from now on."""
        inbox = self.inboxes[handle] = Inbox(request)
        return inbox

    async def listen(self, socket: zmq.asyncio.Socket, key: bytes) -> None:
        """Take in frames for ever. A lost frame fails every request in flight and all that follow."""
        while True:
            message = await socket.recv()
            try:
                frame = unseal(message, key, self.expected)
            except TelemetryLost as lost:
                self.fail(lost)
                return
            self.expected += 1
            self.take(frame)

    def fail(self, lost: TelemetryLost) -> None:
        """Tell everyone who waits that telemetry is lost."""
        self.lost = lost
        for inbox in self.inboxes.values():
            inbox.arrived.set()

    def take(self, frame: Frame) -> None:
        """Sort a frame into the inboxes."""
        reader = FrameReader(frame)
        handles, starts, lengths = (
            column(frame.handles, "<i8"), column(frame.starts, "<i4"), column(frame.lengths, "<i4")
        )  # fmt: skip
        for handle, start, length in zip(handles.tolist(), starts.tolist(), lengths.tolist(), strict=True):
            if inbox := self.inboxes.get(handle):
                reader.read(inbox, start, length)
                inbox.arrived.set()
        for capture in frame.captures:
            if inbox := self.inboxes.get(capture.handle):
                inbox.captures.append(capture)
        if frame.pinned:
            self.totals(column(frame.pinned, "<f8").reshape(-1, 4))
        for handle in column(frame.released, "<i8").tolist():
            if inbox := self.inboxes.pop(handle, None):
                inbox.released.set()
            self.on_released(handle)


class FrameReader:
    """Cuts a frame's columns into requests, in the order in which the worker wrote them."""

    def __init__(self, frame: Frame) -> None:
        self.moved, self.active = column(frame.moved, "<i4"), column(frame.active, "<f4")
        self.latents, self.values = column(frame.top_latents, "<i4"), column(frame.top_values, "<f4")
        self.moved_at = self.active_at = self.top_at = 0

    def read(self, inbox: Inbox, start: int, length: int) -> None:
        """Take the next request's part."""
        if start < inbox.covered:
            inbox.moved = [(last, count) for last, count in inbox.moved if last <= start]
        inbox.first = start if inbox.first < 0 else min(inbox.first, start)
        inbox.covered = start + length
        if inbox.edits:
            inbox.moved.append((start + length, self.moved[self.moved_at : self.moved_at + inbox.edits]))
            self.moved_at += inbox.edits
        if inbox.watched or inbox.request.top_k_sites:
            self.read_features(inbox, start, length)

    def read_features(self, inbox: Inbox, start: int, length: int) -> None:
        """Take the part of a request that reports features."""
        request, rows = inbox.request, inbox.watched
        cut = 0 if request.watch_prompt else max(0, min(length, request.prompt_tokens - start))
        tokens = length - cut
        active = self.active[self.active_at : self.active_at + tokens * rows].reshape(tokens, rows)
        self.active_at += tokens * rows
        sites, k = len(request.top_k_sites), request.top_k
        size = tokens * sites * k
        latents, values = (a[self.top_at : self.top_at + size] for a in (self.latents, self.values))
        self.top_at += size
        # The worker writes site by site.
        latents, values = (a.reshape(sites, tokens, k).swapaxes(0, 1) for a in (latents, values))
        if tokens:
            inbox.chunks.append(Chunk(start + cut, active, latents, values))
