"""The tempo of streams: within the budget tokens go as they come, above it they are gathered."""

import asyncio
import time

import pytest

from server import config
from server.api.pace import MEASURED_S, Pace, Stream


def pace_at(rate: float, streams: int, budget: float = 1000, longest_ms: float = 50) -> Pace:
    """A pace that has measured `rate` tokens a second over `streams` streams."""
    now = time.monotonic()
    pace = Pace(config.Stream(budget, longest_ms), streams=streams, since=now - MEASURED_S)
    pace.count(round(rate * MEASURED_S), now)
    return pace


def test_within_the_budget_nobody_waits() -> None:
    assert pace_at(rate=1000, streams=64).interval() == 0


def test_above_it_all_streams_together_keep_to_it() -> None:
    streams = 40
    assert streams / pace_at(rate=4000, streams=streams).interval() == pytest.approx(1000)


def test_no_token_waits_longer_than_configured() -> None:
    assert pace_at(rate=1e6, streams=10_000).interval() == 0.05


def test_the_rate_falls_when_the_load_does() -> None:
    pace = pace_at(rate=4000, streams=40)
    pace.count(10, time.monotonic() + MEASURED_S)
    assert pace.interval() == 0


async def rested(stream: Stream, tokens: int) -> float:
    began = time.monotonic()
    await stream.rest(tokens)
    return time.monotonic() - began


async def test_a_stream_waits_its_interval() -> None:
    stream = Stream(pace_at(rate=1e6, streams=10_000), left=1000)
    await asyncio.sleep(0.01)
    assert 0.045 < await rested(stream, 1) < 0.2


async def test_the_last_token_does_not_wait() -> None:
    stream = Stream(pace_at(rate=1e6, streams=10_000), left=2)
    await asyncio.sleep(0.01)
    assert await rested(stream, 1) < 0.01
    assert await rested(stream, 1) < 0.01
