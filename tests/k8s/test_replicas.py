"""Two replicas behind one name: calls are balanced, and the end of a replica costs only the streams that it was in."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from rudder_client import REPLICAS, AsyncClient, AsyncStream, RudderError
from tests.e2e.conftest import Running, running

pytestmark = [pytest.mark.long, pytest.mark.e2e]
PROMPT, TOKENS = "The cells of the body", 600


@pytest.fixture
def replicas(tmp_path: Path) -> Iterator[tuple[Running, Running]]:
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    with running(folders[0]) as first, running(folders[1]) as second:
        yield first, second


def served(replica: Running, method: str) -> float:
    return replica.metric("rudder_requests_total", method=f"InferenceService.{method}", outcome="OK")


async def read_whole(stream: AsyncStream) -> int:
    """Return the tokens that are left of a stream whose first chunk has been read."""
    return sum([len(chunk.token_ids) async for chunk in stream])


async def test_one_of_two_replicas_ends(replicas: tuple[Running, Running]) -> None:
    first, second = replicas
    address = f"ipv4:{first.address},{second.address}"
    async with AsyncClient(address, timeout=300, options=REPLICAS) as client:
        for _ in range(20):
            await client.complete(PROMPT, max_tokens=2, ignore_eos=True)
        assert min(served(first, "Complete"), served(second, "Complete")) >= 8

        streams = [client.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True) for _ in range(8)]
        begun = [len((await anext(stream)).token_ids) for stream in streams]
        whole = [asyncio.create_task(client.complete(PROMPT, max_tokens=TOKENS, ignore_eos=True)) for _ in range(6)]
        while not first.metric("rudder_inflight_choices") > len(streams) / 2:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        os.killpg(first.process.pid, signal.SIGKILL)
        results = await asyncio.gather(*map(read_whole, streams), return_exceptions=True)
        # Streams that had begun there end, once, with a status; the others go on.
        broken = [error for error in results if isinstance(error, RudderError)]
        assert {error.code for error in broken} == {"UNAVAILABLE"}
        assert 0 < len(broken) < len(streams)
        assert all(start + rest == TOKENS for start, rest in zip(begun, results, strict=True) if isinstance(rest, int))
        # Answers of which nothing had been seen come whole from the other replica.
        answers = await asyncio.gather(*whole)
        assert [len(answer.choices[0].token_ids) for answer in answers] == [TOKENS] * len(whole)
        assert second.metric("rudder_retried_requests_total", method="InferenceService.Complete") > 0
        assert (await client.complete(PROMPT, max_tokens=2, ignore_eos=True)).text
