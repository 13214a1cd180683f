"""The listener of health checks: the same health as the door's, in plaintext, and nothing else."""

import socket
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rudder.server.config import ConfigError, Listen
from rudder.server.grpc.health import LIVENESS, READINESS, Health, HealthListener
from rudder.v1 import catalogue_pb2, catalogue_pb2_grpc

SERVICE = "rudder.v1.InferenceService"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def state() -> Health:
    state = Health((SERVICE,))
    await state.set(ready=False, alive=True)
    return state


@pytest.fixture
async def channel(state: Health) -> AsyncIterator[grpc.aio.Channel]:
    listener = HealthListener(state, Listen())
    async with grpc.aio.insecure_channel(await listener.start(0)) as channel:
        yield channel
    await listener.stop()


async def check(channel: grpc.aio.Channel, name: str) -> Any:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=20)).status


async def test_a_server_that_starts_or_drains_is_alive_and_not_ready(state: Health, channel: grpc.aio.Channel) -> None:
    for name in ("", READINESS, SERVICE):
        assert await check(channel, name) == NOT_SERVING
    assert await check(channel, LIVENESS) == SERVING
    await state.set(ready=True, alive=True)
    for name in ("", READINESS, SERVICE, LIVENESS):
        assert await check(channel, name) == SERVING


async def test_a_server_whose_engine_has_died_is_not_alive(state: Health, channel: grpc.aio.Channel) -> None:
    await state.set(ready=False, alive=False)
    assert await check(channel, LIVENESS) == NOT_SERVING


async def test_it_serves_health_alone(channel: grpc.aio.Channel) -> None:
    reflect: Any = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    models: Any = catalogue_pb2_grpc.ModelServiceStub(channel)
    for call in (models.Get(catalogue_pb2.ModelServiceGetRequest(), timeout=20), reflect(iter([b""])).read()):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_a_name_that_no_service_has_is_not_found(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await check(channel, "rudder.v1.NoService")
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_port_in_use_is_a_configuration_error(state: Health) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        listener = HealthListener(state, Listen())
        with pytest.raises(ConfigError, match=r"^listen\.health_port: cannot listen on"):
            await listener.start(other.getsockname()[1])
        await listener.stop()
