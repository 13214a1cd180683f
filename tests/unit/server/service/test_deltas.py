"""Engine outputs become deltas: log-probabilities of the prompt, and what ended a choice."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rudder.server.engine.adapter import SamplingParams
from rudder.server.engine.call import Call, Output
from rudder.server.engine.telemetry.hub import no_features
from rudder.server.service.deltas import Choice, delta_of, finish
from rudder.server.service.prepare import Job
from rudder.server.service.record import ChoiceRecord
from rudder.v1 import inference_pb2

NOTHING = no_features(0, 0, 0)


def choice_of(call: Call) -> Choice:
    return Choice(0, call, np.zeros(0, np.int64), ChoiceRecord())


async def test_log_probabilities_of_the_prompt_leave_out_its_first_token() -> None:
    call = Call((5, 6, 7), SamplingParams(prompt_logprobs=1))
    entries = [
        None,
        {6: SimpleNamespace(logprob=-2.0), 9: SimpleNamespace(logprob=-1.0)},
        {7: SimpleNamespace(logprob=-0.5)},
    ]
    output = Output("x", [1], 3, None, NOTHING, NOTHING, None, entries)
    delta = await delta_of(job(call), choice_of(call), output)
    columns = delta.prompt_logprobs
    assert (list(columns.chosen), columns.width) == ([-2.0, -0.5], 1)
    assert (list(columns.alternative_ids), list(columns.alternatives)) == ([9, 7], [-1.0, -0.5])
    without = await delta_of(job(call), choice_of(call), output._replace(prompt_logprobs=None))
    assert not without.HasField("prompt_logprobs")


def job(call: Call) -> Job:
    features: Any = None
    return Job((call,), inference_pb2.Report(), features)


@pytest.mark.parametrize(
    ("reason", "string", "token"), [("7", "7", None), (7, None, 7), (0, None, 0), ("", "", None), (None, None, None)]
)
async def test_stop_reason_tells_a_string_from_a_token(reason: object, string: str | None, token: int | None) -> None:
    call = Call((5,), SamplingParams())
    choice = choice_of(call)
    choice.record.finish_reason = "stop"
    delta = inference_pb2.ChoiceDelta()
    record: Any = SimpleNamespace(
        request_id="r", prompt_tokens=1, program_digest="", policy_digest="", policies=(), topic=None
    )
    finish(delta, job(call), choice, record, reason, "epoch")
    assert delta.stop_reason == ("" if reason is None else str(reason))
    assert (delta.stop_string if delta.HasField("stop_string") else None) == string
    assert (delta.stop_token_id if delta.HasField("stop_token_id") else None) == token
