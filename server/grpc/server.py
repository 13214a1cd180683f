"""The server process: engine, services, health, metrics, and how it leaves."""

import logging

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from rudder.server import config as configuration
from rudder.server.config import Config
from rudder.server.engine.engine import Engine
from rudder.server.grpc.features import FeatureServicer
from rudder.server.grpc.inference import InferenceServicer
from rudder.server.grpc.interceptors import CallInterceptor
from rudder.server.grpc.model import ModelServicer
from rudder.server.service.limits import bounds_of
from rudder.server.service.pace import Pace
from rudder.server.service.serving import Serving, labels_of
from rudder.v1 import catalogue_pb2, catalogue_pb2_grpc, inference_pb2, inference_pb2_grpc

SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    catalogue_pb2.DESCRIPTOR.services_by_name["FeatureService"].full_name,
    catalogue_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
)

LONGEST_REQUEST_S = 3600
# Calls beyond what queue and engine hold: they are to meet Rudder's own refusals, which give reasons.
SPARE_CALLS = 1024

logger = logging.getLogger(__name__)


def options(limits: configuration.Limits) -> tuple[tuple[str, int], ...]:
    """gRPC's channel options."""
    return (
        ("grpc.max_receive_message_length", limits.max_message_bytes),
        ("grpc.max_send_message_length", limits.max_reply_bytes),
        # Two servers on one port would share its calls in silence.
        ("grpc.so_reuseport", 0),
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.max_concurrent_streams", 1024),
        # A client that vanished without closing is noticed by these pings.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.max_connection_idle_ms", 30 * 60_000),
        # Clients behind DNS learn of new replicas when a connection ends; requests under way are let finish.
        ("grpc.max_connection_age_ms", 10 * 60_000),
        ("grpc.max_connection_age_grace_ms", (LONGEST_REQUEST_S + 30) * 1000),
    )


def serving_of(config: Config, engine: Engine) -> Serving:
    """What the servicers share."""
    bounds = bounds_of(config.limits, engine.model.max_model_len, engine.model.vocab_size)
    labels = {name: labels_of(bundle) for name, bundle in engine.bundles.items()}
    return Serving(config, engine, bounds, Pace(config.stream), labels)


async def build(serving: Serving) -> tuple[grpc.aio.Server, int, health.aio.HealthServicer]:
    """The gRPC server, not yet started, its port and its health, which is NOT_SERVING."""
    config = serving.config
    server = grpc.aio.server(
        interceptors=[CallInterceptor(serving)],
        options=options(config.limits),
        maximum_concurrent_rpcs=config.limits.queue + config.engine.max_num_seqs + SPARE_CALLS,
    )
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(serving), server)
    catalogue_pb2_grpc.add_FeatureServiceServicer_to_server(FeatureServicer(serving), server)
    catalogue_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(serving), server)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    await set_health(checks, serving=False)
    reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    port = server.add_insecure_port(f"{config.listen.host}:{config.listen.port}")
    return server, port, checks


async def set_health(checks: health.aio.HealthServicer, *, serving: bool) -> None:
    """One answer for the server and each of its services."""
    status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
    for name in ("", "liveness", "readiness", *SERVICES):
        await checks.set(name, status)
