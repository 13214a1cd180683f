"""Options of the gRPC channel, and the health check without the package grpcio-health-checking."""

from typing import Any

OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 60_000),
    # Reconnect quickly to a server that is starting.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
# Serialized grpc.health.v1.HealthCheckRequest for the whole server, and HealthCheckResponse with status SERVING.
WHOLE_SERVER = b""
IS_SERVING = b"\x08\x01"
CHECK_S = 2.0
BETWEEN_CHECKS_S = 0.2


def as_bytes(message: bytes) -> bytes:
    """Return the message: (de)serializer of a method whose messages are bytes."""
    return message
