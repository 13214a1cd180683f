"""Receives the worker's frames and hands every request its part.

Steady decoding sends frame after frame of the same shape. They lie in the socket until someone asks and are kept as
they came: a request is told once where its values stand in them, and reads them there when it wants them.
"""

import asyncio
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import msgspec
import numpy as np

from rudder.server.engine.telemetry.channel import Receiver
from rudder.server.engine.telemetry.frame import Array, Capture, Frame, TelemetryLost, column, unseal
from rudder.server.program import wire

# Frames of one run at most, so that those of which everything has been read are forgotten.
LONGEST_RUN = 256
# Frames that nobody awaits are taken in this often: a wake-up for each of them would take the model's cores from it.
UNASKED_S = 0.25


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


class Run:
    """Consecutive frames of one shape: the same requests in the same order, each going on where it stopped."""

    def __init__(self, frame: Frame, handles: Array, starts: Array, lengths: Array) -> None:
        self.frames = [frame]
        self.handles, self.starts, self.lengths = handles, starts, lengths
        self.read: dict[str, tuple[int, Array]] = {}

    def next_starts(self) -> Array:
        """Where the requests go on after the last frame."""
        starts: Array = self.starts + len(self.frames) * self.lengths
        return starts

    def column(self, name: str, dtype: str, begin: int) -> Array:
        """A column of the frames from number `begin` on, [n, size]: put together once for all requests that ask."""
        frames = len(self.frames) - begin
        read = self.read.get(name)
        if read is None or read[0] != len(self.frames) or len(read[1]) != frames:
            data = b"".join(getattr(frame, name) for frame in self.frames[begin:])
            read = self.read[name] = len(self.frames), column(data, dtype).reshape(frames, -1)
        return read[1]


@dataclass(slots=True)
class Part:
    """What a request has of a run: `length` tokens a step from position `start` on, the first `cut` of each step
    unreported, and where its values stand in the columns. `told`: frames whose features have been taken.
    """

    run: Run
    start: int
    length: int
    cut: int
    moved: slice
    active: slice
    top: slice
    told: int = 0


@dataclass
class Inbox:
    """A request's telemetry, joined by position. `delivered`: the position after the last token in `chunks`, ever.

    `moved`: (positions after each step [n], tokens that each edit touched in it [n, edits]) of former parts.
    """

    request: wire.Request
    first: int = -1
    part: Part | None = None
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

    @property
    def covered(self) -> int:
        """The position after the last token that ran."""
        part = self.part
        return part.start + part.length * len(part.run.frames) if part else 0

    def unreported(self, start: int, length: int) -> int:
        """Prompt tokens at the front of a step's part that are not reported."""
        prompt = 0 if self.request.watch_prompt else self.request.prompt_tokens
        return max(0, min(length, prompt - start))

    def enter(self, part: Part) -> None:
        """Go on with the part of a new run, which begins earlier than the last one ended after a preemption."""
        self.read()
        if self.part and self.edits:
            self.moved.append(self.moved_in(self.part))
        if part.start < self.covered:
            self.moved = [(ends[ends <= part.start], counts[ends <= part.start]) for ends, counts in self.moved]
        self.first = part.start if self.first < 0 else min(self.first, part.start)
        self.part = part

    def moved_in(self, part: Part) -> tuple[Array, Array]:
        """(positions after each step [n], tokens that each edit touched in it [n, edits])."""
        steps = np.arange(1, len(part.run.frames) + 1)
        return part.start + part.length * steps, part.run.column("moved", "<i4", 0)[:, part.moved]

    def read(self) -> None:
        """Take in the features that have come with the part."""
        part = self.part
        if part is None or not self.reports:
            return
        told, part.told = part.told, len(part.run.frames)
        tokens = part.length - part.cut
        total = tokens * (part.told - told)
        if not total:
            return
        active = part.run.column("active", "<f4", told)[:, part.active]
        if tokens > 1:
            active = active.reshape(total, self.watched)
        latents, values = self.read_top(part, told) if self.request.top_k_sites else self.nothing[2:]
        first = part.start + told * part.length + part.cut
        self.add(Features(first, active, latents, values), first + total)

    def read_top(self, part: Part, told: int) -> tuple[Array, Array]:
        """(latents, values) [n * tokens, sites, k]; the worker writes site by site."""
        shape = (-1, self.top[0], part.length - part.cut, self.top[1])
        columns = (part.run.column(*name, told) for name in (("top_latents", "<i4"), ("top_values", "<f4")))
        latents, values = (column[:, part.top].reshape(shape).swapaxes(1, 2) for column in columns)
        return latents.reshape(-1, *self.top), values.reshape(-1, *self.top)

    def add(self, features: Features, end: int) -> None:
        """Keep features, to the position `end`, to be taken. What ran again after a preemption is not told twice."""
        if end > self.delivered:
            again = features.first < self.delivered
            self.chunks.append(features.between(self.delivered, end) if again else features)
            self.delivered = end

    def take(self) -> Features:
        """What has come since the last take."""
        self.read()
        parts, self.chunks = self.chunks, []
        if len(parts) < 2:
            return parts[0] if parts else self.nothing
        if any(part.first != before.end for before, part in pairwise(parts)):
            raise TelemetryLost(f"features of positions after {parts[0].first} are missing")
        firsts, *columns = zip(*parts, strict=True)
        return Features(firsts[0], *map(np.concatenate, columns))

    def moved_before(self, end: int) -> tuple[int, ...]:
        """Tokens touched per edit among positions before `end`."""
        moved = [*self.moved, self.moved_in(self.part)] if self.part and self.edits else self.moved
        counts = [np.zeros(self.edits, np.int64), *(count[ends <= end].sum(0) for ends, count in moved)]
        return tuple(np.sum(counts, axis=0).tolist())


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
                self.take(unseal(message, self.key, self.expected))
            except TelemetryLost as lost:
                self.lost = lost
                break
            self.expected += 1
        if self.over:
            asyncio.get_running_loop().remove_reader(self.channel.socket)

    def take(self, frame: Frame) -> None:
        """Take in a frame; its columns are read when someone asks."""
        for capture in frame.captures:
            if inbox := self.inboxes.get(capture.handle):
                inbox.captures.append(capture)
        if frame.captures:
            # They are large, and a run is long.
            frame = msgspec.structs.replace(frame, captures=())
        if frame.goes_on:
            self.go_on(frame)
        elif frame.handles:
            self.begin(frame, *map(column, (frame.handles, frame.starts, frame.lengths), ("<i8", "<i4", "<i4")))
        if frame.pinned:
            self.totals(column(frame.pinned, "<f8").reshape(-1, 4))
        for handle in column(frame.released, "<i8").tolist():
            if inbox := self.inboxes.pop(handle, None):
                inbox.released.set()
            self.on_released(handle)

    def go_on(self, frame: Frame) -> None:
        """Keep a frame with those before it."""
        run = self.run
        if run is None or shape(frame) != shape(run.frames[-1]):
            raise TelemetryLost("a telemetry frame that goes on with something else than what was before it")
        if len(run.frames) < LONGEST_RUN:
            run.frames.append(frame)
        else:
            self.begin(frame, run.handles, run.next_starts(), run.lengths)

    def begin(self, frame: Frame, handles: Array, starts: Array, lengths: Array) -> None:
        """Begin a run: give every request its part, in the order in which the worker writes them."""
        run = self.run = Run(frame, handles, starts, lengths)
        moved = active = top = 0
        for handle, start, length in zip(handles.tolist(), starts.tolist(), lengths.tolist(), strict=True):
            if inbox := self.inboxes.get(handle):
                cut = inbox.unreported(start, length)
                tokens, (sites, k) = length - cut, inbox.top
                ends = moved + inbox.edits, active + tokens * inbox.watched, top + tokens * sites * k
                here = slice(moved, ends[0]), slice(active, ends[1]), slice(top, ends[2])
                inbox.enter(Part(run, start, length, cut, *here))
                moved, active, top = ends
        if (4 * moved, 4 * active, 4 * top) != shape(frame):
            raise TelemetryLost("a telemetry frame with columns of other requests than those that it names")


def shape(frame: Frame) -> tuple[int, int, int]:
    """Bytes of each column that is divided among requests."""
    return len(frame.moved), len(frame.active), len(frame.top_values)
