"""The one table of errors: from what went wrong to a canonical code with google.rpc details (AIP-193)."""

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import NoReturn

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from rudder.server.engine.adapter import EngineDeadError
from rudder.server.engine.admission import QueueFull
from rudder.server.engine.telemetry.frame import TelemetryLost
from rudder.server.program.errors import ProgramError

DOMAIN = "rudder"
# A status travels in one trailer; beyond about 8 KiB clients see another error in its place.
MAX_STATUS_BYTES = 4096
MAX_VIOLATIONS = 16
MAX_MESSAGE_CHARS = 200
MAX_FIELD_CHARS = 80
MAX_DESCRIPTION_CHARS = 120

CODES: dict[str, grpc.StatusCode] = {
    "FIELD_INVALID": grpc.StatusCode.INVALID_ARGUMENT,
    "FEATURE_UNKNOWN": grpc.StatusCode.NOT_FOUND,
    "SITE_UNKNOWN": grpc.StatusCode.NOT_FOUND,
    "PROGRAM_UNKNOWN": grpc.StatusCode.NOT_FOUND,
    "ROW_LOCKED": grpc.StatusCode.PERMISSION_DENIED,
    "QUEUE_FULL": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "BANK_ROWS_FULL": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "BANK_SLOTS_FULL": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "BANK_CAPTURE_FULL": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "DRAINING": grpc.StatusCode.UNAVAILABLE,
    "ENGINE_DEAD": grpc.StatusCode.UNAVAILABLE,
    "CLIENT_TOO_SLOW": grpc.StatusCode.DEADLINE_EXCEEDED,
    "VERDICT_LOST": grpc.StatusCode.UNAVAILABLE,
    "INTERNAL": grpc.StatusCode.INTERNAL,
}
# What a request that did not fit in the bank, nor in the queue before it, waited for.
FULL = {
    "rows": "BANK_ROWS_FULL",
    "slots": "BANK_SLOTS_FULL",
    "capture_tokens": "BANK_CAPTURE_FULL",
    "queue": "QUEUE_FULL",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Violation:
    """A field at fault, by its path in the request, and what is wrong with it."""

    field: str
    description: str


class Refusal(Exception):
    """A call's end other than OK. `reason` is a key of CODES."""

    def __init__(
        self, reason: str, message: str, violations: Sequence[Violation] = (), retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.reason, self.message, self.violations, self.retry_after_s = reason, message, violations, retry_after_s
        self.error_id = ""

    @property
    def code(self) -> grpc.StatusCode:
        """The canonical code."""
        return CODES[self.reason]


def invalid(field: str, description: str, reason: str = "FIELD_INVALID") -> Refusal:
    """A refusal because of one field."""
    return Refusal(reason, f"{field}: {description}", [Violation(field, description)])


def refusal_of(error: BaseException) -> Refusal:
    """What the client is told of any exception. The text of an unexpected one stays in the log, under an id."""
    match error:
        case Refusal():
            return error
        case BaseExceptionGroup():
            return refusal_of(error.exceptions[0])
        case DecodeError():
            return Refusal("FIELD_INVALID", "the bytes are not a request of this method")
        case ProgramError():
            return invalid(error.field, error.message, error.reason)
        case QueueFull():
            return Refusal(FULL[error.resource], str(error), retry_after_s=error.retry_after_s)
        case TelemetryLost():
            return Refusal("VERDICT_LOST", "the worker's report about this request was lost")
        case EngineDeadError():
            return Refusal("ENGINE_DEAD", "the engine is gone")
    refusal = Refusal("INTERNAL", "internal error")
    refusal.error_id = secrets.token_hex(8)
    logger.error("error %s", refusal.error_id, exc_info=error)
    return refusal


def status_of(refusal: Refusal, request_id: str) -> status_pb2.Status:
    """The google.rpc.Status of a refusal, at most MAX_STATUS_BYTES."""
    status = status_pb2.Status(code=refusal.code.value[0], message=clipped(refusal.message, MAX_MESSAGE_CHARS))
    metadata = {"request_id": request_id}
    if refusal.error_id:
        metadata["error_id"] = refusal.error_id
    if len(refusal.violations) > MAX_VIOLATIONS:
        metadata["violations"] = str(len(refusal.violations))
    add_detail(status, error_details_pb2.ErrorInfo(reason=refusal.reason, domain=DOMAIN, metadata=metadata))
    if refusal.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        quota = error_details_pb2.QuotaFailure.Violation(subject=refusal.reason, description=status.message)
        add_detail(status, error_details_pb2.QuotaFailure(violations=[quota]))
    if refusal.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(ceil(refusal.retry_after_s * 1000))
        add_detail(status, retry)
    if refusal.violations:
        add_detail(status, bad_request(refusal.violations, MAX_STATUS_BYTES - status.ByteSize() - 128))
    return status


def bad_request(violations: Sequence[Violation], budget: int) -> error_details_pb2.BadRequest:
    """The first violations, as many as fit into `budget` bytes."""
    found = error_details_pb2.BadRequest()
    for violation in violations[:MAX_VIOLATIONS]:
        found.field_violations.add(
            field=clipped(violation.field, MAX_FIELD_CHARS),
            description=clipped(violation.description, MAX_DESCRIPTION_CHARS),
        )
        if found.ByteSize() > budget:
            del found.field_violations[-1]
            break
    return found


def add_detail(status: status_pb2.Status, detail: Message) -> None:
    """Pack `detail` into the status."""
    status.details.add().Pack(detail)


def clipped(text: str, chars: int) -> str:
    """`text` without its middle, where it is longer than `chars`."""
    half = chars // 2 - 1
    return text if len(text) <= chars else f"{text[:half]}…{text[-half:]}"


async def abort(context: "grpc.aio.ServicerContext[Message, Message]", refusal: Refusal, request_id: str) -> NoReturn:
    """End the call with the refusal's code, details and, where trying again helps, when to."""
    trailers: list[tuple[str, str | bytes]] = [
        ("rudder-request-id", request_id),
        ("grpc-status-details-bin", status_of(refusal, request_id).SerializeToString()),
    ]
    if refusal.retry_after_s is not None:
        trailers.append(("grpc-retry-pushback-ms", str(ceil(refusal.retry_after_s * 1000))))
    await context.abort(refusal.code, clipped(refusal.message, MAX_MESSAGE_CHARS), tuple(trailers))
    raise AssertionError("abort raises")
