"""The server as a process among others: many streams, cancellation, deadlines, stalled readers, health, leaving."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from rudder.v1 import inference_pb2, inference_pb2_grpc
from rudder_client import AsyncClient, Client, Program, Report, RudderError
from rudder_client.requests import generate_request
from tests.e2e.conftest import WRITE_TIMEOUT_S, Running, running

pytestmark = pytest.mark.e2e
SITE = "layers.2.resid_post"
PROMPT = "The cells of the body"
STREAMS = 64
# Batches of other sizes round bfloat16 differently; nats.
ROUNDING = 0.05
SERVICES = ("rudder.v1.InferenceService", "rudder.v1.FeatureService", "rudder.v1.ModelService")


def program(number: int) -> Program:
    """A different one for each stream."""
    return Program().at(SITE).set(feature=100 + number, to=0.4 + 0.05 * (number % 7), unit="residual")


@dataclass
class Answer:
    """What a stream said: ids, the logarithm of each one's probability, the two most probable (id, logarithm) at each,
    tokens touched by the edit, and the edit's row.
    """

    token_ids: list[int]
    chosen: list[float]
    best: list[tuple[tuple[int, float], ...]]
    touched: list[int]
    row: str


async def answer(client: AsyncClient, number: int, tokens: int = 24) -> Answer:
    """Of stream `number`."""
    found = Answer([], [], [], [], "")
    async for chunk in client.generate(
        PROMPT, steer=program(number), max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=2
    ):
        found.token_ids += chunk.token_ids
        if chunk.logprobs:
            found.chosen += chunk.logprobs.chosen
            found.best += chunk.logprobs.alternatives
        if chunk.attestation:
            found.touched = [edit.tokens_touched for edit in chunk.attestation.edits]
            found.row = chunk.attestation.edits[0].row
    assert len(found.token_ids) == len(found.chosen) == len(found.best) == tokens
    return found


def differs(one: Answer, other: Answer) -> float:
    """By how much two greedy streams differ in distribution, in nats: up to the first token at which they part, by the
    probability of each token; there, by how much one had to prefer its own to the other's.
    """
    worst = 0.0
    for at, (mine, theirs) in enumerate(zip(one.token_ids, other.token_ids, strict=True)):
        if mine != theirs:
            (_, best), (second, beside) = one.best[at]
            return max(worst, best - beside if second == theirs else inf)
        worst = max(worst, abs(one.chosen[at] - other.chosen[at]))
    return worst


async def test_64_streams_with_64_programs_are_each_their_own(aclient: AsyncClient) -> None:
    alone = [await answer(aclient, number) for number in range(STREAMS)]
    together = await asyncio.gather(*(answer(aclient, number) for number in range(STREAMS)))
    for number, (one, many) in enumerate(zip(alone, together, strict=True)):
        assert many.touched == one.touched, number
        assert many.row == one.row == f"feature {100 + number} of textbook-lm-layers.2"
        assert differs(one, many) < ROUNDING, number
    # Another stream's program would have been noticed.
    others = [differs(one, alone[number - 1]) for number, one in enumerate(alone)]
    assert sum(difference > ROUNDING for difference in others) > STREAMS / 2


def test_what_grpc_tries_again_is_counted(server: Running) -> None:
    retry = {"maxAttempts": 3, "initialBackoff": "0.01s", "maxBackoff": "0.01s", "backoffMultiplier": 1}
    again = [{"name": [{}], "retryPolicy": retry | {"retryableStatusCodes": ["INVALID_ARGUMENT"]}}]
    before = server.metric("rudder_retried_requests_total", method="InferenceService.Complete")
    options = [("grpc.service_config", json.dumps({"methodConfig": again}))]
    with grpc.insecure_channel(server.address, options) as channel, pytest.raises(grpc.RpcError):
        inference_pb2_grpc.InferenceServiceStub(channel).Complete(inference_pb2.CompleteRequest(), timeout=30)
    after = server.metric("rudder_retried_requests_total", method="InferenceService.Complete")
    assert after - before == 2


async def test_cancelling_half_leaves_the_others_and_leaks_nothing(aclient: AsyncClient, server: Running) -> None:
    expected = await answer(aclient, 1, tokens=100)

    async def one(number: int) -> Answer | None:
        if number % 2 == 0:
            return await answer(aclient, 1, tokens=100)
        async with aclient.generate(PROMPT, steer=program(number), max_tokens=900, ignore_eos=True) as stream:
            await anext(stream)
            await asyncio.sleep(0.01 * number)
        return None

    results = await asyncio.gather(*(one(number) for number in range(STREAMS)))
    whole = [found for found in results if found is not None]
    assert len(whole) == STREAMS / 2
    assert max(differs(expected, found) for found in whole) < ROUNDING
    server.wait_idle(seconds=5)


async def test_cancellation_reaches_the_engine_at_once(aclient: AsyncClient, server: Running) -> None:
    stream = aclient.generate(PROMPT, steer=program(0), max_tokens=1000, ignore_eos=True)
    await anext(stream)
    assert server.metric("vllm:num_requests_running") == 1
    stream.cancel()
    server.wait_idle(seconds=2)


async def test_a_deadline_ends_the_request(aclient: AsyncClient, server: Running) -> None:
    with pytest.raises(RudderError) as caught:
        async for _ in aclient.generate(PROMPT, steer=program(0), max_tokens=1000, ignore_eos=True, timeout=0.5):
            pass
    assert caught.value.code == "DEADLINE_EXCEEDED"
    server.wait_idle(seconds=2)


async def test_a_reader_that_stalls_is_left(server: Running) -> None:
    """The window is the client's: with a small one, the server notices after some hundred messages."""
    small_window = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536))
    labels = {"method": "InferenceService.Generate", "outcome": "CLIENT_TOO_SLOW"}
    before = server.metric("rudder_requests_total", **labels)
    sampling = {"max_tokens": 900, "ignore_eos": True, "n": 4}
    request = generate_request(PROMPT, program(0), Report(top_k=64), "", 0, sampling)  # type: ignore[arg-type]
    async with grpc.aio.insecure_channel(server.address, options=small_window) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request)
        await call.read()
        deadline = time.monotonic() + WRITE_TIMEOUT_S + 10
        while server.metric("rudder_requests_total", **labels) == before:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.2)
        server.wait_idle(seconds=2)


def test_health(client: Client) -> None:
    stub: Any = health_pb2_grpc.HealthStub(client.channel)
    for name in ("", "liveness", "readiness", *SERVICES):
        status = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5).status
        assert status == health_pb2.HealthCheckResponse.SERVING, name
    watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=5)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


def test_reflection_names_the_services(client: Client) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    (response,) = stub.ServerReflectionInfo(iter([asked]), timeout=5)
    assert set(SERVICES) <= {service.name for service in response.list_services_response.service}


def test_watched_features_are_counted_over_all_requests(client: Client, server: Running) -> None:
    labels = {"bundle": "textbook-lm-layers.2", "site": SITE, "feature": "7"}
    before = server.metric("rudder_feature_tokens_total", **labels)
    choice = client.complete(PROMPT, max_tokens=10, ignore_eos=True).choices[0]
    assert choice.attestation is not None
    deadline = time.monotonic() + 5
    # BOS is left out; asynchronous scheduling may run one token more than the answer has.
    while server.metric("rudder_feature_tokens_total", **labels) - before < choice.attestation.tokens_seen - 1:
        assert time.monotonic() < deadline
    label = client.feature(7).summary.label
    assert server.metric("rudder_feature_info", **labels, label=label[:80]) == 1


def test_tokens_edits_and_outcomes_are_counted(client: Client, server: Running) -> None:
    names: tuple[tuple[str, dict[str, str]], ...] = (
        ("rudder_stream_tokens_total", {}),
        ("rudder_requests_total", {"method": "InferenceService.Complete", "outcome": "OK"}),
        ("rudder_edits_applied_tokens_total", {"site": SITE, "operation": "set", "origin": "request"}),
        ("rudder_time_to_first_token_seconds_count", {}),
        ("rudder_inter_token_seconds_count", {}),
    )
    before = [server.metric(name, **labels) for name, labels in names]
    choice = client.complete(PROMPT, steer=program(0), max_tokens=10, ignore_eos=True).choices[0]
    after = [server.metric(name, **labels) for name, labels in names]
    assert choice.attestation is not None
    touched = choice.attestation.edits[0].tokens_touched
    counted = [b - a for a, b in zip(before, after, strict=True)]
    assert counted[:4] == [10, 1, touched, 1]
    assert 1 <= counted[4] <= 9


def test_the_tour_ends_well(server: Running) -> None:
    metrics = f"http://127.0.0.1:{server.metrics_port}/metrics"
    tour = subprocess.run(
        [sys.executable, "-m", "rudder_client.tour", server.address, metrics],
        capture_output=True,
        text=True,
        check=False,
    )
    assert tour.returncode == 0, tour.stderr
    assert "rudder_requests_total" in tour.stdout


def test_the_commands_print_what_they_get(server: Running) -> None:
    def rudder(*words: str) -> str:
        command = [sys.executable, "-m", "rudder.server", *words, "--address", server.address]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    assert "textbook-lm-layers.2" in rudder("model")
    assert rudder("generate", PROMPT, "--max-tokens", "8", "--temperature", "0").strip()
    assert "cells" in rudder("inspect", PROMPT)
    assert "activation" in rudder("features", "7")


def test_a_port_in_use_is_named_at_once(server: Running) -> None:
    command = [sys.executable, "-m", "rudder.server", "serve", "--listen.port", str(server.port)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert second.returncode == 1
    assert "listen.port" in second.stderr


def test_calls_are_taken_for_a_while_after_sigterm(tmp_path: Path) -> None:
    with running(tmp_path, **{"listen.accept_s": "4"}) as leaving, Client(leaving.address) as client:
        leaving.process.send_signal(signal.SIGTERM)
        with pytest.raises(RudderError):
            client.wait_ready(timeout=1)
        assert client.complete(PROMPT, max_tokens=3).text
        assert leaving.process.wait(30) == 0


def test_sigterm_lets_streams_finish(tmp_path: Path) -> None:
    with running(tmp_path, **{"listen.drain_s": "60"}) as leaving, Client(leaving.address) as client:
        stream = client.generate(PROMPT, max_tokens=300, ignore_eos=True)
        next(stream)
        leaving.process.send_signal(signal.SIGTERM)
        time.sleep(1)
        with Client(leaving.address) as late, pytest.raises(RudderError) as caught:
            late.complete("x", timeout=5)
        assert caught.value.code == "UNAVAILABLE"
        assert 1 + sum(len(chunk.token_ids) for chunk in stream) >= 300
        assert leaving.process.wait(60) == 0
