"""Figures of the load report, on requests whose times are known."""

import asyncio
import time
from collections.abc import AsyncIterator

import msgspec
import pytest

from rudder.sae_models.settings import ConfigError
from rudder.server.bench.serving import client, run
from rudder.server.bench.serving.figures import figures
from rudder.server.bench.serving.offered import Job, Offered, Recorded, Request

JOB = Job(
    protocol="rudder", address="", model="", streams=3, requests=2, prompt_tokens=4, new_tokens=5, seed=1
)  # fmt: skip


def test_latencies_and_goodput() -> None:
    fast = Request(0.0, [0.5, 0.6, 0.7])
    late = Request(0.0, [3.0, 3.1, 3.2])
    slow = Request(0.0, [0.5, 1.5, 2.5])
    measured = figures(Recorded([fast, late, slow], 4.0, 0.25, 80.0), new_tokens=5)
    assert measured["tok_s"] == pytest.approx(3 * 5 / 4)
    assert measured["ttft_ms_p50"] == pytest.approx(500)
    assert measured["ttft_ms_p99"] == pytest.approx(2950)
    assert measured["itl_ms_p50"] == pytest.approx(100)
    # Relaxed: 5 s to the first token and 200 ms between tokens; strict: 1 s and 100 ms.
    assert measured["goodput_relaxed"] == pytest.approx(2 / 4)
    assert measured["goodput_strict"] == pytest.approx(1 / 4)


async def two_messages(number: int) -> AsyncIterator[object]:
    await asyncio.sleep(0.02)
    yield number
    yield number


def test_open_loop_counts_from_the_intended_send_time() -> None:
    """A client that is late to send does not make an answer look early."""

    async def late(number: int) -> AsyncIterator[object]:
        time.sleep(0.05)  # noqa: ASYNC251, the event loop is blocked on purpose
        yield number

    job = msgspec.structs.replace(JOB, rate=1000.0)
    requests = asyncio.run(client.open_loop(job, late, time.perf_counter()))
    assert len(requests) == 6
    assert requests[-1].messages[0] > 0.25


def test_closed_loop_sends_a_request_of_a_stream_after_the_other() -> None:
    requests = asyncio.run(client.closed_loop(JOB, two_messages, time.perf_counter()))
    assert len(requests) == JOB.streams * JOB.requests
    assert {len(request.messages) for request in requests} == {2}
    assert sum(request.at < 0.01 for request in requests) == JOB.streams


def test_prompts_share_no_prefix() -> None:
    prompts = [client.prompt(JOB, number) for number in range(50)]
    assert {len(prompt) for prompt in prompts} == {4}
    assert len({tuple(prompt[:3]) for prompt in prompts}) == 50


@pytest.mark.parametrize(
    ("offered", "problem"),
    [
        (Offered(systems=("vllm",)), "systems: 'vllm' is not one of"),
        (Offered(systems=("rudder_idle",)), "takes its rate from vllm_openai"),
        (Offered(systems=("vllm_openai", "vllm_grpc")), "smg-grpc-servicer"),
    ],
)
def test_systems_that_cannot_be_measured(offered: Offered, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        run.systems_of(offered, None)
