"""The error table: every reason has its code and details, and no status outgrows its trailer."""

import logging

import grpc
import pytest
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2
from vllm.v1.engine.exceptions import EngineDeadError

from rudder.server.engine.admission import QueueFull
from rudder.server.engine.telemetry.frame import TelemetryLost
from rudder.server.program.errors import ProgramError
from rudder.server.service.errors import (
    CODES,
    FULL,
    MAX_STATUS_BYTES,
    MAX_VIOLATIONS,
    Refusal,
    Violation,
    refusal_of,
    status_of,
)
from rudder.v1 import error_pb2
from rudder_client.errors import RudderError


def as_client_sees(refusal: Refusal) -> RudderError:
    """Over the wire, decoded by the client's own messages."""
    raw = status_of(refusal, "r1").SerializeToString()
    return RudderError(refusal.code.name, refusal.message, error_pb2.ErrorStatus.FromString(raw))


def test_the_table_and_the_contract_name_the_same_reasons() -> None:
    assert {f"REASON_{reason}" for reason in CODES} | {"REASON_UNSPECIFIED"} == set(error_pb2.Reason.keys())
    assert set(FULL.values()) <= set(CODES)


@pytest.mark.parametrize("reason", CODES)
def test_every_reason_reaches_the_client(reason: str) -> None:
    seen = as_client_sees(Refusal(reason, "text", [Violation("a.b[3]", "is odd")], retry_after_s=1.25))
    assert (seen.reason, seen.code) == (reason, CODES[reason].name)
    assert seen.metadata["request_id"] == "r1"
    assert [(v.field, v.description) for v in seen.violations] == [("a.b[3]", "is odd")]
    assert seen.retry_after == 1.25


@pytest.mark.parametrize("reason", CODES)
def test_exactly_one_error_info_of_our_domain(reason: str) -> None:
    status = status_of(Refusal(reason, "text"), "r1")
    kinds = [detail.type_url.rpartition(".")[2] for detail in status.details]
    assert kinds.count("ErrorInfo") == 1
    info = error_details_pb2.ErrorInfo.FromString(status.details[kinds.index("ErrorInfo")].value)
    assert (info.domain, info.reason) == ("rudder", reason)
    assert ("QuotaFailure" in kinds) == (CODES[reason] is grpc.StatusCode.RESOURCE_EXHAUSTED)


@pytest.mark.parametrize("letter", ["x", "é", "🦠"])
def test_the_worst_status_fits_its_trailer(letter: str) -> None:
    violations = [Violation(f"program.sites[{i}].{letter * 5000}", letter * 5000) for i in range(10_000)]
    status = status_of(Refusal("FIELD_INVALID", letter * 100_000, violations, retry_after_s=1e6), "r" * 24)
    assert status.ByteSize() <= MAX_STATUS_BYTES
    seen = RudderError("", "", error_pb2.ErrorStatus.FromString(status.SerializeToString()))
    assert 1 <= len(seen.violations) <= MAX_VIOLATIONS
    assert seen.metadata["violations"] == "10000"


def test_sixteen_short_violations_are_told_and_counted() -> None:
    violations = [Violation(f"f{i}", "is odd") for i in range(17)]
    seen = as_client_sees(Refusal("FIELD_INVALID", "text", violations))
    assert len(seen.violations) == MAX_VIOLATIONS
    assert seen.metadata["violations"] == "17"


def test_unexpected_text_stays_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        refusal = refusal_of(RuntimeError("the secret is 4711"))
    status = status_of(refusal, "r1")
    assert refusal.code is grpc.StatusCode.INTERNAL
    assert b"4711" not in status.SerializeToString()
    assert as_client_sees(refusal).metadata["error_id"] == refusal.error_id
    assert refusal.error_id in caplog.text
    assert "4711" in caplog.text


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ProgramError("program.sites", "is empty"), "FIELD_INVALID"),
        (ProgramError("program.sites[0].edits[0].row", "is locked", "ROW_LOCKED"), "ROW_LOCKED"),
        (DecodeError("bytes"), "FIELD_INVALID"),
        (QueueFull("queue", 1.0), "QUEUE_FULL"),
        (QueueFull("rows", 1.0), "BANK_ROWS_FULL"),
        (QueueFull("slots", 1.0), "BANK_SLOTS_FULL"),
        (QueueFull("capture_tokens", 1.0), "BANK_CAPTURE_FULL"),
        (TelemetryLost("gap"), "VERDICT_LOST"),
        (EngineDeadError(), "ENGINE_DEAD"),
        (ExceptionGroup("", [ExceptionGroup("", [QueueFull("rows", 1.0)])]), "BANK_ROWS_FULL"),
        (KeyError("x"), "INTERNAL"),
    ],
)
def test_what_the_engine_raises_has_its_reason(error: Exception, reason: str) -> None:
    assert refusal_of(error).reason == reason


def test_program_errors_keep_their_field() -> None:
    seen = as_client_sees(refusal_of(ProgramError("program.gate.site", "unknown", "SITE_UNKNOWN")))
    assert [(v.field, v.description) for v in seen.violations] == [("program.gate.site", "unknown")]
