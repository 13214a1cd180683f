"""Spans of calls reach a collector, in the client's trace, with fixed attributes; none ever holds up a call."""

import time
from collections.abc import Iterator

import pytest

from rudder.server.caller import ANONYMOUS
from rudder.server.engine.adapter import SamplingParams
from rudder.server.engine.call import Call
from rudder.server.monitoring import spans as spanning
from rudder.server.monitoring.spans import Spans
from rudder.server.monitoring.traces import Correlation, correlation_of
from rudder.server.safety.verdicts import Verdict
from rudder.server.service.record import CallRecord, ChoiceRecord
from rudder.server.service.run import traced
from rudder.server.service.tracing import trace
from tests.monitoring import collector as collecting
from tests.monitoring.collector import Collector, Received

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting.running() as started:
        yield started


def ended(spans: Spans, outcome: str = "OK", flags: str = "01") -> CallRecord:
    """A call of one choice that a guard stopped, closed and traced."""
    correlation = correlation_of([("traceparent", f"00-{TRACE}-{PARENT}-{flags}")])
    record = CallRecord("InferenceService.Generate", ANONYMOUS, correlation, span=spans.begin(correlation.traceparent))
    choice = ChoiceRecord(7, queued_s=0.25, finish_reason="stop", started_s=0.125, first_token_s=0.5)
    choice.findings.verdicts.append(Verdict("p", "r", "STOP", False, 4, 1.0))
    record.choices, record.prompt_tokens, record.first_token_s = [choice], 3, 0.5
    record.end(outcome)
    record.total_s = 1.0
    trace(record, "model")
    spans.provider.force_flush()
    return record


def test_call_is_a_span_of_its_client_s_trace_with_its_parts(collector: Collector) -> None:
    spans = Spans(collector.endpoint, 1.0, "1")
    record = ended(spans)
    spans.close()
    by_name = {span.name: span for span in collector.spans}
    root = by_name.pop("rudder.request")
    assert (root.trace, root.parent, root.error) == (TRACE, PARENT, "")
    assert record.trace_id == TRACE
    assert root.attributes == {
        "rpc.method": "rudder.v1.InferenceService/Generate",
        "rudder.outcome": "OK",
        "rudder.caller": "anonymous",
        "gen_ai.response.id": record.request_id,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "rudder",
        "gen_ai.request.model": "model",
        "gen_ai.request.choice.count": 1,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 7,
        "gen_ai.response.time_to_first_chunk": 0.5,
        "rudder.program.digest": "",
    }
    verdict = {"rudder.policy": "p", "rudder.rule": "r", "rudder.action": "STOP", "rudder.shadow": False}
    assert root.events == (("rudder.verdict", verdict),)
    assert {name: span_of(part, root) for name, part in by_name.items()} == {
        "queue": (0.125, 0.375),
        "prefill": (0.375, 0.5),
        "decode": (0.5, 1.0),
    }


def span_of(part: Received, root: Received) -> tuple[float, float]:
    """Begin and end of a part, in seconds since the call began."""
    assert (part.trace, part.parent) == (root.trace, root.span)
    return (part.start_ns - root.start_ns) / 1e9, (part.end_ns - root.start_ns) / 1e9


def test_parts_elsewhere_are_children_of_the_call(collector: Collector) -> None:
    spans = Spans(collector.endpoint, 1.0, "1")
    record = CallRecord("S.M", ANONYMOUS, Correlation(), span=spans.begin(""))
    (call,) = traced([Call((1,), SamplingParams())], record)
    ((name, header),) = call.trace_headers
    trace(record, "m")
    spans.close()
    (root,) = collector.spans
    # No client named a trace: one begins here, and the log has it too.
    assert (name, header[:-2], root.parent) == ("traceparent", f"00-{root.trace}-{root.span}-", "")
    assert record.trace_id == root.trace
    assert traced([call], CallRecord("S.M", ANONYMOUS, Correlation())) == [call]


def test_failed_call_is_an_error_and_a_refused_one_is_none(collector: Collector) -> None:
    spans = Spans(collector.endpoint, 1.0, "1")
    for outcome in ("ENGINE_DEAD", "CANCELLED", "POLICY_REFUSED"):
        ended(spans, outcome)
    spans.close()
    roots = [span for span in collector.spans if span.name == "rudder.request"]
    assert [span.error for span in roots] == ["ENGINE_DEAD", "", ""]


def test_the_client_s_choice_and_the_share_say_what_is_traced(collector: Collector) -> None:
    spans = Spans(collector.endpoint, 1e-12, "1")
    ended(spans, flags="00")
    for _ in range(20):
        record = CallRecord("S.M", ANONYMOUS, Correlation(), span=spans.begin(""))
        trace(record, "m")
    ended(spans, flags="01")
    spans.close()
    assert [span.trace for span in collector.spans if span.name == "rudder.request"] == [TRACE]


def test_a_collector_that_is_gone_holds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spanning, "EXPORT_TIMEOUT_S", 0.2)
    spans = Spans("http://127.0.0.1:1", 1.0, "1")
    began = time.perf_counter()
    for _ in range(3 * spanning.QUEUE):
        record = CallRecord("S.M", ANONYMOUS, Correlation(), span=spans.begin(""))
        trace(record, "m")
    # Milliseconds, but for a machine that is busy; one call that waits for the exporter takes more.
    assert time.perf_counter() - began < 10
    began = time.perf_counter()
    spans.close()
    assert time.perf_counter() - began < 10
