"""The one table of errors: each reason with its gRPC code and HTTP status, and the reason of each exception."""

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from rudder.server.engine.adapter import EngineDeadError
from rudder.server.engine.admission import QueueFull
from rudder.server.engine.telemetry.frame import TelemetryLost
from rudder.server.program.errors import ProgramError


@dataclass(frozen=True)
class Reason:
    """How doors report a reason: the name of a canonical code (google.rpc.Code), and an HTTP status."""

    code: str
    http_status: int


REASONS: dict[str, Reason] = {
    "FIELD_INVALID": Reason("INVALID_ARGUMENT", 400),
    "FEATURE_UNKNOWN": Reason("NOT_FOUND", 404),
    "SITE_UNKNOWN": Reason("NOT_FOUND", 404),
    "PROGRAM_UNKNOWN": Reason("NOT_FOUND", 404),
    "ROW_LOCKED": Reason("PERMISSION_DENIED", 403),
    "POLICY_FORBIDS": Reason("PERMISSION_DENIED", 403),
    "QUEUE_FULL": Reason("RESOURCE_EXHAUSTED", 429),
    "BANK_ROWS_FULL": Reason("RESOURCE_EXHAUSTED", 429),
    "BANK_SLOTS_FULL": Reason("RESOURCE_EXHAUSTED", 429),
    "BANK_CAPTURE_FULL": Reason("RESOURCE_EXHAUSTED", 429),
    "DRAINING": Reason("UNAVAILABLE", 503),
    "ENGINE_DEAD": Reason("UNAVAILABLE", 503),
    "CLIENT_TOO_SLOW": Reason("DEADLINE_EXCEEDED", 408),
    "VERDICT_LOST": Reason("UNAVAILABLE", 503),
    "INTERNAL": Reason("INTERNAL", 500),
}
# Reason by the resource that admission lacked.
RESOURCE_REASONS = {
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
    """The end of a call other than OK, by a key of REASONS.

    `request_id` is set by `call.begin_call`; `error_id` names an unexpected exception in the log.
    """

    def __init__(
        self, reason: str, message: str, violations: Sequence[Violation] = (), retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.reason, self.message, self.violations, self.retry_after_s = reason, message, violations, retry_after_s
        self.request_id = self.error_id = ""

    @property
    def code(self) -> str:
        """Name of the canonical code."""
        return REASONS[self.reason].code

    @property
    def http_status(self) -> int:
        """HTTP status."""
        return REASONS[self.reason].http_status


def invalid(field: str, description: str, reason: str = "FIELD_INVALID") -> Refusal:
    """Return a refusal because of one field."""
    return Refusal(reason, f"{field}: {description}", [Violation(field, description)])


def refusal_of(error: BaseException) -> Refusal:
    """Convert any exception to a Refusal. The text of an unexpected one stays in the log, under an error id."""
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
            return Refusal(RESOURCE_REASONS[error.resource], str(error), retry_after_s=error.retry_after_s)
        case TelemetryLost():
            return Refusal("VERDICT_LOST", "the worker's report about this request was lost")
        case EngineDeadError():
            return Refusal("ENGINE_DEAD", "the engine has died")
    refusal = Refusal("INTERNAL", "internal error")
    refusal.error_id = secrets.token_hex(8)
    logger.error("internal error %s", refusal.error_id, exc_info=error)
    return refusal
