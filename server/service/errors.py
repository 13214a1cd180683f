"""The one table of errors: each reason with its gRPC code and HTTP status, and the reason of each exception."""

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from rudder.server.engine.adapter import EngineDeadError, VLLMClientError
from rudder.server.engine.admission import QueueFull
from rudder.server.engine.call import PolicyNotApplied
from rudder.server.engine.telemetry.frame import TelemetryLost
from rudder.server.identity.errors import CredentialError
from rudder.server.program.errors import ProgramError
from rudder.server.safety.audit.trail import AuditFailed
from rudder.server.safety.problems import PolicyInvalid
from rudder.v1 import inference_pb2


@dataclass(frozen=True)
class Reason:
    """How doors report a reason: the name of a canonical code (google.rpc.Code), and an HTTP status."""

    code: str
    http_status: int


REASONS: dict[str, Reason] = {
    "UNAUTHENTICATED": Reason("UNAUTHENTICATED", 401),
    "TOKEN_EXPIRED": Reason("UNAUTHENTICATED", 401),
    "ROLE_MISSING": Reason("PERMISSION_DENIED", 403),
    "QUOTA_REQUESTS": Reason("RESOURCE_EXHAUSTED", 429),
    "QUOTA_TOKENS": Reason("RESOURCE_EXHAUSTED", 429),
    "QUOTA_STREAMS": Reason("RESOURCE_EXHAUSTED", 429),
    "QUOTA_ROWS": Reason("RESOURCE_EXHAUSTED", 429),
    "FIELD_INVALID": Reason("INVALID_ARGUMENT", 400),
    "FEATURE_UNKNOWN": Reason("NOT_FOUND", 404),
    "SITE_UNKNOWN": Reason("NOT_FOUND", 404),
    "PROGRAM_UNKNOWN": Reason("NOT_FOUND", 404),
    "TOPIC_UNKNOWN": Reason("NOT_FOUND", 404),
    "TOPIC_INERT": Reason("FAILED_PRECONDITION", 400),
    "ROW_LOCKED": Reason("PERMISSION_DENIED", 403),
    "POLICY_FORBIDS": Reason("PERMISSION_DENIED", 403),
    "QUEUE_FULL": Reason("RESOURCE_EXHAUSTED", 429),
    "BANK_ROWS_FULL": Reason("RESOURCE_EXHAUSTED", 429),
    "BANK_SLOTS_FULL": Reason("RESOURCE_EXHAUSTED", 429),
    "BANK_CAPTURE_FULL": Reason("RESOURCE_EXHAUSTED", 429),
    "MESSAGE_TOO_LARGE": Reason("RESOURCE_EXHAUSTED", 413),
    "DRAINING": Reason("UNAVAILABLE", 503),
    "ENGINE_DEAD": Reason("UNAVAILABLE", 503),
    "ENGINE_STALLED": Reason("UNAVAILABLE", 503),
    "CLIENT_TOO_SLOW": Reason("DEADLINE_EXCEEDED", 408),
    "POLICY_UNKNOWN": Reason("NOT_FOUND", 404),
    "POLICY_INVALID": Reason("FAILED_PRECONDITION", 400),
    "POLICY_REFUSED": Reason("PERMISSION_DENIED", 403),
    "NOT_ALLOWED": Reason("PERMISSION_DENIED", 403),
    "VERDICT_LOST": Reason("UNAVAILABLE", 503),
    "AUDIT_FAILED": Reason("UNAVAILABLE", 503),
    "POLICY_NOT_APPLIED": Reason("INTERNAL", 500),
    "INTERNAL": Reason("INTERNAL", 500),
}
# Reason by the resource that admission lacked.
RESOURCE_REASONS = {
    "rows": "BANK_ROWS_FULL",
    "slots": "BANK_SLOTS_FULL",
    "capture_tokens": "BANK_CAPTURE_FULL",
    "queue": "QUEUE_FULL",
}

MAX_DESCRIPTION_CHARS = 500

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Violation:
    """A field at fault, by its path in the request, and what is wrong with it."""

    field: str
    description: str


def clipped(text: str, chars: int) -> str:
    """Return `text`, without its middle if it is longer than `chars`."""
    half = chars // 2 - 1
    return text if len(text) <= chars else f"{text[:half]}…{text[-half:]}"


class Refusal(Exception):
    """The end of a call other than OK, by a key of REASONS.

    `request_id` is set by `call.begin_call`; `error_id` names an unexpected exception in the log.
    """

    def __init__(
        self, reason: str, message: str, violations: Sequence[Violation] = (), retry_after_s: float | None = None
    ) -> None:
        # Descriptions quote what clients send, of whatever length.
        message = clipped(message, MAX_DESCRIPTION_CHARS)
        super().__init__(message)
        self.reason, self.message, self.retry_after_s = reason, message, retry_after_s
        self.violations = [Violation(v.field, clipped(v.description, MAX_DESCRIPTION_CHARS)) for v in violations]
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


def sampling_field(error: VLLMClientError) -> str:
    """Return the field of a request that vLLM refused: a parameter of Sampling where vLLM names one of its fields."""
    parameter = getattr(error, "parameter", None)
    parameter = "structured" if parameter == "structured_outputs" else parameter
    return f"sampling.{parameter}" if parameter in inference_pb2.Sampling.DESCRIPTOR.fields_by_name else "sampling"


def refusal_of(error: BaseException) -> Refusal:
    """Convert any exception to a Refusal. The text of an unexpected one stays in the log, under an error id."""
    match error:
        case Refusal():
            return error
        case BaseExceptionGroup():
            return refusal_of(error.exceptions[0])
        case DecodeError():
            return Refusal("FIELD_INVALID", "the bytes are not a request of this method")
        case CredentialError():
            return Refusal(error.reason, str(error))
        case ProgramError():
            return invalid(error.field, error.message, error.reason)
        case PolicyInvalid():
            return Refusal("POLICY_INVALID", str(error), [Violation(*problem) for problem in error.problems])
        case VLLMClientError():
            return invalid(sampling_field(error), str(error.args[0]) if error.args else type(error).__name__)
        case QueueFull():
            return Refusal(RESOURCE_REASONS[error.resource], str(error), retry_after_s=error.retry_after_s)
        case TelemetryLost():
            return Refusal("VERDICT_LOST", "the worker's report about this request was lost")
        case PolicyNotApplied():
            return Refusal("POLICY_NOT_APPLIED", str(error))
        case AuditFailed():
            return Refusal("AUDIT_FAILED", str(error))
        case EngineDeadError():
            return Refusal("ENGINE_DEAD", "the engine has died")
    refusal = Refusal("INTERNAL", "internal error")
    refusal.error_id = secrets.token_hex(8)
    logger.error("internal error %s", refusal.error_id, exc_info=error)
    return refusal
