"""How the server is reached and asked for its health, without further packages."""

from typing import Any

OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 60_000),
    # A server that has just been started is tried again soon.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
# grpc.health.v1.HealthCheckRequest for the whole server, and the HealthCheckResponse with status SERVING, as bytes.
WHOLE_SERVER = b""
IS_SERVING = b"\x08\x01"
CHECK_S = 2.0
BETWEEN_CHECKS_S = 0.2


def as_bytes(message: bytes) -> bytes:
    """Bytes need no (de)serialising."""
    return message
