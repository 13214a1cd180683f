"""The second layer: the same cases as bytes on the connection of a running server.

Before and after, a fixed request must give the same tokens; at the end the server says SERVING and holds nothing.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rudder_client import AsyncClient
from tests.fuzz.cases import Case
from tests.fuzz.process import Result

AT_ONCE = 16
# Calls that generate for longer are cancelled by their deadline, which is a case, too.
DEADLINE_S = 1.0
ANSWER_S = 30.0
IDLE_S, CHECK_S = 30.0, 0.2
FAULTS = {"INTERNAL", "UNKNOWN", "DATA_LOSS"}
PROBE = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True}


async def probe(client: AsyncClient) -> tuple[int, ...]:
    """Return the tokens of a fixed request."""
    completion = await client.complete("The cells of the body", **PROBE)  # type: ignore[arg-type]
    return tuple(completion.choices[0].token_ids)


async def status_of(channel: grpc.aio.Channel, case: Case) -> str:
    """Send the bytes of a case; return the name of the status that comes back."""
    make: Any = channel.unary_stream if case.method.streams else channel.unary_unary
    call = make(case.method.path, request_serializer=None, response_deserializer=None)(case.data, timeout=DEADLINE_S)
    try:
        if case.method.streams:
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def send_all(channel: grpc.aio.Channel, cases: Iterator[Case], result: Result) -> None:
    """Send cases one after another; several of these run at once."""
    for case in cases:
        started = time.monotonic()
        status = await status_of(channel, case)
        waited = time.monotonic() - started
        result.slowest_s = max(result.slowest_s, waited)
        result.messages += 1
        result.outcomes[status] += 1
        if status in FAULTS or waited > ANSWER_S:
            result.crashes.append(case)


async def run(address: str, cases: Iterable[Case]) -> Result:
    """Send every case to a server. Raises AssertionError where it is not afterwards what it was before."""
    result, began = Result(outcomes=Counter()), time.monotonic()
    shared = iter(cases)
    async with AsyncClient(address, timeout=60) as client, grpc.aio.insecure_channel(address) as channel:
        before = await probe(client)
        await asyncio.gather(*(send_all(channel, shared, result) for _ in range(AT_ONCE)))
        result.seconds = time.monotonic() - began
        result.held = await held_when_idle(client)
        assert await probe(client) == before, "the probe has other tokens than before"
        health: Any = health_pb2_grpc.HealthStub(channel)
        status = (await health.Check(health_pb2.HealthCheckRequest())).status
        assert status == health_pb2.HealthCheckResponse.SERVING
    return result


async def held_when_idle(client: AsyncClient, seconds: float = IDLE_S) -> dict[str, float]:
    """Return what the server holds once that is nothing, or after a while."""
    held: dict[str, float] = {}
    for _ in range(int(seconds / CHECK_S)):
        held = dict((await client.ledger()).held)
        if not any(held.values()):
            break
        await asyncio.sleep(CHECK_S)
    return held
