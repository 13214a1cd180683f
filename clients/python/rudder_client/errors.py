"""What a failed call says."""

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
    """A field at fault, by its path in the request, and what is wrong with it."""

    field: str
    description: str


class RudderError(Exception):
    """A call that did not end OK.

    `code`: gRPC's name, such as INVALID_ARGUMENT. `reason`: the server's, such as FEATURE_UNKNOWN, or empty where the
    call did not get as far as the server. `retry_after`: seconds until it may be tried again, where that helps.
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
    """The status's detail of the type of `empty`, or `empty`."""
    name = f"google.rpc.{empty.DESCRIPTOR.name}"
    for packed in status.details:
        if packed.type_url.rpartition("/")[2] == name:
            empty.ParseFromString(packed.value)
    return empty


def error_of(failure: grpc.RpcError | grpc.aio.AioRpcError) -> RudderError:
    """A failed call as a RudderError."""
    trailers: Iterable[tuple[str, Any]] = cast(Any, failure).trailing_metadata() or ()
    packed = b"".join(value for key, value in trailers if key == "grpc-status-details-bin")
    return RudderError(failure.code().name, failure.details() or "", error_pb2.ErrorStatus.FromString(packed))


@contextmanager
def translated() -> Iterator[None]:
    """Failed calls inside raise RudderError."""
    try:
        yield
    except grpc.RpcError as failure:
        raise error_of(failure) from failure


def not_ready(timeout: float) -> RudderError:
    """The server answers, but does not serve."""
    return RudderError("UNAVAILABLE", f"not SERVING after {timeout:g} s", error_pb2.ErrorStatus())
