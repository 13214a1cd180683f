"""A request reads the same telemetry whether it takes it after every step or only at the end."""

import asyncio
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random
from sys import maxsize
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rudder.server.engine.telemetry.channel import Sender
from rudder.server.engine.telemetry.frame import Capture, Frame, TelemetryLost, mac, seal
from rudder.server.engine.telemetry.hub import MAX_RUN_FRAMES, Features, Hub, Inbox, column_sizes
from rudder.server.program import wire

ROW = wire.Row("sae", 1)
COLUMNS = ("flags", "statistics", "activations", "top_latents", "top_values")
K = 2


GATED = wire.Gate(((0, 0.5),), wire.Sequence(0))


@dataclass
class Running:
    """A request as the worker runs it, and what ran last at each position."""

    request: wire.Request
    position: int = 0
    flags: dict[int, list[int]] = field(default_factory=dict)
    statistics: dict[int, list[float]] = field(default_factory=dict)

    def preempt(self, resumed: int) -> None:
        """Go on at this position: the prefix cache holds what is before it."""
        self.position = resumed
        self.statistics = {end: values for end, values in self.statistics.items() if end <= resumed}

    def flagged_before(self, end: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tokens that each edit edited, and at which each gate was open, at positions before `end`."""
        edits, gates = flags_of(self.request)
        counts = [sum(flags[n] for at, flags in self.flags.items() if at < end) for n in range(edits + gates)]
        return tuple(counts[:edits]), tuple(counts[edits:])

    def statistics_at(self, end: int) -> tuple[float, ...]:
        """Statistics after the last step that ends by `end`."""
        ends = [at for at in self.statistics if at <= end]
        return tuple(self.statistics[max(ends)] if ends else [0.0] * statistics_of(self.request))

    def counted(self) -> tuple[object, ...]:
        """All that is counted before each position."""
        ends = range(100)
        computed = [sum(at < end for at in self.flags) for end in ends]
        return [self.flagged_before(e) for e in ends], [self.statistics_at(e) for e in ends], computed


def flags_of(request: wire.Request) -> tuple[int, int]:
    """Edits and gates of a request."""
    return sum(len(site.edits) for stage in request.stages for site in stage), len(request.gates())


def statistics_of(request: wire.Request) -> int:
    """Gates with a sequence condition."""
    return sum(bool(gate.sequence) for _, gate in request.gates())


def request_of(rng: Random) -> wire.Request:
    """A request that edits, has gates, watches, all of it or nothing."""
    edits = tuple(wire.Edit(0) for _ in range(rng.randint(0, 2)))
    watch = (0,) if rng.random() < 0.5 else ()
    gate = rng.choice([None, None, wire.Gate(((0, 0.5),)), GATED])
    sites = (wire.Site(0, (ROW,), edits, gate=gate, watch=watch),) if edits or watch or gate else ()
    policy = (wire.Site(0, (ROW,), (wire.Edit(0),), gate=GATED),) if rng.random() < 0.3 else ()
    top = (0, 2) if rng.random() < 0.3 else ()
    return wire.Request(rng.randint(1, 6), 99, False, (sites, policy), rng.random() < 0.5, K if top else 0, top)


def columns_of(running: Running, length: int, rng: Random) -> dict[str, np.ndarray]:
    """A request's part of a step's columns; each value encodes its position and row, so that a mix-up shows."""
    request = running.request
    cut = 0 if request.watch_prompt else max(0, min(length, request.prompt_tokens - running.position))
    tokens = np.arange(running.position + cut, running.position + length)
    watched = sum(len(site.watch) for site in request.stages[0])
    flags = np.array([[rng.randint(0, 1) for _ in range(sum(flags_of(request)))] for _ in range(length)], "u1")
    top = (
        tokens[None, :, None] * 100 + np.arange(len(request.top_k_sites))[:, None, None] * 10 + np.arange(request.top_k)
    )
    return {
        "flags": flags.reshape(length, sum(flags_of(request))),
        "statistics": np.array([rng.random() for _ in range(statistics_of(request))], "<f8"),
        "activations": np.repeat(tokens + 0.5, watched).astype("<f4"),
        "top_latents": top.astype("<i4").reshape(-1),
        "top_values": (top / 7).astype("<f4").reshape(-1),
    }


def step(batch: dict[int, Running], sequence: int, rng: Random) -> Frame:
    """A step of all requests; now and then one is preempted and goes on at any position that it has reached, or, with a
    prompt that another request has computed, at any within its prompt.
    """
    lengths = []
    parts: dict[str, list[bytes]] = {name: [] for name in COLUMNS}
    starts = []
    for running in batch.values():
        prompt = running.request.prompt_tokens
        if rng.random() < 0.1:
            # Whoever reads its prompt does not use the prefix cache.
            reads = running.request.watch_prompt
            running.preempt(0 if reads else rng.randint(0, max(running.position, prompt - 1)))
        # Tokens known before a preemption come in chunks, generated ones or not.
        known = max(prompt, *running.flags, 0) - running.position
        length = max(1, min(rng.randint(1, 4), known))
        columns = columns_of(running, length, rng)
        running.flags |= {running.position + i: flags for i, flags in enumerate(columns["flags"].tolist())}
        running.statistics[running.position + length] = columns["statistics"].tolist()
        for name, column in columns.items():
            parts[name].append(column.tobytes())
        starts.append(running.position)
        lengths.append(length)
        running.position += length
    columns_joined: Any = {name: b"".join(part) for name, part in parts.items()}
    handles = np.array(list(batch), "<i8").tobytes()
    at, size = (np.array(column, "<i4").tobytes() for column in (starts, lengths))
    return Frame(sequence, False, handles, at, size, **columns_joined)


def shortened(frames: list[Frame], rng: Random) -> list[Frame]:
    """The frames as a worker may send them: most of those that continue the last one do not name their requests."""
    result = frames[:1]
    for before, frame in pairwise(frames):
        starts, lengths, now = (np.frombuffer(c, "<i4") for c in (before.starts, before.lengths, frame.starts))
        same = all(getattr(before, name) == getattr(frame, name) for name in ("handles", "lengths"))
        if (
            same
            and column_sizes(before) == column_sizes(frame)
            and (now == starts + lengths).all()
            and rng.random() < 0.9
        ):
            frame = msgspec.structs.replace(frame, continues=True, handles=b"", starts=b"", lengths=b"")
        result.append(frame)
    return result


def read_whole(inbox: Inbox, taken: list[Features], ends: range) -> object:
    """All telemetry of an inbox, its features joined over all takes."""
    taken = [*taken, inbox.take(maxsize)]
    features = [
        (position, *(column[i].tolist() if len(column) else [] for column in part[1:]))
        for part in taken
        for i, position in enumerate(range(part.first, part.end))
    ]
    counted = (
        [inbox.flagged_before(end) for end in ends],
        [inbox.statistics_at(end) for end in ends],
        [inbox.computed_before(end) for end in ends],
    )
    return features, counted, inbox.first, inbox.num_computed_tokens


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 90), st.sampled_from([3, 256]))
def test_telemetry_does_not_depend_on_how_often_it_is_taken(seed: int, requests: int, steps: int, longest: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rudder.server.engine.telemetry.hub.MAX_RUN_FRAMES", longest)
        check_takes(seed, requests, steps)


def check_takes(seed: int, requests: int, steps: int) -> None:
    """Telemetry does not depend on when it is taken, and equals what the worker wrote."""
    rng, take_rng = Random(seed), Random(seed + 1)
    batch = {n + 1: Running(request_of(rng)) for n in range(requests)}
    hubs = [Hub(lambda _: None, lambda _: None) for _ in range(3)]
    every_step, now_and_then, at_the_end = ({n: hub.open(n, r.request) for n, r in batch.items()} for hub in hubs)
    taken: dict[int, list[Features]] = {id(inbox): [] for inbox in (*every_step.values(), *now_and_then.values())}
    for frame in shortened([step(batch, sequence, rng) for sequence in range(steps)], rng):
        for hub in hubs:
            hub.take(frame)
        for inbox in (*every_step.values(), *(i for i in now_and_then.values() if take_rng.random() < 0.2)):
            end = take_rng.choice([maxsize, inbox.num_computed_tokens - take_rng.randrange(4)])
            taken[id(inbox)].append(inbox.take(end))
            assert not len(taken[id(inbox)][-1].activations) or taken[id(inbox)][-1].end <= end
    for n, last in at_the_end.items():
        expected = read_whole(last, [], range(100))
        assert read_whole(every_step[n], taken[id(every_step[n])], range(100)) == expected
        assert read_whole(now_and_then[n], taken[id(now_and_then[n])], range(100)) == expected
        assert expected[1] == batch[n].counted()  # type: ignore[index]
        # Values encode their positions.
        for position, activations, _, _ in expected[0]:  # type: ignore[index]
            assert set(activations) <= {position + 0.5}


def test_steady_decoding_is_one_run_until_it_is_taken() -> None:
    rng = Random(0)
    batch = {
        1: Running(wire.Request(1, 99, False, ((wire.Site(0, (ROW,), (wire.Edit(0),), watch=(0,)),),)), position=5)
    }
    hub = Hub(lambda _: None, lambda _: None)
    inbox = hub.open(1, batch[1].request)
    rng.random = lambda: 1.0  # type: ignore[method-assign]
    frames = shortened([step(batch, sequence, rng) for sequence in range(10)], Random(1))
    assert [frame.continues for frame in frames] == [False] + [True] * 9
    for frame in frames:
        hub.take(frame)
    assert hub.run is not None
    assert len(hub.run.frames) == 10
    assert not inbox.chunks
    features = inbox.take(maxsize)
    assert (inbox.first, inbox.num_computed_tokens, list(range(features.first, features.end))) == (
        5,
        15,
        list(range(5, 15)),
    )


def test_frames_of_long_decoding_that_have_been_read_are_freed() -> None:
    hub = Hub(lambda _: None, lambda _: None)
    batch = {1: Running(wire.Request(1, 999, False, ((wire.Site(0, (ROW,), (), watch=(0,)),),)), position=5)}
    inbox = hub.open(1, batch[1].request)
    rng = Random(0)
    rng.random = lambda: 1.0  # type: ignore[method-assign]
    positions: list[int] = []
    frames = [step(batch, sequence, rng) for sequence in range(2 * MAX_RUN_FRAMES + 9)]
    rng.random = lambda: 0.0  # type: ignore[method-assign]
    for frame in shortened(frames, rng):
        hub.take(frame)
        features = inbox.take(maxsize)
        positions += range(features.first, features.end)
    assert hub.run is not None
    assert len(hub.run.frames) < MAX_RUN_FRAMES
    assert positions == list(range(5, 2 * MAX_RUN_FRAMES + 14))


@pytest.mark.parametrize("first", [True, False])
def test_a_frame_that_continues_another_batch_is_an_error(first: bool) -> None:
    hub = Hub(lambda _: None, lambda _: None)
    if not first:
        hub.take(step({1: Running(wire.Request(1, 99, False, ((),)), position=7)}, 0, Random(0)))
    with pytest.raises(TelemetryLost, match="continues another batch"):
        hub.take(Frame(1, True, activations=b"\0" * 400))


def test_captures_are_held_by_their_inbox_alone() -> None:
    hub = Hub(lambda _: None, lambda _: None)
    inbox = hub.open(1, wire.Request(1, 99, False, ((),), capture=True))
    capture = Capture(1, 0, b"before", b"after")
    frames = [step({1: Running(inbox.request, position=position)}, position, Random(0)) for position in (5, 6)]
    for frame in shortened(frames, Random(1)):
        hub.take(msgspec.structs.replace(frame, captures=(capture,)))
    assert inbox.captures == [capture, capture]
    assert hub.run is not None
    assert [frame.captures for frame in hub.run.frames] == [(), ()]


async def test_columns_of_a_request_without_an_inbox_are_not_read_as_anothers(tmp_path: Path) -> None:
    rng = Random(0)
    request = wire.Request(1, 99, False, ((wire.Site(0, (ROW,), (), watch=(0,)),),))
    hub = Hub(lambda _: None, lambda _: None)
    worker = connected(hub, tmp_path)
    hub.open(2, request)
    worker.send(step({1: Running(request, position=5), 2: Running(request, position=7)}, 0, rng))
    hub.receive()
    assert "columns of other requests" in str(hub.lost)


def test_features_with_a_gap_between_them_are_an_error() -> None:
    inbox = Inbox(wire.Request(1, 99, False, ((wire.Site(0, (ROW,), (), watch=(0,)),),)))
    inbox.chunks += [inbox.empty._replace(first=first, activations=np.ones((2, 1), np.float32)) for first in (3, 6)]
    with pytest.raises(TelemetryLost, match="after 3"):
        inbox.take(maxsize)


def connected(hub: Hub, folder: Path) -> Sender:
    """The worker's end of the hub's channel."""
    hub.bind(f"{folder}/telemetry")
    worker = Sender(f"{folder}/telemetry", hub.key)
    hub.channel.accept()
    return worker


async def test_a_gap_on_the_channel_wakes_all_waiting_calls(tmp_path: Path) -> None:
    hub = Hub(lambda _: None, lambda _: None)
    worker = connected(hub, tmp_path)
    task = asyncio.create_task(hub.listen())
    worker.send(Frame(0))
    worker.send(Frame(2))
    await asyncio.wait_for(task, 5)
    assert hub.arrived.is_set()
    assert "frame 2 came where 1 was due" in str(hub.lost)


async def test_awaited_frames_are_received_as_they_arrive(tmp_path: Path) -> None:
    hub = Hub(lambda _: None, lambda _: None)
    worker = connected(hub, tmp_path)
    # `listen` does not run: frames are received because they are awaited.
    with hub.awaited(), hub.awaited():
        for number in range(5):
            worker.send(Frame(number))
            await asyncio.wait_for(hub.arrived.wait(), 5)
            hub.arrived.clear()
            assert hub.channel.expected == number + 1
    worker.send(Frame(5))
    await asyncio.sleep(0.05)
    assert hub.channel.expected == 5
    with hub.awaited():
        await asyncio.wait_for(hub.arrived.wait(), 5)
    assert hub.channel.expected == 6


@pytest.mark.parametrize("end", ["dead", "lost"])
async def test_a_closed_hub_does_not_keep_the_event_loop_busy(tmp_path: Path, end: str) -> None:
    hub = Hub(lambda _: None, lambda _: None)
    sender = connected(hub, tmp_path)
    calls = 0
    receive = hub.receive

    def counted() -> None:
        nonlocal calls
        calls += 1
        receive()

    hub.receive = counted  # type: ignore[method-assign]
    with hub.awaited():
        sender.send_message(b"no frame") if end == "lost" else sender.socket.close()
        await asyncio.sleep(0.02)
        if end == "lost":
            sender.send_message(b"another")
        await asyncio.sleep(0.05)
    with hub.awaited():
        await asyncio.sleep(0.05)
    assert hub.closed
    assert calls == 1


def test_rejected_edits_count_once_per_position() -> None:
    """Tokens that are computed again after a preemption are rejected again; frames of other requests are not read."""
    hub = Hub(lambda _: None, lambda _: None)
    site = wire.Site(0, (wire.Row("b", 1),), (wire.Edit(0), wire.Edit(0)))
    inbox = hub.open(3, wire.Request(4, 9, False, ((site,),)))
    assert inbox.rejected_before(9) == (0, 0)
    columns = [(3, 0, 1), (3, 1, 1), (3, 5, 0), (8, 1, 1)], [(3, 1, 1), (3, 2, 1), (3, 9, 0)]
    for sequence, records in enumerate(columns):
        hub.take(Frame(sequence, rejected=np.array(records, "<i8").tobytes()))
    assert [inbox.rejected_before(end) for end in (0, 1, 3, 9, 20)] == [(0, 0), (0, 1), (0, 3), (1, 3), (1, 3)]
    first = [[inbox.first_rejected(edits, end) for end in (0, 1, 6)] for edits in (range(1), range(1, 2), range(0))]
    assert first == [[None, None, 5], [None, 0, 0], [None, None, None]]


def test_tokens_before_the_point_of_resumption_stay_counted() -> None:
    """A prompt of 6 tokens, preempted after 3 generated ones, resumed at position 4 from the prefix cache."""
    hub = Hub(lambda _: None, lambda _: None)
    request = wire.Request(6, 99, False, ((wire.Site(0, (ROW,), (wire.Edit(0),)),),))
    inbox = hub.open(1, request)
    steps = [(0, 6), (6, 1), (7, 1), (8, 1), (4, 5), (9, 1)]
    for sequence, (start, length) in enumerate(steps):
        at, size = (np.array([value], "<i4").tobytes() for value in (start, length))
        hub.take(Frame(sequence, False, np.array([1], "<i8").tobytes(), at, size, flags=b"\1" * length))
        # Also while tokens are computed again.
        assert inbox.flagged_before(10) == ((max(s + n for s, n in steps[: sequence + 1]),), ())
    assert inbox.computed_before(10) == 10
    assert [inbox.flagged_before(end)[0] for end in range(10)] == [(end,) for end in range(10)]


def test_a_prefix_that_another_request_computed_is_not_counted() -> None:
    """Preempted in its prompt after 2 tokens, and resumed behind what another request has computed meanwhile."""
    hub = Hub(lambda _: None, lambda _: None)
    inbox = hub.open(1, wire.Request(8, 99, False, ((wire.Site(0, (ROW,), (wire.Edit(0),)),),)))
    for sequence, (start, length) in enumerate([(0, 2), (5, 3), (8, 1)]):
        at, size = (np.array([value], "<i4").tobytes() for value in (start, length))
        hub.take(Frame(sequence, False, np.array([1], "<i8").tobytes(), at, size, flags=b"\1" * length))
    assert (inbox.first, inbox.num_computed_tokens, inbox.computed_before(9)) == (0, 9, 6)
    assert inbox.flagged_before(9) == ((6,), ())


@pytest.mark.parametrize("kind", ["forged", "malformed", "truncated column"])
async def test_a_frame_that_cannot_be_read_is_a_loss(tmp_path: Path, kind: str) -> None:
    hub = Hub(lambda _: None, lambda _: None)
    worker = connected(hub, tmp_path)
    if kind == "forged":
        worker.send_message(seal(Frame(0), b"another key"))
    elif kind == "malformed":
        worker.send_message(mac(b"no frame", hub.key) + b"no frame")
    else:
        worker.send(Frame(0, False, b"\0" * 7, b"\0" * 4, b"\0" * 4))
    worker.send(Frame(worker.sequence))
    hub.receive()
    assert isinstance(hub.lost, TelemetryLost)
    assert hub.ended.is_set()
    assert hub.arrived.is_set()


async def test_listening_ends_when_the_worker_closes_the_channel(tmp_path: Path) -> None:
    hub = Hub(lambda _: None, lambda _: None)
    worker = connected(hub, tmp_path)
    listening = asyncio.create_task(hub.listen())
    worker.send(Frame(0))
    await asyncio.sleep(0)
    worker.socket.close()
    await asyncio.wait_for(listening, 5)
    assert (hub.closed, hub.lost, hub.channel.expected) == (True, None, 1)
