"""The gRPC door: a server with Rudder's services, health and reflection."""

import grpc
from grpc_reflection.v1alpha import reflection

from rudder.server import config as configuration
from rudder.server.config import ConfigError
from rudder.server.grpc.credentials import server_credentials
from rudder.server.grpc.health import SERVICE_NAME, Health
from rudder.server.grpc.interceptors import CallInterceptor
from rudder.server.grpc.servicers import (
    DebugServicer,
    FeatureServicer,
    InferenceServicer,
    ModelServicer,
    PolicyServicer,
)
from rudder.server.service.serving import Serving
from rudder.v1 import (
    catalogue_pb2,
    catalogue_pb2_grpc,
    debug_pb2,
    debug_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    policy_pb2,
    policy_pb2_grpc,
)

SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    catalogue_pb2.DESCRIPTOR.services_by_name["FeatureService"].full_name,
    catalogue_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
    policy_pb2.DESCRIPTOR.services_by_name["PolicyService"].full_name,
    debug_pb2.DESCRIPTOR.services_by_name["DebugService"].full_name,
)
LONGEST_REQUEST_S = 3600
# Calls beyond what queue and engine hold: Rudder refuses them itself, as its refusals give reasons and gRPC's do not.
SPARE_CALLS = 1024


class GrpcDoor:
    """Serves the contract over gRPC. Until `set_serving`, health says NOT_SERVING."""

    name = "grpc"

    def __init__(self, serving: Serving) -> None:
        config = serving.config
        self.listen, self.engine, self.metrics = config.listen, serving.engine, serving.metrics
        self.credentials = server_credentials(config.tls, serving.metrics)
        self.server = grpc.aio.server(
            interceptors=[CallInterceptor(serving)],
            options=options(config.limits),
            maximum_concurrent_rpcs=config.limits.queue + config.engine.max_num_seqs + SPARE_CALLS,
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(serving), self.server)
        catalogue_pb2_grpc.add_FeatureServiceServicer_to_server(FeatureServicer(serving), self.server)
        catalogue_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(serving), self.server)
        policy_pb2_grpc.add_PolicyServiceServicer_to_server(PolicyServicer(serving), self.server)
        debug_pb2_grpc.add_DebugServiceServicer_to_server(DebugServicer(serving), self.server)
        self.health = Health(SERVICES)
        self.health.add_to(self.server)
        reflection.enable_server_reflection((*SERVICES, SERVICE_NAME, reflection.SERVICE_NAME), self.server)

    async def start(self) -> str:
        """Listen, and return the address. Raises ConfigError if the port cannot be bound."""
        await self.set_serving(False)
        address = self.listen.address(self.listen.port)
        try:
            port = (
                self.server.add_secure_port(address, self.credentials)
                if self.credentials
                else self.server.add_insecure_port(address)
            )
        except RuntimeError as error:
            raise ConfigError("listen.port", f"cannot listen on {address}") from error
        await self.server.start()
        return self.listen.address(port)

    async def set_serving(self, serving: bool) -> None:
        """Set the health of the server and of each of its services. It is alive as long as its engine is."""
        self.metrics.set_ready(serving)
        await self.health.set(serving, self.engine.healthy)

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, and abort those that still run after `grace_s`."""
        await self.server.stop(grace_s)


def options(limits: configuration.Limits) -> tuple[tuple[str, int], ...]:
    """Return gRPC's channel options."""
    return (
        # Larger messages are refused with a reason; gRPC's own refusal, of what is larger still, has none.
        ("grpc.max_receive_message_length", 2 * limits.max_message_bytes),
        ("grpc.max_send_message_length", limits.max_reply_bytes),
        # With it, two servers on one port would silently share its calls.
        ("grpc.so_reuseport", 0),
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.max_concurrent_streams", 1024),
        # Pings detect a client that vanished without closing its connection.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.max_connection_idle_ms", 30 * 60_000),
        # Clients behind DNS learn of new replicas when a connection ends; running requests may finish.
        ("grpc.max_connection_age_ms", 10 * 60_000),
        ("grpc.max_connection_age_grace_ms", (LONGEST_REQUEST_S + 30) * 1000),
    )
