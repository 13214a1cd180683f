"""Clients of all kinds, for as long as a soak lasts: good, steered, slow, cancelled, late, wrong and too large."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from rudder_client import AsyncClient, Program, RudderError

PROMPT = "The cells of the body"
SITE = "layers.2.resid_post"
TOKENS = 48
MAX_MESSAGE_BYTES = 1 << 20
TOO_LARGE = "x" * (MAX_MESSAGE_BYTES + 1)
# How often each kind of client comes.
SHARES = {"good": 8, "steered": 6, "slow": 2, "cancelled": 4, "late": 3, "wrong": 3, "large": 1}
# What each kind may be told; a cancelled one hears nothing. All of them may be refused because the queue is full.
STATUSES = {
    "good": {"OK"}, "steered": {"OK"}, "slow": {"OK"}, "cancelled": {"OK"}, "late": {"OK", "DEADLINE_EXCEEDED"},
    "wrong": {"INVALID_ARGUMENT", "NOT_FOUND"}, "large": {"RESOURCE_EXHAUSTED"},
}  # fmt: skip


async def good(client: AsyncClient, **options: Any) -> None:
    """Read a stream to its end; every token comes once."""
    tokens = 0
    async for chunk in client.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True, **options):
        tokens += len(chunk.token_ids)
    assert tokens == TOKENS, f"{tokens} tokens of {TOKENS}"


async def steered(client: AsyncClient) -> None:
    """Read a stream with a program of its own."""
    program = Program().at(SITE).set(feature=random.randrange(1000), to=0.4, unit="residual")
    await good(client, steer=program)


async def slow(client: AsyncClient) -> None:
    """Wait before each message."""
    async for _ in client.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True):
        await asyncio.sleep(0.02)


async def cancelled(client: AsyncClient) -> None:
    """Leave after a few tokens, or before the first."""
    async with client.generate(PROMPT, max_tokens=1000, ignore_eos=True) as stream:
        for _ in range(random.randrange(4)):
            await anext(stream)


async def late(client: AsyncClient) -> None:
    """Have a deadline that passes in the queue or in the answer."""
    await client.complete(PROMPT, max_tokens=1000, ignore_eos=True, timeout=random.choice((0.02, 0.2, 0.6)))


async def wrong(client: AsyncClient) -> None:
    """Ask for what is refused."""
    await client.complete(PROMPT, max_tokens=random.choice((0, 10**6)))


async def large(client: AsyncClient) -> None:
    """Send a message beyond the limit."""
    await client.complete(TOO_LARGE, max_tokens=1)


KINDS: dict[str, Callable[[AsyncClient], Awaitable[None]]] = {
    "good": good, "steered": steered, "slow": slow, "cancelled": cancelled, "late": late, "wrong": wrong,
    "large": large,
}  # fmt: skip


async def status_of(client: AsyncClient, kind: str) -> str:
    """Be one client; return the status that it got."""
    try:
        await KINDS[kind](client)
    except RudderError as error:
        return error.reason if error.reason == "QUEUE_FULL" else error.code
    except grpc.RpcError as error:
        return f"{error.code().name}"
    return "OK"


async def client_after_client(address: str, until: float, seen: Counter[tuple[str, str]]) -> None:
    """Be one client after another until a time of `time.monotonic`; count (kind, status)."""
    kinds, weights = zip(*SHARES.items(), strict=True)
    async with AsyncClient(address, timeout=120) as client:
        while time.monotonic() < until:
            (kind,) = random.choices(kinds, weights)
            seen[kind, await status_of(client, kind)] += 1


def unexpected(seen: Counter[tuple[str, str]]) -> dict[str, int]:
    """Return what clients were told that they should not have been."""
    wrong_ones = {key: count for key, count in seen.items() if key[1] not in STATUSES[key[0]] | {"QUEUE_FULL"}}
    return {f"{kind} {status}": count for (kind, status), count in wrong_ones.items()}
