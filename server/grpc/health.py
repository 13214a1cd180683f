"""Health of the server, over gRPC: on the door itself, and on a port of its own for probes that cannot do TLS."""

from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from rudder.server.config import ConfigError, Listen

SERVICE_NAME = health.SERVICE_NAME
LIVENESS, READINESS = "liveness", "readiness"
STOP_S = 1.0
# A health check is a name of a few bytes on a connection of its own; whoever watches connects anew each minute.
OPTIONS = (
    ("grpc.max_receive_message_length", 4096),
    ("grpc.so_reuseport", 0),
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_concurrent_streams", 16),
    ("grpc.max_connection_age_ms", 60_000),
    ("grpc.max_connection_age_grace_ms", 1000),
)


class Health:
    """What the server says of itself: by the names of its services, "" and `readiness` whether to route calls here,
    and by `liveness` whether to keep the process. A server that drains, or is full, is alive.
    """

    def __init__(self, services: tuple[str, ...]) -> None:
        self.ready_names = ("", READINESS, *services)
        self.servicer = health.aio.HealthServicer()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve grpc.health.v1 on `server`."""
        health_pb2_grpc.add_HealthServicer_to_server(self.servicer, server)

    async def set(self, ready: bool, alive: bool) -> None:
        """Set all names. Call it before a listener starts: gRPC's servicer begins with SERVING."""
        for name in self.ready_names:
            await self.servicer.set(name, status(ready))
        await self.servicer.set(LIVENESS, status(alive))


def status(good: bool) -> Any:
    """Return SERVING or NOT_SERVING."""
    return health_pb2.HealthCheckResponse.SERVING if good else health_pb2.HealthCheckResponse.NOT_SERVING


class HealthListener:
    """Serves grpc.health.v1 and nothing else, without TLS or credentials, on `listen.health_port`.

    The kubelet's probes have no certificate, and speak only plaintext before Kubernetes 1.37.
    """

    def __init__(self, state: Health, listen: Listen) -> None:
        self.listen = listen
        self.server = grpc.aio.server(options=OPTIONS)
        state.add_to(self.server)

    async def start(self, port: int) -> str:
        """Listen, and return the address. Raises ConfigError if the port cannot be bound."""
        address = self.listen.address(port)
        try:
            port = self.server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError("listen.health_port", f"cannot listen on {address}") from error
        await self.server.start()
        return self.listen.address(port)

    async def stop(self) -> None:
        """End all watches, and close the port."""
        await self.server.stop(STOP_S)
