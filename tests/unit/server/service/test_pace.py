"""The tempo of streams: within the budget tokens go as they come, above it they are gathered."""

import heapq
import time
from itertools import pairwise

import pytest

from rudder.server import config
from rudder.server.service.pace import BURST_S, Pace, Stream

BUDGET = 1000.0


def paced(streams: int, longest_ms: float = 1000) -> Pace:
    """A pace of so many streams."""
    return Pace(config.Stream(BUDGET, longest_ms), streams=streams)


def overdrawn(streams: int) -> Pace:
    """A pace that has spent far more than its budget, and lets nobody wait longer than 50 ms."""
    pace = paced(streams, longest_ms=50)
    pace.left = -BURST_S * BUDGET
    return pace


def sent(pace: Pace, tokens_per_s: float, seconds: float) -> list[float]:
    """When messages go, of streams that have a token every 1 / tokens_per_s and send when they may."""
    begin = pace.since
    waiting = [(begin + n / tokens_per_s / pace.streams, n) for n in range(pace.streams)]
    times = []
    while waiting[0][0] < begin + seconds:
        now, n = heapq.heappop(waiting)
        times.append(now - begin)
        heapq.heappush(waiting, (now + max(pace.wait(now), 1 / tokens_per_s), n))
    return times


def test_within_the_budget_nobody_waits() -> None:
    assert len(sent(paced(streams=40), 0.9 * BUDGET / 40, 10)) == pytest.approx(0.9 * BUDGET * 10, rel=0.01)


@pytest.mark.parametrize("tokens_per_s", [30, 100, 1000])
def test_above_it_all_streams_together_keep_to_it_from_the_start(tokens_per_s: float) -> None:
    times = sent(paced(streams=40), tokens_per_s, 10)
    for end in (0.1, 0.5, 1, 10):
        assert sum(t < end for t in times) <= BUDGET * (end + BURST_S) + 1
    assert len(times) > 0.8 * BUDGET * 10


def test_above_it_all_streams_send_at_the_same_ticks() -> None:
    times = [t for t in sent(paced(streams=40), 100, 10) if t > 1]
    apart = [b - a for a, b in pairwise(sorted(times))]
    assert sum(gap > 1e-6 for gap in apart) < len(times) / 20


def test_no_token_waits_longer_than_configured() -> None:
    pace = overdrawn(10_000)
    begin = pace.since
    waits = [pace.wait(begin + t / 1000) for t in range(120)]
    assert min(waits) > 0
    assert max(waits) == pytest.approx(0.05)


def test_after_a_quiet_time_tokens_go_as_they_come_again() -> None:
    pace = overdrawn(40)
    assert pace.wait(pace.since) > 0
    assert pace.wait(pace.since + 1) == 0
    assert pace.left == BURST_S * BUDGET


async def rested(stream: Stream, tokens: int) -> float:
    began = time.monotonic()
    await stream.rest(tokens)
    return time.monotonic() - began


async def test_a_stream_waits_its_interval() -> None:
    stream = Stream(overdrawn(10_000), left=1000)
    stream.began -= 1
    assert 0.045 < await rested(stream, 1) < 0.2


async def test_the_last_token_does_not_wait() -> None:
    stream = Stream(overdrawn(10_000), left=2)
    stream.began -= 1
    assert await rested(stream, 1) < 0.01
    assert await rested(stream, 1) < 0.01
