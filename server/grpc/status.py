"""From a Refusal to a gRPC status with google.rpc details (AIP-193)."""

from collections.abc import Sequence
from math import ceil
from typing import NoReturn

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from rudder.server.service.errors import Refusal, Violation, clipped

Context = grpc.aio.ServicerContext[Message, Message]
DOMAIN = "rudder"
# A status travels in one trailer; beyond about 8 KiB clients see another error instead.
MAX_STATUS_BYTES = 4096
MAX_VIOLATIONS = 16
MAX_MESSAGE_CHARS = 200
MAX_FIELD_CHARS = 80
MAX_DESCRIPTION_CHARS = 120
# Tag and length of a detail beside its content.
DETAIL_OVERHEAD_BYTES = 128


def status_code(refusal: Refusal) -> grpc.StatusCode:
    """Return the gRPC code of a refusal."""
    return grpc.StatusCode[refusal.code]


def status_of(refusal: Refusal) -> status_pb2.Status:
    """Convert a refusal to a google.rpc.Status of at most MAX_STATUS_BYTES."""
    code = status_code(refusal)
    status = status_pb2.Status(code=code.value[0], message=clipped(refusal.message, MAX_MESSAGE_CHARS))
    metadata = {"request_id": refusal.request_id}
    if refusal.error_id:
        metadata["error_id"] = refusal.error_id
    if len(refusal.violations) > MAX_VIOLATIONS:
        metadata["violations"] = str(len(refusal.violations))
    add_detail(status, error_details_pb2.ErrorInfo(reason=refusal.reason, domain=DOMAIN, metadata=metadata))
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        quota = error_details_pb2.QuotaFailure.Violation(subject=refusal.reason, description=status.message)
        add_detail(status, error_details_pb2.QuotaFailure(violations=[quota]))
    if refusal.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(ceil(refusal.retry_after_s * 1000))
        add_detail(status, retry)
    if refusal.violations:
        budget = MAX_STATUS_BYTES - status.ByteSize() - DETAIL_OVERHEAD_BYTES
        add_detail(status, bad_request(refusal.violations, budget))
    return status


def bad_request(violations: Sequence[Violation], budget: int) -> error_details_pb2.BadRequest:
    """Return the first violations, as many as fit into `budget` bytes."""
    detail = error_details_pb2.BadRequest()
    for violation in violations[:MAX_VIOLATIONS]:
        detail.field_violations.add(
            field=clipped(violation.field, MAX_FIELD_CHARS),
            description=clipped(violation.description, MAX_DESCRIPTION_CHARS),
        )
        if detail.ByteSize() > budget:
            del detail.field_violations[-1]
            break
    return detail


def add_detail(status: status_pb2.Status, detail: Message) -> None:
    """Pack `detail` into the status."""
    status.details.add().Pack(detail)


async def abort(context: Context, refusal: Refusal) -> NoReturn:
    """End the call with the refusal's code and details, and with the time to retry where a retry helps."""
    trailers: list[tuple[str, str | bytes]] = [
        ("rudder-request-id", refusal.request_id),
        ("grpc-status-details-bin", status_of(refusal).SerializeToString()),
    ]
    if refusal.retry_after_s is not None:
        trailers.append(("grpc-retry-pushback-ms", str(ceil(refusal.retry_after_s * 1000))))
    await context.abort(status_code(refusal), clipped(refusal.message, MAX_MESSAGE_CHARS), tuple(trailers))
    raise AssertionError("abort raises")
