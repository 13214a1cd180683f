"""Refusals as gRPC statuses: every reason has its code and details, and no status outgrows its trailer."""

import logging

import grpc
import pytest
from google.rpc import error_details_pb2

from rudder.server.grpc.status import MAX_STATUS_BYTES, MAX_VIOLATIONS, status_code, status_of
from rudder.server.program.errors import ProgramError
from rudder.server.service.errors import REASONS, Refusal, Violation, refusal_of
from rudder.v1 import error_pb2
from rudder_client.errors import RudderError


def as_client_sees(refusal: Refusal) -> RudderError:
    """Serialise a refusal and decode it with the client's own messages."""
    refusal.request_id = "r1"
    raw = status_of(refusal).SerializeToString()
    return RudderError(status_code(refusal).name, refusal.message, error_pb2.ErrorStatus.FromString(raw))


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_reaches_the_client(reason: str) -> None:
    seen = as_client_sees(Refusal(reason, "text", [Violation("a.b[3]", "is odd")], retry_after_s=1.25))
    assert (seen.reason, seen.code) == (reason, REASONS[reason].code)
    assert seen.metadata["request_id"] == "r1"
    assert [(v.field, v.description) for v in seen.violations] == [("a.b[3]", "is odd")]
    assert seen.retry_after == 1.25


@pytest.mark.parametrize("reason", REASONS)
def test_exactly_one_error_info_of_our_domain(reason: str) -> None:
    status = status_of(Refusal(reason, "text"))
    kinds = [detail.type_url.rpartition(".")[2] for detail in status.details]
    assert kinds.count("ErrorInfo") == 1
    info = error_details_pb2.ErrorInfo.FromString(status.details[kinds.index("ErrorInfo")].value)
    assert (info.domain, info.reason) == ("rudder", reason)
    assert ("QuotaFailure" in kinds) == (REASONS[reason].code == "RESOURCE_EXHAUSTED")


@pytest.mark.parametrize("letter", ["x", "é", "🦠"])
def test_largest_status_fits_its_trailer(letter: str) -> None:
    violations = [Violation(f"program.sites[{i}].{letter * 5000}", letter * 5000) for i in range(10_000)]
    refusal = Refusal("FIELD_INVALID", letter * 100_000, violations, retry_after_s=1e6)
    refusal.request_id = "r" * 24
    status = status_of(refusal)
    assert status.ByteSize() <= MAX_STATUS_BYTES
    seen = RudderError("", "", error_pb2.ErrorStatus.FromString(status.SerializeToString()))
    assert 1 <= len(seen.violations) <= MAX_VIOLATIONS
    assert seen.metadata["violations"] == "10000"


def test_first_sixteen_violations_are_sent_and_all_are_counted() -> None:
    violations = [Violation(f"f{i}", "is odd") for i in range(17)]
    seen = as_client_sees(Refusal("FIELD_INVALID", "text", violations))
    assert len(seen.violations) == MAX_VIOLATIONS
    assert seen.metadata["violations"] == "17"


def test_text_of_an_unexpected_exception_stays_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        refusal = refusal_of(RuntimeError("the secret is 4711"))
    assert status_code(refusal) is grpc.StatusCode.INTERNAL
    assert b"4711" not in status_of(refusal).SerializeToString()
    assert as_client_sees(refusal).metadata["error_id"] == refusal.error_id
    assert refusal.error_id in caplog.text
    assert "4711" in caplog.text


def test_program_errors_keep_their_field() -> None:
    seen = as_client_sees(refusal_of(ProgramError("program.gate.site", "unknown", "SITE_UNKNOWN")))
    assert [(v.field, v.description) for v in seen.violations] == [("program.gate.site", "unknown")]
