"""The pace of streams: within the budget each token leaves as it comes, beyond it tokens share messages."""

import heapq
import time
from itertools import pairwise

import pytest

from rudder.server import config
from rudder.server.service.pace import BURST_S, Pace, Stream

BUDGET = 1000.0


def pace_of(streams: int, max_flush_ms: float = 1000) -> Pace:
    """Return a pace of so many streams."""
    return Pace(config.Stream(BUDGET, max_flush_ms), streams=streams)


def overdrawn(streams: int) -> Pace:
    """Return a pace whose budget is overdrawn as far as it can be, with max_flush_ms 50."""
    pace = pace_of(streams, max_flush_ms=50)
    pace.balance = -BURST_S * BUDGET
    return pace


def send_times(pace: Pace, tokens_per_s: float, seconds: float) -> list[float]:
    """Return the send times of streams that have a token every 1 / tokens_per_s and send at their turn."""
    begin = pace.updated
    waiting = [(begin + n / tokens_per_s / pace.streams, n) for n in range(pace.streams)]
    times = []
    while waiting[0][0] < begin + seconds:
        now, n = heapq.heappop(waiting)
        times.append(now - begin)
        heapq.heappush(waiting, (now + max(pace.spend(now), 1 / tokens_per_s), n))
    return times


def test_no_stream_waits_within_the_budget() -> None:
    assert len(send_times(pace_of(streams=40), 0.9 * BUDGET / 40, 10)) == pytest.approx(0.9 * BUDGET * 10, rel=0.01)


@pytest.mark.parametrize("tokens_per_s", [30, 100, 1000])
def test_all_streams_together_keep_to_the_budget_from_the_start(tokens_per_s: float) -> None:
    times = send_times(pace_of(streams=40), tokens_per_s, 10)
    for end in (0.1, 0.5, 1, 10):
        assert sum(t < end for t in times) <= BUDGET * (end + BURST_S) + 1
    assert len(times) > 0.8 * BUDGET * 10


def test_streams_send_at_common_ticks_beyond_the_budget() -> None:
    times = [t for t in send_times(pace_of(streams=40), 100, 10) if t > 1]
    gaps = [b - a for a, b in pairwise(sorted(times))]
    assert sum(gap > 1e-6 for gap in gaps) < len(times) / 20


def test_no_token_waits_longer_than_max_flush_ms() -> None:
    pace = overdrawn(10_000)
    begin = pace.updated
    waits = [pace.spend(begin + t / 1000) for t in range(120)]
    assert min(waits) > 0
    assert max(waits) == pytest.approx(0.05)


def test_budget_recovers_after_an_idle_second() -> None:
    pace = overdrawn(40)
    assert pace.spend(pace.updated) > 0
    assert pace.spend(pace.updated + 1) == 0
    assert pace.balance == BURST_S * BUDGET


async def seconds_waited(stream: Stream, tokens: int) -> float:
    started = time.monotonic()
    stream.sent(tokens)
    await stream.wait_for_turn()
    return time.monotonic() - started


async def test_stream_waits_for_the_tick() -> None:
    stream = Stream(overdrawn(10_000), remaining=1000)
    stream.last_sent -= 1
    assert 0.045 < await seconds_waited(stream, 1) < 0.2


async def test_last_token_does_not_wait() -> None:
    stream = Stream(overdrawn(10_000), remaining=2)
    stream.last_sent -= 1
    assert await seconds_waited(stream, 1) < 0.01
    assert await seconds_waited(stream, 1) < 0.01
