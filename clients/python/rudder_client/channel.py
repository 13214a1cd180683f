"""The gRPC channel of a client, its end in a forked process, and the health check without grpcio-health-checking."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn
from weakref import WeakSet

Options = Sequence[tuple[str, Any]] | Mapping[str, Any]
Metadata = Sequence[tuple[str, str | bytes]] | Mapping[str, str | bytes]
OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.keepalive_time_ms", 60_000),
    # Reconnect quickly to a server that is starting.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
# Options of a client of several replicas behind one name, such as dns:///rudder:50051: calls go in turn to those that
# are ready, and a call of which no answer has begun is tried on another when its replica ends.
REPLICAS: tuple[tuple[str, Any], ...] = (
    (
        "grpc.service_config",
        json.dumps(
            {
                "loadBalancingConfig": [{"round_robin": {}}],
                "healthCheckConfig": {"serviceName": ""},
                "methodConfig": [
                    {
                        "name": [{}],
                        "retryPolicy": {
                            "maxAttempts": 4,
                            "initialBackoff": "0.1s",
                            "maxBackoff": "2s",
                            "backoffMultiplier": 2,
                            "retryableStatusCodes": ["UNAVAILABLE"],
                        },
                    }
                ],
            }
        ),
    ),
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


LOOPBACK = re.compile(
    r"(ipv4:|ipv6:|dns:/*)?(localhost|127(\.\d{1,3}){1,3}|\[::1\]|::1|\[::ffff:127\.[\d.]+\])(:\d+)?", re.I
)


def is_local(address: str) -> bool:
    """Return whether an address is on this machine."""
    return bool(LOOPBACK.fullmatch(address)) or address.startswith("unix")


def options_for(address: str, options: Options) -> list[tuple[str, Any]]:
    """Return the options of a channel; those of the caller take precedence.

    A server on this machine is reached without the proxy that http_proxy, https_proxy or all_proxy name.
    """
    local = is_local(address)
    return list((dict(OPTIONS) | ({"grpc.enable_http_proxy": 0} if local else {}) | dict(options)).items())


def seconds(timeout: float | None, default: float | None) -> float | None:
    """Return the time for a call; None: no bound."""
    return default if timeout is None else timeout


def metadata_of(metadata: Metadata) -> tuple[tuple[str, Any], ...]:
    """Return the metadata of every call as pairs."""
    return tuple(metadata.items() if isinstance(metadata, Mapping) else metadata)


def authorization(token: str, address: str, *, secure: bool) -> tuple[tuple[str, str], ...]:
    """Return the metadata of a bearer token. ValueError: it would cross a network without TLS."""
    if not token:
        return ()
    if not secure and not is_local(address):
        raise ValueError(f"token: {address} is another machine: name the credentials of TLS")
    return (("authorization", f"Bearer {token}"),)


class Forked:
    """What a client's channel, stubs and calls are in a forked process: gRPC's threads exist in the first one alone."""

    def __getattr__(self, name: str) -> NoReturn:
        raise RuntimeError("this client belongs to the process that was forked: create a Client after the fork")

    def __next__(self) -> NoReturn:
        self.__getattr__("next")

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        self.__getattr__("call")

    def close(self) -> None:
        """Do nothing: the connection is the other process's."""

    def cancel(self) -> None:
        """Do nothing, as `close`."""


class ForkGuard:
    """A client or a stream, whose attributes in FORK_ATTRIBUTES a fork replaces in the new process."""

    FORK_ATTRIBUTES: tuple[str, ...]

    def guard_fork(self) -> None:
        """Begin to guard; the attributes exist."""
        guarded.add(self)


guarded: WeakSet[ForkGuard] = WeakSet()
kept: list[object] = []


def end_in_forked_process() -> None:
    """Replace the attributes of all clients and streams of the process that was forked."""
    for owner in list(guarded):
        for name in owner.FORK_ATTRIBUTES:
            # Kept: gRPC would wait for threads that this process does not have when it deletes them.
            kept.append(getattr(owner, name))
            setattr(owner, name, Forked())


os.register_at_fork(after_in_child=end_in_forked_process)
