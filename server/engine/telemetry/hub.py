"""Receives the worker's frames and gives every request its part of them.

Steady decoding sends frame after frame of the same shape, and parsing each of them for each request would cost the
server more than anything else that it does per token. So frames stay in the socket until a call needs its features, and
are then stored unparsed, as runs: at the start of a run, each request is assigned its span of the columns once, and its
values are read from there only when it takes them.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import msgspec
import numpy as np

from rudder.server.engine.telemetry.channel import Receiver
from rudder.server.engine.telemetry.frame import PINNED, REJECTED, Array, Capture, Frame, TelemetryLost, column
from rudder.server.program import wire

# Cap on the frames retained per run. A run ends there although its batch goes on, so that frames that every request has
# read are freed.
MAX_RUN_FRAMES = 256
# Interval at which frames are received while no call waits for one: waking up for each of them would take cores from
# the model.
POLL_S = 0.25
logger = logging.getLogger(__name__)


class Features(NamedTuple):
    """Features of n consecutive tokens from position `first` on.

    activations [n, rows], top_latents and top_values [n, sites, k]; those that the request did not ask for have no
    tokens.
    """

    first: int
    activations: Array
    top_latents: Array
    top_values: Array

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.first + len(self.activations)

    def reordered(self, columns: tuple[int, ...] | None) -> "Features":
        """Put the columns of `activations` in this order; None: leave them as they are."""
        return self if columns is None else self._replace(activations=self.activations[:, list(columns)])

    def between(self, begin: int, end: int) -> "Features":
        """Select the tokens at positions begin <= p < end."""
        begin = max(begin, self.first)
        cut = slice(begin - self.first, max(end - self.first, 0))
        return Features(begin, self.activations[cut], self.top_latents[cut], self.top_values[cut])


def joined(chunks: Sequence[Features]) -> Features:
    """Concatenate chunks. Raises TelemetryLost if positions are missing between them."""
    if any(chunk.first != before.end for before, chunk in pairwise(chunks)):
        raise TelemetryLost(f"features of positions after {chunks[0].first} are missing")
    firsts, *columns = zip(*chunks, strict=True)
    return Features(firsts[0], *map(np.concatenate, columns))


def no_features(rows: int, sites: int, k: int) -> Features:
    """Return features of no tokens."""
    top = np.zeros((0, sites, k), np.float32)
    return Features(0, np.zeros((0, rows), np.float32), top, top)


class Run:
    """Consecutive frames of one batch: the same requests in the same order, each continuing where it stopped."""

    def __init__(self, frame: Frame, handles: Array, starts: Array, lengths: Array) -> None:
        self.frames = [frame]
        self.handles, self.starts, self.lengths = handles, starts, lengths
        self.columns: dict[str, tuple[int, Array]] = {}

    def next_starts(self) -> Array:
        """Positions of the requests' first tokens in the frame after the last one."""
        starts: Array = self.starts + len(self.frames) * self.lengths
        return starts

    def column(self, name: str, dtype: str, first: int) -> Array:
        """Join a column of the frames from number `first` on, [frames, size].

        Cached: in steady decoding all requests of the batch read the same frames, and only the first of them joins.
        """
        frames = len(self.frames) - first
        cached = self.columns.get(name)
        if cached is None or cached[0] != len(self.frames) or len(cached[1]) != frames:
            data = b"".join(getattr(frame, name) for frame in self.frames[first:])
            cached = self.columns[name] = len(self.frames), column(data, dtype).reshape(frames, -1)
        return cached[1]


@dataclass(slots=True)
class Span:
    """The part of a run that belongs to one request: `length` tokens per frame, the first of all at position `start`.

    `unreported`: tokens at the front of each frame whose features are not reported. flags, statistics, activations,
    top: where the request's values are in these columns of each frame. `frames_read`: frames whose features have been
    read.
    """

    run: Run
    start: int
    length: int
    unreported: int
    flags: slice
    statistics: slice
    activations: slice
    top: slice
    frames_read: int = 0

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + self.length * len(self.run.frames)


@dataclass
class Inbox:
    """Telemetry of one request, joined by position.

    A preempted request computes tokens again, from position 0 or from where the prefix cache ends. Whatever is counted
    is counted once per position, as it was computed last: `computed`, `flags` and `statistics` hold no position twice.

    `delivered`: position after the last token whose features ever entered `chunks`. Of former spans, `computed`:
    intervals (begin, end) of positions, the order being that of the spans; `flags`: (first position, flags [tokens,
    edits + gates]); `statistics`: (position after each step [n], statistics [n, gates with a sequence condition]).
    """

    request: wire.Request
    span: Span | None = None
    chunks: list[Features] = field(default_factory=list)
    delivered: int = 0
    computed: list[tuple[int, int]] = field(default_factory=list)
    flags: list[tuple[int, Array]] = field(default_factory=list)
    statistics: list[tuple[Array, Array]] = field(default_factory=list)
    captures: list[Capture] = field(default_factory=list)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    # Whether each edit was rejected at each position, [edits, positions]; computed again, it is rejected again.
    rejected: Array | None = None

    def __post_init__(self) -> None:
        stages = self.request.stages
        gates = self.request.gates()
        # Activations reported per token, flags per token, and statistics per step.
        self.watched = sum(len(site.watch) for site in stages[0])
        self.edits = sum(len(s.edits) + bool(s.blend) for stage in stages for s in stage)
        self.flags_per_token = self.edits + len(gates)
        self.statistics_per_step = sum(bool(gate.sequence) for _, gate in gates)
        # Position after the last token of all former spans.
        self.max_computed = 0
        self.top = (len(self.request.top_k_sites), self.request.top_k)
        self.reports = bool(self.watched or self.request.top_k_sites)
        self.empty = no_features(self.watched, *self.top)

    @property
    def num_computed_tokens(self) -> int:
        """Tokens computed and received, as vLLM counts them: the position after the last one."""
        return self.span.end if self.span else 0

    @property
    def covered(self) -> int:
        """Position before which all tokens have been reported, also while a preempted request computes them again."""
        return max(self.max_computed, self.num_computed_tokens)

    @property
    def first(self) -> int:
        """Position of the first token computed, -1 before that."""
        return min((begin for begin, _ in self.intervals()), default=-1)

    def unreported(self, start: int, length: int) -> int:
        """Count the tokens at the front of a step's part that are prompt and not reported."""
        prompt = 0 if self.request.watch_prompt else self.request.prompt_tokens
        return max(0, min(length, prompt - start))

    def begin_span(self, span: Span) -> None:
        """Continue with the span of a new run. After a preemption it starts before the last one ended."""
        self.read_span()
        if self.span:
            self.end_span(self.span)
        self.span = span

    def end_span(self, span: Span) -> None:
        """Join what a span counts with what former spans counted, in place of what they counted at its positions."""
        begin, end = span.start, span.end
        if begin < self.max_computed:
            self.computed = without_interval(self.computed, begin, end)
            self.flags = without_positions(self.flags, begin, end)
            self.statistics = [(ends[ends <= begin], values[ends <= begin]) for ends, values in self.statistics]
        self.max_computed = max(self.max_computed, end)
        if self.computed and self.computed[-1][1] == begin:
            self.computed[-1] = self.computed[-1][0], end
        else:
            self.computed.append((begin, end))
        if self.flags_per_token:
            self.flags.append((begin, self.flags_in(span)))
        if self.statistics_per_step:
            self.statistics.append(self.statistics_in(span))

    def flags_in(self, span: Span) -> Array:
        """Return the flags of a span's tokens, [tokens, edits + gates]."""
        flags: Array = span.run.column("flags", "u1", 0)[:, span.flags].reshape(-1, self.flags_per_token)
        return flags

    def statistics_in(self, span: Span) -> tuple[Array, Array]:
        """Return (position after each step [n], statistics [n, gates with a sequence condition])."""
        steps = np.arange(1, len(span.run.frames) + 1)
        return span.start + span.length * steps, span.run.column("statistics", "<f8", 0)[:, span.statistics]

    def read_span(self) -> None:
        """Read the features of the span's frames that have arrived since the last call."""
        span = self.span
        if span is None or not self.reports:
            return
        frames_read, span.frames_read = span.frames_read, len(span.run.frames)
        tokens = span.length - span.unreported
        total = tokens * (span.frames_read - frames_read)
        if not total:
            return
        activations = span.run.column("activations", "<f4", frames_read)[:, span.activations]
        if tokens > 1:
            activations = activations.reshape(total, self.watched)
        top = self.read_top(span, frames_read) if self.request.top_k_sites else self.empty[2:]
        first = span.start + frames_read * span.length + span.unreported
        self.append(Features(first, activations, *top), first + total)

    def read_top(self, span: Span, first: int) -> tuple[Array, Array]:
        """Read (latents, values) of the frames from `first` on, [n, sites, k]; the worker writes site by site."""
        sites, k = self.top
        shape = (-1, sites, span.length - span.unreported, k)
        columns = (span.run.column(*name, first) for name in (("top_latents", "<i4"), ("top_values", "<f4")))
        latents, values = (column[:, span.top].reshape(shape).swapaxes(1, 2) for column in columns)
        return latents.reshape(-1, sites, k), values.reshape(-1, sites, k)

    def append(self, features: Features, end: int) -> None:
        """Append features up to the position `end`, without those that a preempted request computed a second time."""
        if end > self.delivered:
            again = features.first < self.delivered
            self.chunks.append(features.between(self.delivered, end) if again else features)
            self.delivered = end

    def take(self, end: int) -> Features:
        """Return the features of positions before `end` that have arrived since the last take; later ones wait.

        An asynchronous scheduler runs a token before it is known whether the call goes on with it. Raises TelemetryLost
        if positions are missing.
        """
        self.read_span()
        chunks, self.chunks = self.chunks, []
        if not chunks:
            return self.empty
        features = joined(chunks) if len(chunks) > 1 else chunks[0]
        if features.end <= end:
            return features
        self.chunks = [features.between(end, features.end)]
        return features.between(features.first, end)

    def intervals(self) -> list[tuple[int, int]]:
        """Return the intervals (begin, end) of positions that were computed; none overlap."""
        if self.span is None:
            return self.computed
        begin, end = self.span.start, self.span.end
        return [*without_interval(self.computed, begin, end), (begin, end)]

    def computed_before(self, end: int) -> int:
        """Count the positions before `end` whose tokens were computed."""
        return sum(max(0, min(stop, end) - begin) for begin, stop in self.intervals())

    def flagged_before(self, end: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Count the tokens at positions before `end` that each edit edited, and at which each gate was open."""
        flags, span = self.flags, self.span
        if span and self.flags_per_token:
            flags = [*without_positions(flags, span.start, span.end), (span.start, self.flags_in(span))]
        counts = np.zeros(self.flags_per_token, np.int64)
        for first, part in flags:
            counts += part[: max(0, end - first)].sum(0, dtype=np.int64)
        return tuple(counts[: self.edits].tolist()), tuple(counts[self.edits :].tolist())

    def statistics_at(self, end: int) -> tuple[float, ...]:
        """Return the statistic of each gate with a sequence condition after the last step that ends by `end`."""
        statistics, span = self.statistics, self.span
        if span and self.statistics_per_step:
            former = [(ends[ends <= span.start], values[ends <= span.start]) for ends, values in statistics]
            statistics = [*former, self.statistics_in(span)]
        for ends, values in reversed(statistics):
            if (ends <= end).any():
                return tuple(values[ends <= end][-1].tolist())
        return (0.0,) * self.statistics_per_step

    def reject(self, positions: Array, edits: Array) -> None:
        """Note that edits [n], by number, were rejected at positions [n]."""
        if self.rejected is None:
            self.rejected = np.zeros((self.edits, self.request.max_tokens), bool)
        # An asynchronous scheduler may run a token beyond the last one, whose result it discards.
        within = positions < self.rejected.shape[1]
        self.rejected[edits[within], positions[within]] = True

    def first_rejected(self, edits: range, end: int) -> int | None:
        """Return the first position before `end` at which one of these edits was rejected, if there is one."""
        if self.rejected is None or not edits:
            return None
        positions = np.flatnonzero(self.rejected[edits.start : edits.stop, : max(0, end)].any(0))
        return int(positions[0]) if len(positions) else None

    def rejected_before(self, end: int) -> tuple[int, ...]:
        """Count the tokens at positions before `end` at which each edit was rejected."""
        if self.rejected is None:
            return (0,) * self.edits
        return tuple(self.rejected[:, : max(0, end)].sum(1).tolist())


async def wait_for_event(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event at most `seconds`; return whether it is set."""
    waiter = asyncio.ensure_future(event.wait())
    await asyncio.wait([waiter], timeout=seconds)
    waiter.cancel()
    return event.is_set()


def without_interval(intervals: list[tuple[int, int]], begin: int, end: int) -> list[tuple[int, int]]:
    """Cut the positions begin <= p < end out of intervals (begin, end)."""
    parts = [part for start, stop in intervals for part in ((start, min(stop, begin)), (max(start, end), stop))]
    return [(start, stop) for start, stop in parts if start < stop]


def without_positions(parts: list[tuple[int, Array]], begin: int, end: int) -> list[tuple[int, Array]]:
    """Cut the positions begin <= p < end out of (first position, values by position)."""
    result = []
    for first, values in parts:
        if first < begin:
            result.append((first, values[: begin - first]))
        if first + len(values) > end:
            result.append((max(first, end), values[max(0, end - first) :]))
    return result


class Hub:
    """The server's end of telemetry: the inboxes of all requests in flight.

    Calls `on_totals` with each step's totals of the pinned rows [pinned rows, len(PINNED)], and `on_request_finished`
    with the handle of each request that holds no resources in the worker any more.
    """

    def __init__(self, on_totals: Callable[[Array], None], on_request_finished: Callable[[int], None]) -> None:
        self.on_totals, self.on_request_finished = on_totals, on_request_finished
        self.key = secrets.token_bytes(32)
        self.inboxes: dict[int, Inbox] = {}
        self.run: Run | None = None
        self.arrived = asyncio.Event()
        self.waiters = 0
        # Frames taken in: the engine's progress.
        self.frames = 0
        self.lost: TelemetryLost | None = None
        self.ended = asyncio.Event()

    def bind(self, address: str) -> None:
        """Listen for the worker, whose frames are sealed with `key`, at the path of a Unix socket."""
        self.channel = Receiver(address, self.key)

    @property
    def closed(self) -> bool:
        """Whether no more frames are received: telemetry is lost, or the worker has closed the channel."""
        return self.lost is not None or self.channel.disconnected

    def open(self, handle: int, request: wire.Request) -> Inbox:
        """Open the inbox of a request, before the worker sees it."""
        inbox = self.inboxes[handle] = Inbox(request)
        return inbox

    async def listen(self) -> None:
        """Receive, from time to time, the frames that no call waits for, until no more are received."""
        while not self.closed:
            self.receive()
            await wait_for_event(self.ended, POLL_S)

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Within this context, receive frames as they arrive."""
        loop = asyncio.get_running_loop()
        if not self.waiters and not self.closed:
            loop.add_reader(self.channel.socket, self.receive)
        self.waiters += 1
        try:
            yield
        finally:
            self.waiters -= 1
            if not self.waiters:
                loop.remove_reader(self.channel.socket)

    def receive(self) -> None:
        """Receive all frames that have arrived. A lost one fails every request in flight and all that follow.

        A frame that cannot be read, for whatever reason, is lost.
        """
        if self.lost is None:
            try:
                for frame in self.channel.frames():
                    self.arrived.set()
                    self.take(frame)
            except TelemetryLost as lost:
                self.lose(str(lost))
            except Exception as error:
                self.lose(f"a telemetry frame that cannot be read: {type(error).__name__}: {error}")
        if self.closed:
            self.ended.set()
            self.arrived.set()
            # A socket at its end is always readable: the loop would call this function without pause.
            asyncio.get_running_loop().remove_reader(self.channel.socket)

    def lose(self, cause: str) -> TelemetryLost:
        """Receive no more frames; return the loss."""
        logger.error("telemetry lost, every request in flight fails: %s", cause)
        self.lost = TelemetryLost(cause)
        return self.lost

    def take(self, frame: Frame) -> None:
        """Take in a frame. Its columns are read when a request needs them."""
        self.frames += 1
        for capture in frame.captures:
            if inbox := self.inboxes.get(capture.handle):
                inbox.captures.append(capture)
        if frame.rejected:
            self.note_rejected(column(frame.rejected, "<i8").reshape(-1, len(REJECTED)))
        if frame.captures or frame.rejected:
            # Residuals are large, and a run may retain its frames for long.
            frame = msgspec.structs.replace(frame, captures=(), rejected=b"")
        if frame.continues:
            self.extend_run(frame)
        elif frame.handles:
            self.begin_run(frame, *map(column, (frame.handles, frame.starts, frame.lengths), ("<i8", "<i4", "<i4")))
        if frame.pinned:
            self.on_totals(column(frame.pinned, "<f8").reshape(-1, len(PINNED)))
        for handle in column(frame.released, "<i8").tolist():
            if inbox := self.inboxes.pop(handle, None):
                inbox.released.set()
            self.on_request_finished(handle)

    def note_rejected(self, rejected: Array) -> None:
        """Give the requests of a frame the edits [n, len(REJECTED)] that were rejected."""
        handles, positions, edits = rejected.T
        for handle in np.unique(handles).tolist():
            if inbox := self.inboxes.get(handle):
                inbox.reject(positions[handles == handle], edits[handles == handle])

    def extend_run(self, frame: Frame) -> None:
        """Append a frame that continues the run, or begin a new run with it where this one is full."""
        run = self.run
        if run is None or column_sizes(frame) != column_sizes(run.frames[-1]):
            raise TelemetryLost("a telemetry frame that continues another batch than that of the frame before it")
        if len(run.frames) < MAX_RUN_FRAMES:
            run.frames.append(frame)
        else:
            self.begin_run(frame, run.handles, run.next_starts(), run.lengths)

    def begin_run(self, frame: Frame, handles: Array, starts: Array, lengths: Array) -> None:
        """Begin a run and give every request its span, in the order in which the worker writes them."""
        run = self.run = Run(frame, handles, starts, lengths)
        flags = statistics = activations = top = 0
        for handle, start, length in zip(handles.tolist(), starts.tolist(), lengths.tolist(), strict=True):
            if inbox := self.inboxes.get(handle):
                unreported = inbox.unreported(start, length)
                tokens, (sites, k) = length - unreported, inbox.top
                begins = flags, statistics, activations, top
                flags += length * inbox.flags_per_token
                statistics += inbox.statistics_per_step
                activations += tokens * inbox.watched
                top += tokens * sites * k
                ends = flags, statistics, activations, top
                f, s, a, t = map(slice, begins, ends)
                inbox.begin_span(Span(run, start, length, unreported, f, s, a, t))
        # A request that has values here but no inbox would shift the spans of all that follow it.
        if (flags, 8 * statistics, 4 * activations, 4 * top) != column_sizes(frame):
            raise TelemetryLost("a telemetry frame with columns of other requests than those that it names")


def column_sizes(frame: Frame) -> tuple[int, int, int, int]:
    """Bytes of each column that is divided among requests."""
    return len(frame.flags), len(frame.statistics), len(frame.activations), len(frame.top_values)
