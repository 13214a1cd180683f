"""The error of a failed call."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import grpc
from google.protobuf.message import Message

from rudder.v1 import error_pb2

M = TypeVar("M", bound=Message)


@dataclass(frozen=True)
class FieldViolation:
    """An invalid field: its path in the request, and the reason."""

    field: str
    description: str


class RudderError(Exception):
    """A call that failed.

    `code`: name of the gRPC status code, such as INVALID_ARGUMENT. `reason`: the server's reason, such as
    FEATURE_UNKNOWN; empty if the call did not reach the server. `violations`: the invalid fields. `retry_after`:
    seconds after which to retry; None if a retry does not help.
    """

    def __init__(self, code: str, message: str, status: error_pb2.ErrorStatus) -> None:
        info = detail(status, error_pb2.ErrorInfo())
        retry = detail(status, error_pb2.RetryInfo())
        self.code, self.message, self.reason = code, message, info.reason
        self.metadata = dict(info.metadata)
        self.violations = tuple(
            FieldViolation(v.field, v.description) for v in detail(status, error_pb2.BadRequest()).field_violations
        )
        delay = retry.retry_delay
        self.retry_after = delay.seconds + delay.nanos / 1e9 if retry.HasField("retry_delay") else None
        super().__init__(f"{self.reason or code}: {message}")


def detail(status: error_pb2.ErrorStatus, empty: M) -> M:
    """Return the detail of a status that has the type of `empty`; `empty` if there is none."""
    name = f"google.rpc.{empty.DESCRIPTOR.name}"
    for packed in status.details:
        if packed.type_url.rpartition("/")[2] == name:
            empty.ParseFromString(packed.value)
    return empty


def error_of(failure: grpc.RpcError | grpc.aio.AioRpcError) -> RudderError:
    """Convert the error of a call to a RudderError."""
    trailers: Iterable[tuple[str, Any]] = cast(Any, failure).trailing_metadata() or ()
    packed = b"".join(value for key, value in trailers if key == "grpc-status-details-bin")
    return RudderError(failure.code().name, failure.details() or "", error_pb2.ErrorStatus.FromString(packed))


@contextmanager
def translated() -> Iterator[None]:
    """Raise RudderError in place of the errors of gRPC."""
    try:
        yield
    except grpc.RpcError as failure:
        raise error_of(failure) from failure


def not_ready(timeout: float) -> RudderError:
    """Build the error for a server that answers health checks, but is not SERVING."""
    return RudderError("UNAVAILABLE", f"not SERVING after {timeout:g} s", error_pb2.ErrorStatus())
