"""The error table: it has the contract's reasons, and every exception of the engine has one of them."""

import grpc
import pytest
from google.protobuf.message import DecodeError
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import FINISH_REASON_STRINGS
from vllm.v1.engine.exceptions import EngineDeadError

from rudder.server.engine.admission import QueueFull
from rudder.server.engine.call import FinishReason
from rudder.server.engine.telemetry.frame import TelemetryLost
from rudder.server.program.errors import ProgramError
from rudder.server.safety.problems import PolicyInvalid, Problem
from rudder.server.service.deltas import FINISH_REASONS
from rudder.server.service.errors import REASONS, RESOURCE_REASONS, invalid, refusal_of
from rudder.v1 import error_pb2


def test_table_and_contract_have_the_same_reasons() -> None:
    assert {f"REASON_{reason}" for reason in REASONS} | {"REASON_UNSPECIFIED"} == set(error_pb2.Reason.keys())
    assert set(RESOURCE_REASONS.values()) <= set(REASONS)


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_has_a_canonical_code_and_an_http_error(reason: str) -> None:
    assert REASONS[reason].code in grpc.StatusCode.__members__
    assert 400 <= REASONS[reason].http_status < 600


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ProgramError("program.sites", "is empty"), "FIELD_INVALID"),
        (ProgramError("program.sites[0].edits[0].row", "is locked", "ROW_LOCKED"), "ROW_LOCKED"),
        (PolicyInvalid("low.yaml", [Problem("version", "is 0")]), "POLICY_INVALID"),
        (DecodeError("bytes"), "FIELD_INVALID"),
        (QueueFull("queue", 1.0), "QUEUE_FULL"),
        (QueueFull("rows", 1.0), "BANK_ROWS_FULL"),
        (QueueFull("slots", 1.0), "BANK_SLOTS_FULL"),
        (QueueFull("capture_tokens", 1.0), "BANK_CAPTURE_FULL"),
        (TelemetryLost("gap"), "VERDICT_LOST"),
        (EngineDeadError(), "ENGINE_DEAD"),
        (ExceptionGroup("", [ExceptionGroup("", [QueueFull("rows", 1.0)])]), "BANK_ROWS_FULL"),
        (VLLMValidationError("is too long", parameter="bad_words", value="x" * 10_000), "FIELD_INVALID"),
        (VLLMValidationError("no parameter"), "FIELD_INVALID"),
        (KeyError("x"), "INTERNAL"),
    ],
)
def test_every_exception_of_the_engine_has_its_reason(error: Exception, reason: str) -> None:
    assert refusal_of(error).reason == reason


@pytest.mark.parametrize(
    ("parameter", "field"),
    [
        ("bad_words", "sampling.bad_words"),
        ("temperature", "sampling.temperature"),
        ("structured_outputs", "sampling.structured"),
        ("include_stop_str_in_output", "sampling"),
        (None, "sampling"),
    ],
)
def test_what_vllm_refuses_is_the_clients_and_names_its_field(parameter: str | None, field: str) -> None:
    refusal = refusal_of(VLLMValidationError("is wrong", parameter=parameter, value="secret"))
    assert [(v.field, v.description) for v in refusal.violations] == [(field, "is wrong")]


def test_refusal_never_echoes_long_texts_whole() -> None:
    refusal = invalid("steering.name", f"no program {'n' * 1_000_000!r} is served", "PROGRAM_UNKNOWN")
    assert len(refusal.message) <= 500
    assert len(refusal.violations[0].description) <= 500


def test_every_finish_reason_of_vllm_is_in_the_contract() -> None:
    assert set(FINISH_REASON_STRINGS) <= FINISH_REASONS.keys()
    assert {FinishReason(reason) for reason in FINISH_REASON_STRINGS} <= set(FinishReason)
