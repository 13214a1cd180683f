"""The server process: many streams, cancellation, deadlines, stalled readers, health, metrics, log, start and drain."""

import asyncio
import json
import os
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
from rudder_client import AsyncClient, AsyncStream, Client, Program, Report, RudderError
from rudder_client.requests import generate_request
from tests.e2e.conftest import FLAGS, WRITE_TIMEOUT_S, Running, running

pytestmark = pytest.mark.e2e
SITE = "layers.2.resid_post"
PROMPT = "The cells of the body"
STREAMS = 64
# Batches of other sizes round bfloat16 differently; nats.
ROUNDING = 0.05
SERVICES = ("rudder.v1.InferenceService", "rudder.v1.FeatureService", "rudder.v1.ModelService")


def program(number: int) -> Program:
    """Return a program that differs from those of the other streams."""
    return Program().at(SITE).set(feature=100 + number, to=0.4 + 0.05 * (number % 7), unit="residual")


@dataclass
class Answer:
    """The tokens of a stream. `chosen`: log-probability of each; `best`: (id, log-probability) of the two most probable
    at each; `touched`: tokens that each edit touched; `row`: of the first edit.
    """

    token_ids: list[int]
    chosen: list[float]
    best: list[tuple[tuple[int, float], ...]]
    touched: list[int]
    row: str


async def answer(client: AsyncClient, number: int, tokens: int = 24) -> Answer:
    """Return the answer of stream `number`."""
    result = Answer([], [], [], [], "")
    async for chunk in client.generate(
        PROMPT, steer=program(number), max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=2
    ):
        result.token_ids += chunk.token_ids
        if chunk.logprobs:
            result.chosen += chunk.logprobs.chosen
            result.best += chunk.logprobs.alternatives
        if chunk.attestation:
            result.touched = [edit.tokens_touched for edit in chunk.attestation.edits]
            result.row = chunk.attestation.edits[0].row
    assert len(result.token_ids) == len(result.chosen) == len(result.best) == tokens
    return result


def difference(first: Answer, second: Answer) -> float:
    """Return how far two greedy streams differ, in nats: the largest difference of log-probability of a common token,
    and where they diverge, the margin by which `first` preferred its token to the one of `second`.
    """
    largest = 0.0
    for at, (token, other) in enumerate(zip(first.token_ids, second.token_ids, strict=True)):
        if token != other:
            (_, logprob), (runner_up, runner_up_logprob) = first.best[at]
            return max(largest, logprob - runner_up_logprob if runner_up == other else inf)
        largest = max(largest, abs(first.chosen[at] - second.chosen[at]))
    return largest


async def test_64_streams_with_64_programs_equal_their_single_runs(aclient: AsyncClient) -> None:
    alone = [await answer(aclient, number) for number in range(STREAMS)]
    together = await asyncio.gather(*(answer(aclient, number) for number in range(STREAMS)))
    for number, (one, many) in enumerate(zip(alone, together, strict=True)):
        assert many.touched == one.touched, number
        assert many.row == one.row == f"feature {100 + number} of textbook-lm-layers.2"
        assert difference(one, many) < ROUNDING, number
    # The comparison would notice another stream's program.
    differences = [difference(one, alone[number - 1]) for number, one in enumerate(alone)]
    assert sum(value > ROUNDING for value in differences) > STREAMS / 2


def test_retries_by_grpc_are_counted(server: Running) -> None:
    retry = {"maxAttempts": 3, "initialBackoff": "0.01s", "maxBackoff": "0.01s", "backoffMultiplier": 1}
    methods = [{"name": [{}], "retryPolicy": retry | {"retryableStatusCodes": ["INVALID_ARGUMENT"]}}]
    before = server.metric("rudder_retried_requests_total", method="InferenceService.Complete")
    options = [("grpc.service_config", json.dumps({"methodConfig": methods}))]
    with grpc.insecure_channel(server.address, options) as channel, pytest.raises(grpc.RpcError):
        inference_pb2_grpc.InferenceServiceStub(channel).Complete(inference_pb2.CompleteRequest(), timeout=30)
    after = server.metric("rudder_retried_requests_total", method="InferenceService.Complete")
    assert after - before == 2


async def test_cancelling_half_of_the_streams_leaves_the_others_and_leaks_nothing(
    aclient: AsyncClient, server: Running
) -> None:
    expected = await answer(aclient, 1, tokens=100)

    async def one(number: int) -> Answer | None:
        if number % 2 == 0:
            return await answer(aclient, 1, tokens=100)
        async with aclient.generate(PROMPT, steer=program(number), max_tokens=900, ignore_eos=True) as stream:
            await anext(stream)
            await asyncio.sleep(0.01 * number)
        return None

    results = await asyncio.gather(*(one(number) for number in range(STREAMS)))
    whole = [result for result in results if result is not None]
    assert len(whole) == STREAMS / 2
    assert max(difference(expected, result) for result in whole) < ROUNDING
    server.wait_idle(seconds=5)


async def test_cancellation_reaches_the_engine_at_once(aclient: AsyncClient, server: Running) -> None:
    stream = aclient.generate(PROMPT, steer=program(0), max_tokens=1000, ignore_eos=True)
    await anext(stream)
    assert server.metric("vllm:num_requests_running") == 1
    stream.cancel()
    server.wait_idle(seconds=2)


async def test_deadline_ends_the_request(aclient: AsyncClient, server: Running) -> None:
    with pytest.raises(RudderError) as caught:
        async for _ in aclient.generate(PROMPT, steer=program(0), max_tokens=1000, ignore_eos=True, timeout=0.5):
            pass
    assert caught.value.code == "DEADLINE_EXCEEDED"
    server.wait_idle(seconds=2)


async def test_client_that_does_not_read_is_refused(server: Running) -> None:
    """The flow-control window is the client's: with a small one, the server blocks after some hundred messages."""
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
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (response,) = stub.ServerReflectionInfo(iter([request]), timeout=5)
    assert set(SERVICES) <= {service.name for service in response.list_services_response.service}


def test_watched_features_are_counted_over_all_requests(client: Client, server: Running) -> None:
    labels = {"bundle": "textbook-lm-layers.2", "site": SITE, "feature": "7"}
    before = server.metric("rudder_feature_tokens_total", **labels)
    choice = client.complete(PROMPT, max_tokens=10, ignore_eos=True).choices[0]
    assert choice.attestation is not None
    deadline = time.monotonic() + 5
    # BOS is not counted; asynchronous scheduling may run one token more than the answer has.
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
    deltas = [b - a for a, b in zip(before, after, strict=True)]
    assert deltas[:4] == [10, 1, touched, 1]
    assert 1 <= deltas[4] <= 9


def test_tour_of_the_toy_succeeds_beside_a_proxy(server: Running) -> None:
    proxy = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    metrics = f"http://127.0.0.1:{server.metrics_port}/metrics"
    tour = subprocess.run(
        [sys.executable, "-m", "rudder_client.tour", server.address, metrics],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | proxy,
    )
    assert tour.returncode == 0, tour.stderr
    assert "rudder_requests_total" in tour.stdout
    assert tour.stdout.count("the same, letter by letter") >= 2


def test_commands_print_their_results(server: Running) -> None:
    def rudder(*arguments: str) -> str:
        command = [sys.executable, "-m", "rudder.server", *arguments, "--address", server.address]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    assert "textbook-lm-layers.2" in rudder("model")
    assert rudder("generate", PROMPT, "--max-tokens", "8", "--temperature", "0").strip()
    assert rudder("generate", PROMPT, "--regex", "(yes|no)").splitlines()[0] in ("yes", "no")
    assert json.loads(rudder("generate", PROMPT, "--json-schema", '{"enum": [7]}').splitlines()[0]) == 7
    assert "cells" in rudder("inspect", PROMPT)
    assert "activation" in rudder("features", "7")


async def test_edits_of_a_cancelled_stream_are_counted(aclient: AsyncClient, server: Running) -> None:
    labels = {"site": SITE, "operation": "set", "origin": "request"}
    before = server.metric("rudder_edits_applied_tokens_total", **labels)
    async with aclient.generate(PROMPT, steer=program(0), max_tokens=1000, ignore_eos=True) as stream:
        first = await anext(stream)
    server.wait_idle(seconds=5)
    # The prompt without its BOS, and the tokens that the client got: all but the last have been read.
    minimum = len((await aclient.inspect(PROMPT)).tokens) - 1 + len(first.token_ids) - 1
    assert server.metric("rudder_edits_applied_tokens_total", **labels) - before >= minimum


def test_each_call_has_one_log_line(client: Client, server: Running) -> None:
    trace_id, correlation_id = "4bf92f3577b34da6a3ce929d0e0e4736", "order-7 of test"
    headers = (("traceparent", f"00-{trace_id}-00f067aa0ba902b7-01"), ("x-request-id", correlation_id))
    stub = inference_pb2_grpc.InferenceServiceStub(client.channel)
    request = generate_request(PROMPT, program(0), None, "", 0, {"max_tokens": 3, "ignore_eos": True})
    messages = list(stub.Generate(request, metadata=headers))
    line = server.log_line(messages[0].request_id)
    prompt_tokens = messages[-1].choices[0].usage.prompt_tokens
    for part in (
        "INFO rudder.access: call ended method=InferenceService.Generate outcome=OK",
        f'correlation_id="{correlation_id}"', f"trace_id={trace_id}", "caller=anonymous",
        f"prompt_tokens={prompt_tokens}", "generated_tokens=3", f"edited_tokens={prompt_tokens + 1}", "finish=length",
    ):  # fmt: skip
        assert part in line
    assert server.log.read_text().count(messages[0].request_id) == 1
    with pytest.raises(RudderError) as caught:
        client.complete("secret prompt", max_tokens=0)
    line = server.log_line(caught.value.metadata["request_id"])
    assert "outcome=FIELD_INVALID" in line
    assert "refused_fields=sampling.max_tokens" in line
    assert "secret prompt" not in server.log.read_text()


def test_start_is_logged_with_hashes(client: Client, server: Running) -> None:
    bundle = client.model().bundles[0]
    assert f"bundle={bundle.name} sha256={bundle.sha256}" in server.log_line("serve: bundle loaded ")
    assert f"sites={SITE}" in server.log_line("self-test passed")
    assert f"grpc={server.address}" in server.log_line("serve: serving ")


SERVE = """
import asyncio, sys
from rudder.server import config
from rudder.server.serve import serve

if __name__ == "__main__":
    asyncio.run(serve(config.load(overrides=dict(argument.split("=", 1) for argument in sys.argv[1:]))))
"""


def test_port_taken_after_the_check_leaves_no_engine_process(server: Running, tmp_path: Path) -> None:
    """`rudder serve` checks its ports first, so another process can take one only while the engine starts."""
    (tmp_path / "serve.py").write_text(SERVE)
    flags = {**FLAGS, "listen.port": str(server.port), "listen.metrics_port": "0"}
    arguments = [f"{name}={value}" for name, value in flags.items()]
    with (tmp_path / "log").open("wb") as log:
        # A session of its own: the engine process belongs to it too.
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "serve.py"), *arguments], stdout=log, stderr=log, start_new_session=True
        )
    assert process.wait(120) == 1
    log_text = (tmp_path / "log").read_text()
    assert "self-test passed" in log_text
    assert f"listen.port: cannot listen on {server.address}" in log_text
    # Python's own helper processes end a moment after the one that they helped.
    deadline = time.monotonic() + 10
    while group_exists(process.pid):
        assert time.monotonic() < deadline, "a process of the server is left"
        time.sleep(0.1)


def group_exists(group: int) -> bool:
    """Return whether any process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_port_in_use_is_named_before_the_engine_starts(server: Running) -> None:
    command = [sys.executable, "-m", "rudder.server", "serve", "--listen.port", str(server.port)]
    second = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert second.returncode == 2
    assert "listen.port" in second.stderr


def test_calls_are_accepted_for_accept_s_after_sigterm(tmp_path: Path) -> None:
    with running(tmp_path, **{"listen.accept_s": "4"}) as draining, Client(draining.address) as client:
        draining.process.send_signal(signal.SIGTERM)
        with pytest.raises(RudderError):
            client.wait_ready(timeout=1)
        assert client.complete(PROMPT, max_tokens=3).text
        assert draining.process.wait(30) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_process_group_lets_streams_finish(number: signal.Signals, tmp_path: Path) -> None:
    """As a terminal sends SIGINT: the engine process must not take it for its own."""
    flags = {"listen.drain_s": "60"}
    with running(tmp_path, **flags) as draining, Client(draining.address) as client:
        stream = client.generate(PROMPT, max_tokens=300, ignore_eos=True)
        next(stream)
        os.killpg(draining.process.pid, number)
        time.sleep(1)
        with Client(draining.address) as late, pytest.raises(RudderError) as caught:
            late.complete("x", timeout=5)
        assert caught.value.code == "UNAVAILABLE"
        assert 1 + sum(len(chunk.token_ids) for chunk in stream) >= 300
        assert draining.process.wait(60) == 0


def write_policy(folder: Path) -> None:
    """Write a policy whose guards refuse prompts of 200 tokens or more, and hold every answer back."""
    score = {"terms": [{"site": SITE, "row": {"probe": {"weights": [1.0] * 192}}, "weight": 1}]}
    guards = [
        {"name": "answer", "score": score, "level": 1e9, "action": "GUARD_ACTION_STOP", "hold_back": 4},
        {"name": "long", "score": score, "level": -1e9, "min_tokens": 200, "action": "GUARD_ACTION_REJECT"},
    ]
    rights = {"edit_latents": True, "edit_before_guard": True}
    policy = {"name": "held", "version": 1, "binds": {"all": True}, "guards": guards, "rights": rights}
    folder.mkdir()
    (folder / "held.yaml").write_text(json.dumps(policy | {"refusal": "Too [long]."}))


async def test_lost_telemetry_fails_every_call_with_its_reason_before_the_server_stops(tmp_path: Path) -> None:
    """Streams that report nothing, that report features, that are steered, of two choices, and whole answers.

    A guard holds all of them back; a prompt that another one refuses is answered with the operator's text.
    """
    kinds: list[dict[str, Any]] = [{}, {"report": Report(top_k=1)}, {"steer": program(1)}, {"n": 2}]
    write_policy(tmp_path / "policies")
    flags = {"policies.folder": str(tmp_path / "policies"), "policies.allow_uncertified": "true"}
    with running(tmp_path, module="tests.e2e.lossy_server", **flags) as lossy:
        async with AsyncClient(lossy.address, timeout=60) as client:
            refused = await client.complete(f"{PROMPT} " * 60, max_tokens=4)
            assert refused.refusal
            assert (refused.refusal.policy, refused.refusal.rule, refused.refusal.position) == ("held", "long", 200)
            assert (refused.choices[0].finish_reason, refused.text) == ("refused", "")
            with pytest.raises(RudderError, match="rule 'long'") as error:
                await client.inspect(f"{PROMPT} " * 60)
            assert error.value.reason == "POLICY_REFUSED"
            assert lossy.metric("rudder_guard_verdicts_total", rule="long", action="reject", mode="enforce") == 2
            streams = [client.generate(PROMPT, max_tokens=400, ignore_eos=True, **kind) for kind in kinds * 2]
            for stream in streams:
                await anext(stream)
            whole = [asyncio.create_task(client.complete(PROMPT, max_tokens=400, ignore_eos=True)) for _ in range(2)]
            lossy.process.send_signal(signal.SIGUSR1)
            sent = time.monotonic()

            async def read(stream: AsyncStream) -> None:
                async for _ in stream:
                    pass

            results = await asyncio.gather(*map(read, streams), *whole, return_exceptions=True)
            assert time.monotonic() - sent < 3
        reasons = [(error.code, error.reason) for error in results if isinstance(error, RudderError)]
        assert reasons == [("UNAVAILABLE", "VERDICT_LOST")] * len(results)
        assert lossy.process.wait(30) == 1
    assert lossy.log.read_text().count("outcome=VERDICT_LOST") == len(results)
