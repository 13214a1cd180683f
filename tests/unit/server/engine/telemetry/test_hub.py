"""What requests are told of frames is the same whether they ask after every step or only at the end."""

import asyncio
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rudder.server.engine.telemetry.frame import Capture, Frame, TelemetryLost
from rudder.server.engine.telemetry.hub import LONGEST_RUN, Features, Hub, Inbox, shape
from rudder.server.engine.worker.worker import Channel
from rudder.server.program import wire

ROW = wire.Row("sae", 1)
K = 2


@dataclass
class Running:
    """A request as the worker runs it."""

    request: wire.Request
    at: int = 0
    moved: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def moved_before(self, end: int) -> tuple[int, ...]:
        """Tokens touched per edit before `end`: of what was computed again, only the last time counts."""
        edits = sum(len(site.edits) for site in self.request.stages[0])
        return tuple(sum((moved for at, moved in self.moved if at <= end), np.zeros(edits, int)).tolist())


def request_of(rng: Random) -> wire.Request:
    """A request that edits, watches, both or neither."""
    edits = tuple(wire.Edit(0) for _ in range(rng.randint(0, 2)))
    watch = (0,) if rng.random() < 0.5 else ()
    sites = (wire.Site(0, (ROW,), edits, watch=watch),) if edits or watch else ()
    top = (0, 2) if rng.random() < 0.3 else ()
    return wire.Request(rng.randint(1, 6), 99, False, (sites,), rng.random() < 0.5, K if top else 0, top)


def part_of(running: Running, length: int, rng: Random) -> dict[str, np.ndarray]:
    """A request's part of a step's columns; the numbers tell position and row, so nothing can be exchanged."""
    request = running.request
    cut = 0 if request.watch_prompt else max(0, min(length, request.prompt_tokens - running.at))
    tokens = np.arange(running.at + cut, running.at + length)
    watched = sum(len(site.watch) for site in request.stages[0])
    edits = sum(len(site.edits) for site in request.stages[0])
    top = (
        tokens[None, :, None] * 100 + np.arange(len(request.top_k_sites))[:, None, None] * 10 + np.arange(request.top_k)
    )
    return {
        "moved": np.array([rng.randint(0, length) for _ in range(edits)], "<i4"),
        "active": np.repeat(tokens + 0.5, watched).astype("<f4"),
        "top_latents": top.astype("<i4").reshape(-1),
        "top_values": (top / 7).astype("<f4").reshape(-1),
    }


def step(batch: dict[int, Running], sequence: int, rng: Random) -> Frame:
    """A step of all requests; now and then one is preempted and begins again."""
    lengths = []
    parts: dict[str, list[bytes]] = {"moved": [], "active": [], "top_latents": [], "top_values": []}
    starts = []
    for running in batch.values():
        if rng.random() < 0.05:
            running.at, running.moved = 0, []
        length = min(rng.randint(1, 4), running.request.prompt_tokens - running.at)
        length = length if length > 0 else 1
        part = part_of(running, length, rng)
        running.moved.append((running.at + length, part["moved"]))
        for name, column in part.items():
            parts[name].append(column.tobytes())
        starts.append(running.at)
        lengths.append(length)
        running.at += length
    moved, active, latents, values = (b"".join(parts[name]) for name in parts)
    handles = np.array(list(batch), "<i8").tobytes()
    begun, run = (np.array(column, "<i4").tobytes() for column in (starts, lengths))
    return Frame(sequence, False, handles, begun, run, moved, active, top_latents=latents, top_values=values)


def shortened(frames: list[Frame], rng: Random) -> list[Frame]:
    """The frames as a worker may send them: where a step has the next tokens of the last one's requests, not named."""
    result = frames[:1]
    for before, frame in pairwise(frames):
        starts, lengths, now = (np.frombuffer(c, "<i4") for c in (before.starts, before.lengths, frame.starts))
        same = all(getattr(before, name) == getattr(frame, name) for name in ("handles", "lengths"))
        if same and shape(before) == shape(frame) and (now == starts + lengths).all() and rng.random() < 0.9:
            frame = msgspec.structs.replace(frame, goes_on=True, handles=b"", starts=b"", lengths=b"")
        result.append(frame)
    return result


def told(inbox: Inbox, taken: list[Features], ends: range) -> object:
    """All that an inbox has told, its features over all takes."""
    taken = [*taken, inbox.take()]
    features = [
        (position, *(column[i].tolist() if len(column) else [] for column in part[1:]))
        for part in taken
        for i, position in enumerate(range(part.first, part.end))
    ]
    return features, [inbox.moved_before(end) for end in ends], inbox.first, inbox.covered


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 90), st.sampled_from([3, 256]))
def test_features_are_told_the_same_however_often_they_are_taken(
    seed: int, requests: int, steps: int, longest: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rudder.server.engine.telemetry.hub.LONGEST_RUN", longest)
        check_takes(seed, requests, steps)


def check_takes(seed: int, requests: int, steps: int) -> None:
    """What is told does not depend on when it is taken, and is what the worker wrote."""
    rng, asking = Random(seed), Random(seed + 1)
    batch = {n + 1: Running(request_of(rng)) for n in range(requests)}
    hubs = [Hub(lambda _: None, lambda _: None) for _ in range(3)]
    every_step, now_and_then, at_the_end = ({n: hub.open(n, r.request) for n, r in batch.items()} for hub in hubs)
    taken: dict[int, list[Features]] = {id(inbox): [] for inbox in (*every_step.values(), *now_and_then.values())}
    for frame in shortened([step(batch, sequence, rng) for sequence in range(steps)], rng):
        for hub in hubs:
            hub.take(frame)
        for inbox in (*every_step.values(), *(i for i in now_and_then.values() if asking.random() < 0.2)):
            taken[id(inbox)].append(inbox.take())
    for n, last in at_the_end.items():
        expected = told(last, [], range(100))
        assert told(every_step[n], taken[id(every_step[n])], range(100)) == expected
        assert told(now_and_then[n], taken[id(now_and_then[n])], range(100)) == expected
        assert expected[1] == [batch[n].moved_before(end) for end in range(100)]  # type: ignore[index]
        # The numbers tell their positions.
        for position, active, _, _ in expected[0]:  # type: ignore[index]
            assert set(active) <= {position + 0.5}


def test_steady_decoding_is_kept_as_it_came() -> None:
    rng = Random(0)
    batch = {1: Running(wire.Request(1, 99, False, ((wire.Site(0, (ROW,), (wire.Edit(0),), watch=(0,)),),)), at=5)}
    hub = Hub(lambda _: None, lambda _: None)
    inbox = hub.open(1, batch[1].request)
    rng.random = lambda: 1.0  # type: ignore[method-assign]
    frames = shortened([step(batch, sequence, rng) for sequence in range(10)], Random(1))
    assert [frame.goes_on for frame in frames] == [False] + [True] * 9
    for frame in frames:
        hub.take(frame)
    assert hub.run is not None
    assert len(hub.run.frames) == 10
    assert not inbox.chunks
    features = inbox.take()
    assert (inbox.first, inbox.covered, list(range(features.first, features.end))) == (5, 15, list(range(5, 15)))


def test_what_has_been_read_of_long_decoding_is_forgotten() -> None:
    hub = Hub(lambda _: None, lambda _: None)
    batch = {1: Running(wire.Request(1, 999, False, ((wire.Site(0, (ROW,), (), watch=(0,)),),)), at=5)}
    inbox = hub.open(1, batch[1].request)
    rng = Random(0)
    rng.random = lambda: 1.0  # type: ignore[method-assign]
    positions: list[int] = []
    frames = [step(batch, sequence, rng) for sequence in range(2 * LONGEST_RUN + 9)]
    rng.random = lambda: 0.0  # type: ignore[method-assign]
    for frame in shortened(frames, rng):
        hub.take(frame)
        features = inbox.take()
        positions += range(features.first, features.end)
    assert hub.run is not None
    assert len(hub.run.frames) < LONGEST_RUN
    assert positions == list(range(5, 2 * LONGEST_RUN + 14))


@pytest.mark.parametrize("first", [True, False])
def test_a_frame_that_goes_on_with_something_else_is_an_error(first: bool) -> None:
    hub = Hub(lambda _: None, lambda _: None)
    if not first:
        hub.take(step({1: Running(wire.Request(1, 99, False, ((),)), at=7)}, 0, Random(0)))
    with pytest.raises(TelemetryLost, match="goes on with something else"):
        hub.take(Frame(1, True, active=b"\0" * 400))


def test_residuals_are_not_held_longer_than_by_who_asked_for_them() -> None:
    hub = Hub(lambda _: None, lambda _: None)
    inbox = hub.open(1, wire.Request(1, 99, False, ((),), capture=True))
    capture = Capture(1, 0, b"before", b"after")
    frames = [step({1: Running(inbox.request, at=at)}, at, Random(0)) for at in (5, 6)]
    for frame in shortened(frames, Random(1)):
        hub.take(msgspec.structs.replace(frame, captures=(capture,)))
    assert inbox.captures == [capture, capture]
    assert hub.run is not None
    assert [frame.captures for frame in hub.run.frames] == [(), ()]


async def test_columns_of_a_request_that_nobody_knows_are_not_told_as_anothers(tmp_path: Path) -> None:
    rng = Random(0)
    request = wire.Request(1, 99, False, ((wire.Site(0, (ROW,), (), watch=(0,)),),))
    hub = Hub(lambda _: None, lambda _: None)
    worker = connected(hub, tmp_path)
    hub.open(2, request)
    worker.send(step({1: Running(request, at=5), 2: Running(request, at=7)}, 0, rng))
    hub.receive()
    assert "columns of other requests" in str(hub.lost)


def test_features_with_a_gap_between_them_are_not_told_as_if_there_were_none() -> None:
    inbox = Inbox(wire.Request(1, 99, False, ((wire.Site(0, (ROW,), (), watch=(0,)),),)))
    inbox.chunks += [inbox.nothing._replace(first=first, active=np.ones((2, 1), np.float32)) for first in (3, 6)]
    with pytest.raises(TelemetryLost, match="after 3"):
        inbox.take()


def connected(hub: Hub, folder: Path) -> Channel:
    """The worker's end of the hub's channel."""
    hub.bind(f"{folder}/telemetry")
    worker = Channel(f"{folder}/telemetry", hub.key)
    hub.channel.accept()
    return worker


async def test_a_gap_on_the_channel_fails_all_who_wait(tmp_path: Path) -> None:
    hub = Hub(lambda _: None, lambda _: None)
    worker = connected(hub, tmp_path)
    task = asyncio.create_task(hub.listen())
    worker.send(Frame(0))
    worker.send(Frame(2))
    await asyncio.wait_for(task, 5)
    assert hub.arrived.is_set()
    assert "frame 2 came where 1 was due" in str(hub.lost)


async def test_frames_that_someone_awaits_are_taken_in_as_they_come(tmp_path: Path) -> None:
    hub = Hub(lambda _: None, lambda _: None)
    worker = connected(hub, tmp_path)
    # Nobody listens: what comes in is taken in because it is awaited, one frame after the other.
    with hub.awaited(), hub.awaited():
        for number in range(5):
            worker.send(Frame(number))
            await asyncio.wait_for(hub.arrived.wait(), 5)
            hub.arrived.clear()
            assert hub.expected == number + 1
    worker.send(Frame(5))
    await asyncio.sleep(0.05)
    assert hub.expected == 5
    with hub.awaited():
        await asyncio.wait_for(hub.arrived.wait(), 5)
    assert hub.expected == 6


@pytest.mark.parametrize("end", ["dead", "lost"])
async def test_what_nobody_will_read_any_more_does_not_keep_the_server_busy(tmp_path: Path, end: str) -> None:
    hub = Hub(lambda _: None, lambda _: None)
    sender = connected(hub, tmp_path).sender
    looked = 0
    receive = hub.receive

    def counted() -> None:
        nonlocal looked
        looked += 1
        receive()

    hub.receive = counted  # type: ignore[method-assign]
    with hub.awaited():
        sender.send(b"no frame") if end == "lost" else sender.socket.close()
        await asyncio.sleep(0.02)
        if end == "lost":
            sender.send(b"another")
        await asyncio.sleep(0.05)
    with hub.awaited():
        await asyncio.sleep(0.05)
    assert hub.over
    assert looked == 1
