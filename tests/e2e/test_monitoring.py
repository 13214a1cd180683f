"""A real Prometheus scrapes a real server under mixed traffic: every panel and every rule has data.

Each panel loses it with its metric. `make prometheus` installs Prometheus.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rudder.server.monitoring.series import TABLE
from rudder_client import Client, Program, RudderError
from tests.monitoring import files, rig
from tests.monitoring.collector import Received
from tests.monitoring.files import Panel, all_panels, expanded
from tests.monitoring.prometheus import Prometheus, binary
from tests.monitoring.rig import JOB, Rig
from tests.monitoring.traffic import SITE, WATCHED, WORKERS

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(binary("prometheus") is None, reason="no prometheus: `make prometheus` installs it"),
]
# Dropped on their way to the job `partial`: one that panels show, one that rules record, and one of vLLM.
DROPPED = ("rudder_guard_benign_score", "rudder_time_to_first_token_seconds", "vllm:kv_cache_usage_perc")
PATIENCE_S = 120


def until(condition: Callable[[], Any], what: str) -> Any:
    """Wait for a condition to hold and return what it returned; a busy machine only takes longer."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.5)
    return found


def values(running: Rig, query: str, **variables: str) -> list[float]:
    """Present values of a query that are numbers. Rates are over 20 scrapes."""
    found = running.prometheus.query(expanded(query, interval="20s", **variables))
    return [value for _, value in found if value == value]


def empty(running: Rig, panel: Panel, **variables: str) -> bool:
    """Whether a query of a panel has no data."""
    return not all(values(running, query, **variables) for query, _ in panel.queries)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """All of it, once a policy file was refused and every kind of call was made often enough."""
    with rig.running(tmp_path_factory.mktemp("monitoring"), {"partial": DROPPED}) as started:
        (started.policies / "broken.yaml").write_text("name: [")
        until(lambda: not [p for p in all_panels() if empty(started, p, job=JOB)], "panels have data")
        yield started


@pytest.mark.parametrize("panel", all_panels(), ids=lambda panel: f"{panel.dashboard}: {panel.title}")
def test_panel_has_data_of_the_replica_and_of_none_other(running: Rig, panel: Panel) -> None:
    replica = running.prometheus.query("rudder_ready")[0][0]["instance"]
    until(lambda: not empty(running, panel, job=JOB, replica=replica), panel.title)
    assert not any(values(running, query, job="another") for query, _ in panel.queries)


@pytest.mark.parametrize("panel", all_panels(), ids=lambda panel: f"{panel.dashboard}: {panel.title}")
def test_panel_has_no_data_without_its_metrics(running: Rig, panel: Panel) -> None:
    for query, _ in panel.queries:
        for name in files.names_in(query):
            assert values(running, query.replace(name, "removed"), job=JOB) == [], name


def test_panels_of_dropped_metrics_are_those_that_are_empty(running: Rig) -> None:
    """The metrics are missing from what is scraped, so that also what rules record of them is."""
    recorded = {rule["record"]: files.names_in(rule["expr"]) for rule in files.all_rules() if "record" in rule}

    def sources(name: str) -> set[str]:
        return {name}.union(*(sources(source) for source in recorded.get(name, ())))

    def dropped(panel: Panel) -> bool:
        names = {source for name in panel.metrics for source in sources(name)}
        return any(name.startswith(prefix) for name in names for prefix in DROPPED)

    expected = {panel.title for panel in all_panels() if dropped(panel)}
    assert len(expected) >= 6
    until(
        lambda: {panel.title for panel in all_panels() if empty(running, panel, job="partial")} == expected,
        f"exactly these are empty: {expected}",
    )


def test_every_recording_rule_has_data_and_no_rule_fails(running: Rig) -> None:
    for name in files.recorded():
        assert values(running, f'{name}{{job="{JOB}"}}'), name
    groups = running.prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == len(files.all_rules())
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []


def test_alert_of_a_refused_policy_fires_and_those_of_an_engine_in_trouble_do_not(running: Rig) -> None:
    def firing() -> set[str]:
        found = running.prometheus.query(f'ALERTS{{alertstate="firing", job="{JOB}"}}')
        return {labels["alertname"] for labels, _ in found}

    until(lambda: "RudderPolicyRefused" in firing(), "the alert fires")
    assert not firing() & {"RudderNotReady", "RudderEngineStalled", "RudderVerdictLost", "RudderAuditFailing"}


def test_every_series_of_the_table_was_scraped(running: Rig) -> None:
    """But for those of events that the traffic does not bring about."""
    rare = {"rudder_tls_certificate_expiry_timestamp_seconds", "rudder_series_limit_hits", "rudder_retried_requests"}
    rare |= {"rudder_policy_shadow_refusals", "rudder_unsafe"}
    missing = {each.name for each in TABLE if not values(running, f'{each.exported[0]}{{job="{JOB}"}}')}
    assert missing <= rare


def test_counters_agree(running: Rig) -> None:
    """Calls by outcome and by caller are the same calls, in each scrape."""
    callers = running.prometheus.query(f'sum by (caller) (rudder_caller_tokens_total{{job="{JOB}", kind="generated"}})')
    assert {labels["caller"] for labels, _ in callers} >= {"chat-app", "search", "research"}
    query = 'sum(rudder_caller_requests_total{job="rudder"}) - sum(rudder_requests_total{job="rudder"})'
    ((_, difference),) = running.prometheus.query(query)
    # A scrape reads one family after the other.
    assert abs(difference) <= WORKERS


def test_counters_are_the_sums_of_what_clients_got(running: Rig) -> None:
    """Of calls that ended well, were cancelled or were refused; the log line of each agrees."""
    program = Program().at(SITE).add(WATCHED[0], 1.0)
    prompt = generated = edited = 0
    with Client(running.server.address, token=running.traffic.tokens["counted"], timeout=60) as client:
        for length in range(1, 13):
            answer = client.complete("The cell", max_tokens=length, n=2, ignore_eos=True, steer=program)
            prompt += answer.choices[0].usage.prompt_tokens if answer.choices[0].usage else 0
            generated += sum(len(choice.token_ids) for choice in answer.choices)
            edited += sum(e.tokens_touched for c in answer.choices if c.attestation for e in c.attestation.edits)
            with pytest.raises(RudderError):
                client.complete("The cell", temperature=-1.0)
        for _ in range(4):
            with client.generate("The cell", max_tokens=200, ignore_eos=True) as chunks:
                next(chunks)
    lines = until(lambda: log_lines(running, "counted", 28), "every call has its line")
    cancelled = [line for line in lines if line["outcome"] == "CANCELLED"]
    assert len(cancelled) == 4
    prompt += sum(line["prompt_tokens"] for line in cancelled)
    generated += sum(line["generated_tokens"] for line in cancelled)
    assert edited == sum(line.get("edited_tokens", 0) for line in lines) > 0
    metric = running.server.metric
    assert metric("rudder_caller_requests_total", caller="counted") == 28
    assert metric("rudder_caller_tokens_total", caller="counted", kind="prompt") == prompt
    assert metric("rudder_caller_tokens_total", caller="counted", kind="generated") == generated


def log_lines(running: Rig, caller: str, calls: int) -> list[dict[str, Any]]:
    """The access log of a caller, once it has lines of so many calls."""
    lines = [json.loads(line) for line in running.server.log.read_text().splitlines() if '"rudder.access"' in line]
    found = [line for line in lines if line.get("caller") == caller]
    return found if len(found) == calls else []


def test_exemplars_lead_from_a_bucket_to_a_trace(running: Rig) -> None:
    """A call with a traceparent leaves its trace id at the bucket of its latency."""
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    client = running.traffic.clients["research"]
    client.metadata = (*client.metadata, ("traceparent", f"00-{trace}-00f067aa0ba902b7-01"))

    def found() -> bool:
        client.complete("The", max_tokens=1)
        query, now = "rudder_time_to_first_token_seconds_bucket", time.time()
        answer = running.prometheus.get("query_exemplars", query=query, start=now - 60, end=now + 1)
        return any(e["labels"].get("trace_id") == trace for series in answer for e in series["exemplars"])

    until(found, "an exemplar has the trace id")


def test_spans_lead_from_the_client_through_the_server_into_the_engine(running: Rig) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with Client(running.server.address, token=running.traffic.tokens["chat-app"], timeout=60) as client:
        client.metadata = (*client.metadata, ("traceparent", f"00-{trace}-{parent}-01"))
        client.complete("The federal government", max_tokens=8)

    def found() -> dict[str, Received] | None:
        spans = {span.name: span for span in running.collector.spans if span.trace == trace}
        return spans if {"rudder.request", "llm_request"} <= spans.keys() else None

    spans = until(found, "spans of Rudder and of vLLM arrive")
    request = spans["rudder.request"]
    assert request.parent == parent
    assert {name: span.parent for name, span in spans.items() if span is not request} == dict.fromkeys(
        ("queue", "prefill", "decode", "llm_request"), request.span
    )
    assert request.attributes["rudder.caller"] == "chat-app"
    assert request.attributes["rudder.policy"] == ["no-microbiology@1", "trial@1"]
    text = str([span for span in running.collector.spans if span.trace == trace])
    assert "federal" not in text
    line = json.loads(running.server.log_line(trace))
    assert (line["message"], line["caller"], line["trace_id"]) == ("call ended", "chat-app", trace)


@pytest.mark.long
def test_make_monitoring_says_where_to_look_and_ends_with_ctrl_c(tmp_path: Path) -> None:
    """Its own process group, as in a terminal; nothing of it is left running."""
    log = tmp_path / "output.txt"
    command = [sys.executable, "-u", "-m", "tests.monitoring"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=files.ROOT, stdout=out, stderr=out, start_new_session=True)
    try:
        until(lambda: "Ctrl-C ends all of it" in log.read_text() or process.poll() is not None, "it says where to look")
        text = log.read_text()
        (address,) = re.findall(r"^alerts +http://(\S+)/alerts$", text, re.MULTILINE)
        until(lambda: Prometheus(address).query("rudder_ready") != [], "the server is scraped")
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(120) == 0, log.read_text()
    finally:
        process.kill()
    assert log.read_text().endswith("\nstopped\n")
    with pytest.raises(OSError, match="refused"):
        Prometheus(address).query("rudder_ready")
    (server,) = re.findall(r"^gRPC +127.0.0.1:(\d+)$", text, re.MULTILINE)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(server))) != 0
