"""What guards found, in answers, metrics and log: scores for those with the right, never a client's text."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from rudder.server.caller import ANONYMOUS
from rudder.server.engine.adapter import SamplingParams
from rudder.server.engine.call import Call, FinishReason
from rudder.server.monitoring.metrics import Metrics
from rudder.server.monitoring.traces import Correlation
from rudder.server.safety.binding import Binding
from rudder.server.safety.verdicts import Benign, Refusing, Verdict
from rudder.server.service import inference, record
from rudder.server.service.attestation import attestation_of
from rudder.server.service.deltas import Choice, finish
from rudder.server.service.errors import Refusal
from rudder.server.service.prepare import Job
from rudder.server.service.record import CallRecord, ChoiceRecord
from rudder.v1 import inference_pb2
from tests.unit.policies import policy
from tests.unit.programs import PROBE, SITE

SCORE = {"terms": [{"site": SITE, "row": PROBE, "weight": 1}]}
STOPS = {"name": "stop", "score": SCORE, "level": 1, "action": "GUARD_ACTION_STOP"}
READS = {"read_guards": True}
FOUND = [
    Verdict("p", "count", "count", False, 3, 1.5),
    Verdict("p", "stop", "stop", False, 5, 2.5),
    Verdict("q", "late", "stop", True, 4, 3.5),
]


def refused_choice() -> ChoiceRecord:
    """Return the record of a choice that policy p stopped while q, in shadow mode, would have."""
    choice = ChoiceRecord(finish_reason=FinishReason.REFUSED)
    choice.findings.verdicts = list(FOUND)
    choice.findings.refusing = Refusing(FOUND[1], "Not here.")
    choice.findings.benign = [Benign("q", "early", 0.25, 1.0)]
    return choice


def call_of(p: Any = None, q: Any = None) -> CallRecord:
    """Return the record of a call that both bind, with these rights."""
    policies = policy("p", guards=[STOPS], rights=p), policy("q", mode="POLICY_MODE_SHADOW", rights=q)
    call = CallRecord("InferenceService.Generate", ANONYMOUS, Correlation(), binding=Binding(policies))
    call.choices = [refused_choice()]
    return call


@pytest.mark.parametrize(
    ("p", "q", "scores"), [({}, {}, [None, None]), (READS, {}, [2.5, None]), (READS, READS, [2.5, 3.5])]
)
def test_verdicts_are_attested_by_policy_with_scores_where_its_rights_say_so(p: Any, q: Any, scores: Any) -> None:
    call = call_of(p, q)
    applied = attestation_of(call, call.choices[0], "epoch").policies
    assert [(a.name, a.shadow, [(v.rule, v.position) for v in a.verdicts]) for a in applied] == [
        # A guard that counts is not named to clients.
        ("p", False, [("stop", 5)]),
        ("q", True, [("late", 4)]),
    ]
    verdicts = [verdict for policy in applied for verdict in policy.verdicts]
    assert [v.score if v.HasField("score") else None for v in verdicts] == scores


@pytest.mark.parametrize(("rights", "score"), [({}, None), (READS, 2.5)])
def test_refusal_is_in_the_last_delta(rights: Any, score: float | None) -> None:
    call, delta, features = call_of(rights), inference_pb2.ChoiceDelta(), SimpleNamespace()
    engine_call = Call((5,), SamplingParams())
    choice = Choice(0, engine_call, np.zeros(0, np.int64), call.choices[0])
    finish(delta, Job((engine_call,), inference_pb2.Report(), features), choice, call, None, "e")  # type: ignore[arg-type]
    assert delta.finish_reason == inference_pb2.FINISH_REASON_REFUSED
    expected = inference_pb2.PolicyRefusal(policy="p", rule="stop", text="Not here.", position=5, score=score)
    assert delta.refusal == expected
    whole = inference.choice_of(delta)
    assert whole.refusal == expected


def test_refused_call_has_an_outcome_of_its_own_in_metrics_and_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "rudder.access")
    registry, call = CollectorRegistry(), call_of()
    call.end("OK")
    record.export(call, Metrics.create(registry))
    record.log(call)
    assert call.outcome == "POLICY_REFUSED"
    labels = {"method": call.method, "outcome": "POLICY_REFUSED"}
    assert registry.get_sample_value("rudder_requests_total", labels) == 1
    for found in FOUND:
        mode = "shadow" if found.shadow else "enforce"
        labels = {"policy": found.policy, "rule": found.rule, "action": found.action, "mode": mode}
        assert registry.get_sample_value("rudder_guard_verdicts_total", labels) == 1
    assert registry.get_sample_value("rudder_guard_level", {"policy": "q", "rule": "early"}) == 1.0
    (line,) = caplog.records
    assert line.__dict__["fields"]["refused_by"] == ["p/stop"]
    assert "Not here" not in str(line.__dict__["fields"])
    call.choices[0].findings.refusing = None
    call.end("OK")
    assert call.outcome == "OK"
    call.choices = [refused_choice()]
    call.end("CANCELLED")
    assert call.outcome == "CANCELLED"


async def test_refused_inspection_is_an_error_that_names_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of()

    async def prepared(*_: Any) -> Any:
        return None

    async def refused(*_: Any) -> Any:
        return [inference_pb2.ChoiceDelta()]

    monkeypatch.setattr(inference, "prepare", prepared)
    monkeypatch.setattr(inference, "run_whole", refused)
    with pytest.raises(Refusal) as error:
        await inference.inspect(None, call, inference_pb2.InspectRequest())  # type: ignore[arg-type]
    assert error.value.reason == "POLICY_REFUSED"
    assert error.value.message == "policy 'p', rule 'stop', token 5: Not here."


def test_benign_scores_are_quantiles_of_the_last_choices() -> None:
    registry = CollectorRegistry()
    metrics = Metrics.create(registry)
    for score in range(20_000, 0, -1):
        metrics.benign_score("p", "r", float(score), 1e9)

    def quantile(name: str) -> float | None:
        labels = {"policy": "p", "rule": "r", "quantile": name}
        return registry.get_sample_value("rudder_guard_benign_score", labels)

    # The last 10,000 are 10,000 to 1.
    assert (quantile("0.5"), quantile("0.99"), quantile("0.999")) == (5001.0, 9901.0, 9991.0)


def test_hold_back_is_observed_by_token() -> None:
    registry = CollectorRegistry()
    metrics = Metrics.create(registry)
    metrics.held_back(0.02, 3)
    metrics.held_back(0.0, 1)
    assert registry.get_sample_value("rudder_hold_back_seconds_count") == 4
    assert registry.get_sample_value("rudder_hold_back_seconds_bucket", {"le": "0.0005"}) == 1
