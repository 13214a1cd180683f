"""The gRPC door over a scripted engine: metadata in, trailers and statuses out, two doors in one process."""

import asyncio
import logging
import re
import signal
import socket
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry, generate_latest

from rudder.server import config
from rudder.server.config import ConfigError
from rudder.server.engine.call import Call, FinishReason, Outcome, Output
from rudder.server.engine.telemetry.hub import no_features
from rudder.server.grpc import servicers
from rudder.server.grpc.server import GrpcDoor
from rudder.server.monitoring.metrics import Metrics
from rudder.server.serve import drain
from rudder.server.service.serving import Serving
from rudder.v1 import inference_pb2, inference_pb2_grpc
from rudder_client import REPLICAS, AsyncClient, RudderError
from rudder_client.errors import error_of

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
HEADERS = (("x-request-id", "order-7"), ("traceparent", f"00-{TRACE_ID}-00f067aa0ba902b7-01"))


class ScriptedEngine:
    """Generates tokens 1, 2, 3, ... of the text `x`; with `stall_after`, waits for ever after so many tokens."""

    def __init__(self) -> None:
        self.model = SimpleNamespace(name="m", max_model_len=100, vocab_size=1000, bos_token_id=None)
        self.bundles: dict[str, Any] = {}
        self.registry: Any = None
        self.programs: dict[str, Any] = {}
        self.tokenizer, self.epoch, self.healthy, self.stalled = None, "e1", True, False
        self.stall_after: int | None = None
        self.finish_reason = FinishReason.LENGTH

    def require_alive(self) -> None:
        """It never dies."""

    def uncounted(self, _: Call) -> tuple[int, ...]:
        """Every token is counted."""
        return ()

    async def stream(self, call: Call, on_abandoned: Callable[[Outcome], None]) -> AsyncIterator[Output]:
        generated, last = 0, call.sampling.max_tokens or 0

        def outcome(reason: FinishReason) -> Outcome:
            return Outcome(reason, None, len(call.prompt_ids), generated, 0, (), (), generated, (), 0.5)

        try:
            while generated < last:
                if generated == self.stall_after:
                    await asyncio.Event().wait()
                generated += 1
                end = outcome(self.finish_reason) if generated == last else None
                position = len(call.prompt_ids) + generated - 1
                nothing = no_features(0, 0, 0)
                yield Output("x", [generated], position, None, nothing, nothing, end)
        finally:
            if generated < last:
                on_abandoned(outcome(FinishReason.ABORT))


class Fixture:
    """A scripted engine behind two doors."""

    def __init__(self, **overrides: str) -> None:
        self.engine, self.registry = ScriptedEngine(), CollectorRegistry()
        loaded = config.load(overrides={"listen.port": "0"} | overrides)
        self.serving = Serving.around(self.engine, loaded, Metrics.create(self.registry))  # type: ignore[arg-type]
        self.doors = [GrpcDoor(self.serving), GrpcDoor(self.serving)]
        self.addresses: list[str] = []
        self.channels: list[grpc.aio.Channel] = []

    async def start(self) -> None:
        self.addresses = [await door.start() for door in self.doors]
        self.channels = [grpc.aio.insecure_channel(address) for address in self.addresses]

    async def stop(self) -> None:
        for channel, door in zip(self.channels, self.doors, strict=True):
            await channel.close()
            await door.stop(0)

    def stub(self, door: int = 0) -> Any:
        return inference_pb2_grpc.InferenceServiceStub(self.channels[door])

    def ended(self, method: str, outcome: str) -> float | None:
        labels = {"method": f"InferenceService.{method}", "outcome": outcome}
        return self.registry.get_sample_value("rudder_requests_total", labels)


@pytest.fixture
async def doors(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Fixture]:
    caplog.set_level(logging.INFO, "rudder")
    fixture = Fixture()
    await fixture.start()
    yield fixture
    await fixture.stop()


def prompt() -> inference_pb2.Prompt:
    return inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=[5, 6]))


def generate(max_tokens: int) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(prompt=prompt(), sampling=inference_pb2.Sampling(max_tokens=max_tokens))


def complete(max_tokens: int) -> inference_pb2.CompleteRequest:
    return inference_pb2.CompleteRequest(prompt=prompt(), sampling=inference_pb2.Sampling(max_tokens=max_tokens))


def access_fields(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.__dict__["fields"] for record in caplog.records if record.name == "rudder.access"]


async def test_both_doors_of_a_process_serve(doors: Fixture, caplog: pytest.LogCaptureFixture) -> None:
    request = inference_pb2.CompleteRequest(prompt=prompt(), sampling=inference_pb2.Sampling(max_tokens=3, n=2))
    for door in (0, 1):
        response = await doors.stub(door).Complete(request)
        assert [list(choice.token_ids) for choice in response.choices] == [[1, 2, 3]] * 2
        assert [choice.text for choice in response.choices] == ["xxx"] * 2
    assert doors.ended("Complete", "OK") == 2
    for line in access_fields(caplog):
        assert (line["prompt_tokens"], line["generated_tokens"], line["queued_s"]) == (2, 6, 0.5)


async def test_stream_carries_identifiers(doors: Fixture, caplog: pytest.LogCaptureFixture) -> None:
    call = doors.stub().Generate(generate(4), metadata=HEADERS)
    messages = [message async for message in call]
    trailers = dict(await call.trailing_metadata())
    assert [len(message.choices[0].token_ids) for message in messages] == [1] * 4
    assert [message.request_id for message in messages] == [trailers["rudder-request-id"], "", "", ""]
    assert trailers["rudder-program-digest"] == ""
    assert re.fullmatch("[0-9a-f]{32}", trailers["rudder-routing-key"])
    (line,) = access_fields(caplog)
    assert (line["correlation_id"], line["trace_id"], line["caller"]) == ("order-7", TRACE_ID, "anonymous")
    assert line["request_id"] == trailers["rudder-request-id"]


async def test_refusal_becomes_a_status_with_details(doors: Fixture) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await doors.stub().Complete(inference_pb2.CompleteRequest())
    error = error_of(caught.value)
    assert (error.code, error.reason, error.violations[0].field) == ("INVALID_ARGUMENT", "FIELD_INVALID", "prompt")
    assert error.metadata["request_id"] == dict(caught.value.trailing_metadata() or ())["rudder-request-id"]


@pytest.mark.parametrize(("timeout", "outcome"), [(None, "CANCELLED"), (0.3, "DEADLINE_EXCEEDED")])
async def test_abandoned_stream_is_recorded_as_far_as_it_came(
    doors: Fixture, caplog: pytest.LogCaptureFixture, timeout: float | None, outcome: str
) -> None:
    doors.engine.stall_after = 2
    call = doors.stub().Generate(generate(9), timeout=timeout)
    for _ in range(2):
        await call.read()
    if timeout is None:
        call.cancel()
    async with asyncio.timeout(5):
        while not access_fields(caplog):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    (line,) = access_fields(caplog)
    assert (line["outcome"], line["finish"], line["generated_tokens"]) == (outcome, ["abort"], 2)
    assert doors.ended("Generate", outcome) == 1


async def test_draining_server_refuses_calls_and_says_so(doors: Fixture) -> None:
    health: Any = health_pb2_grpc.HealthStub(doors.channels[0])
    request = health_pb2.HealthCheckRequest()
    assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert doors.registry.get_sample_value("rudder_ready") == 0
    await doors.doors[0].set_serving(True)
    assert doors.registry.get_sample_value("rudder_ready") == 1
    assert (await health.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
    doors.serving.draining = True
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await doors.stub().Complete(inference_pb2.CompleteRequest(prompt=prompt()))
    assert error_of(caught.value).reason == "DRAINING"


@pytest.mark.parametrize("healthy", [True, False])
async def test_a_door_is_alive_as_long_as_its_engine(doors: Fixture, healthy: bool) -> None:
    """While it drains too: what is not alive is killed in the middle of its streams."""
    health: Any = health_pb2_grpc.HealthStub(doors.channels[0])
    doors.engine.healthy = healthy
    await doors.doors[0].set_serving(False)
    good = health_pb2.HealthCheckResponse.SERVING if healthy else health_pb2.HealthCheckResponse.NOT_SERVING
    assert (await health.Check(health_pb2.HealthCheckRequest(service="liveness"))).status == good


async def test_second_stop_aborts_calls_within_the_grace_of_the_first(doors: Fixture) -> None:
    doors.engine.stall_after = 1
    call = doors.stub().Generate(generate(9))
    await call.read()
    first = asyncio.create_task(doors.doors[0].stop(60))
    await asyncio.sleep(0.1)
    assert not first.done()
    async with asyncio.timeout(5):
        await doors.doors[0].stop(0)
        await first
    assert await call.code() is not grpc.StatusCode.OK


async def test_answer_that_the_engine_cut_off_is_an_error(doors: Fixture) -> None:
    doors.engine.finish_reason = FinishReason.ABORT
    with pytest.raises(grpc.RpcError) as caught:
        await doors.stub().Complete(complete(2))
    assert (error_of(caught.value).code, error_of(caught.value).reason) == ("UNAVAILABLE", "ENGINE_DEAD")
    assert doors.ended("Complete", "ENGINE_DEAD") == 1


@pytest.mark.parametrize("second_signal", [False, True])
async def test_calls_that_the_end_of_a_drain_cuts_off_say_so(doors: Fixture, second_signal: bool) -> None:
    doors.engine.stall_after = 1
    stream, unary = doors.stub().Generate(generate(9)), doors.stub(1).Complete(complete(9))
    await stream.read()
    signalled = asyncio.get_running_loop().create_future()
    if second_signal:
        asyncio.get_running_loop().call_later(0.1, signalled.set_result, signal.SIGTERM)
    async with asyncio.timeout(5):
        await drain([*doors.doors], doors.serving, 60 if second_signal else 0.1, signalled)
    for call in (stream, unary):
        with pytest.raises(grpc.RpcError) as caught:
            await (call.read() if call is stream else call)
        error = error_of(caught.value)
        assert (error.code, error.reason) == ("UNAVAILABLE", "DRAINING")
    assert (doors.ended("Generate", "DRAINING"), doors.ended("Complete", "DRAINING")) == (1, 1)
    assert not doors.serving.calls


async def test_client_of_replicas_calls_those_that_are_ready(doors: Fixture) -> None:
    for door in doors.doors:
        await door.set_serving(True)
    async with AsyncClient(f"ipv4:{','.join(doors.addresses)}", timeout=60, options=REPLICAS) as client:

        async def complete(times: int) -> set[str]:
            return {(await client.complete([5, 6], max_tokens=2)).text for _ in range(times)}

        assert await complete(6) == {"xx"}
        await doors.doors[0].stop(0)
        assert await complete(6) == {"xx"}
        # It would take calls, but says that it should get none.
        await doors.doors[1].set_serving(False)
        with pytest.raises(RudderError) as caught:
            await complete(10_000)
        assert caught.value.code == "UNAVAILABLE"


async def test_port_in_use_is_a_configuration_error() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        fixture = Fixture()
        fixture.doors[0].listen = config.Listen(port=other.getsockname()[1])
        with pytest.raises(ConfigError, match=r"listen\.port: cannot listen on"):
            await fixture.doors[0].start()
        await fixture.doors[0].stop(0)


async def test_requests_in_progress_have_a_budget_in_bytes() -> None:
    fixture = Fixture(**{"limits.max_pending_bytes": "10000"})
    await fixture.start()
    fixture.engine.stall_after = 1
    request = generate(9)
    request.sampling.stop.append("s" * 200)
    request.prompt.token_ids.ids.extend([5] * 80)
    size = request.ByteSize()
    calls = []
    for _ in range(10_000 // size):
        calls.append(fixture.stub().Generate(request))
        await calls[-1].read()
    assert fixture.registry.get_sample_value("rudder_pending_request_bytes") == size * len(calls)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fixture.stub().Complete(inference_pb2.CompleteRequest(prompt=request.prompt, sampling=request.sampling))
    error = error_of(caught.value)
    assert (error.code, error.reason, error.retry_after) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL", 1.0)
    calls.pop().cancel()
    async with asyncio.timeout(5):
        while fixture.serving.pending.used > size * len(calls):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    call = fixture.stub().Generate(request)
    await call.read()
    for running in (*calls, call):
        running.cancel()
    async with asyncio.timeout(5):
        while fixture.serving.pending.used:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert fixture.registry.get_sample_value("rudder_pending_request_bytes") == 0
    await fixture.stop()


async def test_methods_headers_and_names_of_strangers_leave_no_series(doors: Fixture) -> None:
    before = {sample.name for family in doors.registry.collect() for sample in family.samples}
    lines = len(generate_latest(doors.registry).splitlines())
    for number in range(100):
        for path in (f"/rudder.v1.InferenceService/M{number}", f"/rudder.v1.S{number}/Generate", f"/{number}"):
            unknown: Any = doors.channels[0].unary_unary(path)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await unknown(b"", metadata=((f"x-{number}", "y"), ("authorization", path)))
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert {sample.name for family in doors.registry.collect() for sample in family.samples} == before
    assert len(generate_latest(doors.registry).splitlines()) == lines


async def test_write_to_a_client_that_is_gone_waits_for_the_cancellation(monkeypatch: pytest.MonkeyPatch) -> None:
    """gRPC may fail the write before it cancels the handler: such a call is CANCELLED, not an internal error."""

    async def failed(_: Any) -> None:
        raise grpc.aio.InternalError("gone")

    context: Any = SimpleNamespace(write=failed)
    task = asyncio.create_task(servicers.send(context, inference_pb2.GenerateResponse(), config.Limits()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # An error that no cancellation follows stays one.
    monkeypatch.setattr(servicers, "CANCELLATION_S", 0.0)
    with pytest.raises(grpc.aio.InternalError):
        await servicers.send(context, inference_pb2.GenerateResponse(), config.Limits())
