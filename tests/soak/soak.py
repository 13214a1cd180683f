"""A soak: mixed clients for a time, after which nothing is held, and in which nothing grew."""

import asyncio
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from rudder_client import AsyncClient
from tests.fuzz.wire import held_when_idle
from tests.soak.slopes import Slope, slope_of
from tests.soak.traffic import client_after_client, unexpected

SAMPLE_S = 1.0
MAX_SLOPE_MIB = 1.0
# The first part of a run fills caches, whose size is bounded.
WARM_UP = 0.4
WINDOWS = 20
# In its first minutes the engine's memory grows, ever more slowly; why is not known.
ENGINE_WARM_UP_S = 600
BASELINE = ("tasks", "threads", "open_files")
# What may be there more than at the beginning: connections that are about to close, threads of a pool.
SPARE = 8
MIB = 1 << 20


class Sample(msgspec.Struct, frozen=True):
    """The server at a time: seconds since the beginning, resident memory of its process and of the engine's, in MiB."""

    seconds: float
    server_mib: float
    engine_mib: float


class Result(msgspec.Struct, frozen=True):
    """What a soak saw. `problems`: why it failed."""

    seconds: float
    clients: int
    calls: dict[str, int]
    server_slope: Slope
    engine_slope: Slope
    held: dict[str, float]
    before: dict[str, float]
    after: dict[str, float]
    samples: list[Sample]
    problems: list[str]


def resident_mib(process: int) -> float:
    """Return the resident memory of a process."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def children_of(process: int) -> list[int]:
    """Return the processes that a process has started."""
    tasks = Path(f"/proc/{process}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


async def sample(process: int, until: float, samples: list[Sample]) -> None:
    """Sample memory until a time."""
    began = time.monotonic()
    for _ in range(10**9):
        if time.monotonic() >= until:
            return
        engine = sum(map(resident_mib, children_of(process)))
        samples.append(Sample(time.monotonic() - began, resident_mib(process), engine))
        await asyncio.sleep(SAMPLE_S)


async def soak(address: str, process: int, seconds: float, clients: int) -> Result:
    """Run the clients against a server whose process is `process`."""
    seen: Counter[tuple[str, str]] = Counter()
    samples: list[Sample] = []
    async with AsyncClient(address, timeout=60) as client:
        before = dict((await client.ledger()).process)
        until = time.monotonic() + seconds
        await asyncio.gather(
            sample(process, until, samples), *(client_after_client(address, until, seen) for _ in range(clients))
        )
        held = await held_when_idle(client)
        after = dict((await client.ledger()).process)
    return judged(seconds, clients, seen, samples, held, before, after)


def floors(samples: list[Sample]) -> list[Sample]:
    """Return the least of each window. What a request holds for a moment is above it; what is never freed raises it."""
    size = max(len(samples) // WINDOWS, 1)
    windows = [samples[at : at + size] for at in range(0, len(samples), size)]
    return [
        Sample(window[0].seconds, min(s.server_mib for s in window), min(s.engine_mib for s in window))
        for window in windows
    ]


def judged(
    seconds: float, clients: int, seen: Counter[tuple[str, str]], samples: list[Sample], held: dict[str, float],
    before: dict[str, float], after: dict[str, float],
) -> Result:  # fmt: skip
    """Return the result, with everything that is wrong in it."""
    warm = floors([s for s in samples if s.seconds >= WARM_UP * seconds])
    server = slope_of([(s.seconds / 60, s.server_mib) for s in warm])
    engine = slope_of([(s.seconds / 60, s.engine_mib) for s in warm])
    judged_slopes = {"server": server} | ({"engine": engine} if seconds >= ENGINE_WARM_UP_S else {})
    problems = [
        f"{name} grew by {slope.value:.2f} MiB a minute, at least {slope.low:.2f}"
        for name, slope in judged_slopes.items()
        if slope.low > MAX_SLOPE_MIB
    ]
    problems += [f"{name}: {value:g} held" for name, value in held.items() if value]
    problems += [
        f"{name}: {after[name]:g}, {before[name]:g} before" for name in BASELINE if after[name] > before[name] + SPARE
    ]
    problems += [f"{what}: {count} times" for what, count in unexpected(seen).items()]
    calls: dict[str, Any] = {f"{kind} {status}": count for (kind, status), count in sorted(seen.items())}
    return Result(seconds, clients, calls, server, engine, held, before, after, samples[::5], problems)
