"""Families export what the Prometheus library would, are bounded, and are read safely from another thread."""

import itertools
import logging
import random
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from rudder.server.engine.admission import Admission
from rudder.server.monitoring import series
from rudder.server.monitoring.collectors import BankUsage, PinnedFeature, SiteUsage
from rudder.server.monitoring.families import OTHER, Histogram, Values
from rudder.server.monitoring.metrics import Metrics
from rudder.server.monitoring.series import TABLE, Label, Series
from rudder.server.program import wire
from rudder.server.program.layout import Layout

SCRAPES = 30
SITE = "layers.1.resid_post"
GAP = Series("Gaps", "gap_seconds", "histogram", "Time between.", (Label("method", "two"),))


def lines(registry: CollectorRegistry, name: str = "") -> list[str]:
    """Lines that carry values, without the times at which series were created."""
    text = generate_latest(registry).decode().splitlines()
    return [line for line in text if line.startswith(name) and not line.startswith("#") and "_created" not in line]


def test_histogram_equals_the_library_s() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    bounds = (0.0005, 0.25, 1, 60)
    bulk = Histogram(GAP, 10, print, bounds)
    ours.register(bulk)
    single = prometheus_client.Histogram("gap_seconds", "Time between.", ["method"], buckets=bounds, registry=theirs)
    for value, times in ((0.0005, 3), (0.25, 1), (0.26, 4), (0.0, 2), (61.0, 5), (2.0, 0)):
        for method in "ab":
            bulk.observe(value, method, times=times)
            single.labels(method)
            for _ in range(times):
                single.labels(method).observe(value)
    assert sorted(lines(ours)) == sorted(lines(theirs))
    assert generate_latest(ours).startswith(b"# HELP gap_seconds Time between.\n# TYPE gap_seconds histogram\n")


def test_exemplars_name_the_trace_of_a_bucket() -> None:
    registry = CollectorRegistry()
    Metrics.create(registry).first_token(0.3, "a" * 32)
    text = openmetrics.generate_latest(registry).decode()  # type: ignore[no-untyped-call]
    (line,) = [line for line in text.splitlines() if "trace_id" in line]
    assert line.startswith('rudder_time_to_first_token_seconds_bucket{le="0.5"} 1')
    assert f'# {{trace_id="{"a" * 32}"}} 0.3' in line


def test_bank_and_pinned_features_are_exported() -> None:
    registry = CollectorRegistry()
    created = Metrics.create(registry)
    assert lines(registry, "rudder_bank") == []
    created.watch_admission(lambda: BankUsage([SiteUsage(SITE, 2, 6)], 1, 3, 4, 5))
    created.pin([PinnedFeature("b", SITE, 7, "a\nlabel" + "x" * 100)], [1])
    for totals in ([2.0, 5.0, 3.5, 2.5], [1.0, 4.0, 1.5, 1.5]):
        created.feature_totals(np.array([[9.0] * 4, totals]))
    assert lines(registry, "rudder_bank_rows") == [
        f'rudder_bank_rows{{site="{SITE}",state="used"}} 2.0',
        f'rudder_bank_rows{{site="{SITE}",state="free"}} 6.0',
    ]
    assert lines(registry, "rudder_bank_slots")[0] == 'rudder_bank_slots{state="used"} 1.0'
    assert lines(registry, "rudder_inflight") == ["rudder_inflight_choices 4.0"]
    assert lines(registry, "rudder_queue_requests") == ["rudder_queue_requests 5.0"]
    assert lines(registry, "rudder_saturation") == ["rudder_saturation 0.25"]
    labels = f'bundle="b",feature="7",site="{SITE}"'
    for name, value in (("active_tokens_total", 3), ("tokens_total", 9), ("activation_sum_total", 5)):
        assert lines(registry, f"rudder_feature_{name}") == [f"rudder_feature_{name}{{{labels}}} {value}.0"]
    assert lines(registry, "rudder_feature_activation_max") == [f"rudder_feature_activation_max{{{labels}}} 2.5"]
    (info,) = lines(registry, "rudder_feature_info")
    assert f'label="a label{"x" * 73}"' in info


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (BankUsage([], 0, 0, 0, 0, 8, 8), 0.0),
        (BankUsage([], 0, 4, 6, 0, 8, 8), 0.75),
        (BankUsage([], 0, 4, 8, 16, 8, 8), 1.0),
        (BankUsage([], 3, 1, 1, 4, 8, 8), 0.75),
        # Rows that policies hold say nothing of how many requests there are.
        (BankUsage([SiteUsage("a", 8, 2, 6), SiteUsage("b", 10, 0, 10)], 0, 4, 0, 0, 8, 8), 0.5),
        # A queue of no places is full with the first that waits.
        (BankUsage([], 0, 4, 0, 1, 8, 0), 1.0),
    ],
)
def test_saturation_is_the_largest_share_in_use(usage: BankUsage, expected: float) -> None:
    assert usage.saturation == expected


async def test_saturation_of_a_queue_follows_its_bounds() -> None:
    admission = Admission(Layout((SITE,), rows=8, slots=8), limit=4, running=2)
    for handle in range(1, 3):
        await admission.acquire(handle, wire.Request(1, 4, False, ((),)))
    assert (admission.usage().saturation, admission.usage().max_running) == (1.0, 2)


def test_two_servers_metrics_share_nothing() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    Metrics.create(first).stream_message(3)
    Metrics.create(second)
    assert lines(first, "rudder_stream_tokens_total") == ["rudder_stream_tokens_total 3.0"]
    assert lines(second, "rudder_stream_tokens_total") == ["rudder_stream_tokens_total 0.0"]


def fill(created: Metrics) -> None:
    """Observe something in every series."""
    created.request_ended("S.M", "VERDICT_LOST", 0.1, "caller")
    created.request_retried("S.M")
    created.request_queued(0.1)
    created.caller_tokens("caller", "prompt", 3)
    created.first_token(0.1)
    created.inter_token(0.1, 2)
    created.stream_message(2)
    created.edit_applied(SITE, "add 1", "policy", "p", 2)
    created.edit_rejected(SITE, "policy", "p", 2)
    created.policies_in_force([("p", 1, "enforce")])
    created.guard_held("p", "r", "STOP", "enforce")
    created.benign_score("p", "r", 0.5, 1.0)
    created.held_back(0.1, 2)
    created.shadow_refused("p", "POLICY_FORBIDS")
    created.set_stalled(False)
    created.allowed_unsafe("vllm")
    created.watch_admission(lambda: BankUsage([SiteUsage(SITE, 2, 6)], 1, 3, 4, 5))
    created.pin([PinnedFeature("b", SITE, 7, "label")], [0])
    created.telemetry_waited(0.1)
    created.built("1", "2", "m")
    created.certificate_expires(1e9)
    created.values[series.SERIES_LIMIT_HITS].add(1, "rudder_requests")


def test_what_is_exported_is_what_the_table_declares() -> None:
    registry = CollectorRegistry()
    fill(Metrics.create(registry))
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert {family.name: family.type for family in families} == {each.name: each.kind for each in TABLE}
    assert all(family.samples for family in families)
    for family in families:
        (declared,) = [each for each in TABLE if each.name == family.name]
        labels = {name for sample in family.samples for name in sample.labels} - {"le"}
        assert (labels, family.documentation) == (set(declared.label_names), declared.help)
        assert {sample.name for sample in family.samples} == set(declared.exported)


def test_counters_that_alerts_watch_begin_at_zero() -> None:
    registry = CollectorRegistry()
    Metrics.create(registry)
    for name in ("rudder_verdicts_lost_total", "rudder_telemetry_lost_total", "rudder_selftest_failures_total"):
        assert lines(registry, name) == [f"{name} 0.0"]
    assert 'rudder_policy_changes_total{outcome="refused"} 0.0' in lines(registry)
    assert 'rudder_audit_records_total{outcome="lost"} 0.0' in lines(registry)
    assert 'rudder_reload_failures_total{what="tls.certificate"} 0.0' in lines(registry)
    # Without TLS no certificate expires.
    assert lines(registry, "rudder_tls") == []


@pytest.mark.parametrize(
    "observe",
    [
        lambda metrics, i: metrics.request_ended(f"method {i}", "OK", 0.1),
        lambda metrics, i: metrics.request_ended("S.M", f"outcome {i}", 0.1),
        lambda metrics, i: metrics.request_ended("S.M", "OK", 0.1, f"caller {i}"),
        lambda metrics, i: metrics.caller_tokens(f"caller {i}", "prompt", 1),
        lambda metrics, i: metrics.edit_applied(f"site {i}", "add 1", "request", f"{i}", 1),
        lambda metrics, i: metrics.guard_held("p", f"rule {i}", "STOP", "enforce"),
    ],
)
def test_ten_thousand_values_of_a_label_stay_within_the_cap(
    observe: Callable[[Metrics, int], None], caplog: pytest.LogCaptureFixture
) -> None:
    registry = CollectorRegistry()
    created = Metrics.create(registry, max_series=100)
    before = len(lines(registry))
    with caplog.at_level(logging.WARNING):
        for i in range(10_000):
            observe(created, i)
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    series_of = {f.name: {tuple(s.labels.items()) for s in f.samples if "le" not in s.labels} for f in families}
    assert max(len(found) for found in series_of.values()) == 100
    # A series of a histogram has a line per bucket.
    assert len(lines(registry)) < before + 4 * 100 * 20
    (hits,) = [f for f in families if f.name == "rudder_series_limit_hits"]
    assert max(sample.value for sample in hits.samples) == 10_000 - 99
    others = [s for f in families for s in f.samples if OTHER in s.labels.values() and s.name.endswith("_total")]
    assert max(sample.value for sample in others) == 10_000 - 99
    # One warning per family, not one per observation.
    assert 1 <= len(caplog.records) <= 2


def test_series_that_exist_are_counted_beyond_the_cap() -> None:
    family = Values(series.CALLER_REQUESTS, 3, print)
    for caller in ("a", "b", "c", "d", "a"):
        family.add(1, caller)
    assert family.values == {("a",): 2.0, ("b",): 1.0, (OTHER,): 2.0}
    with pytest.raises(ValueError, match="rudder_caller_requests has the labels"):
        family.add(1, "a", "b")


def test_guards_of_a_policy_that_is_gone_are_exported_no_more() -> None:
    registry = CollectorRegistry()
    created = Metrics.create(registry)
    created.policies_in_force([("p", 1, "enforce"), ("q", 1, "shadow")])
    for policy in "pq":
        created.benign_score(policy, "r", 0.5, 1.0)
    created.policies_in_force([("q", 2, "shadow")])
    assert lines(registry, "rudder_guard_level") == ['rudder_guard_level{policy="q",rule="r"} 1.0']
    assert lines(registry, "rudder_policy{") == ['rudder_policy{mode="shadow",policy="q",version="2"} 1.0']


@pytest.fixture
def _frequent_thread_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def hammer(change: Callable[[int], None], scrape: Callable[[], object]) -> None:
    """Call `change` again and again until two threads have scraped SCRAPES times each; raise what a scrape raised.

    A count of scrapes, not a time, ends it: on a busy machine it takes longer and proves the same.
    """
    failures = list[Exception]()

    def run() -> None:
        try:
            for _ in range(SCRAPES):
                scrape()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for step in itertools.count(1):
        change(step)
        if not any(thread.is_alive() for thread in threads):
            break
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.usefixtures("_frequent_thread_switches")
def test_no_scrape_fails_while_everything_changes() -> None:
    """Everything that the event loop changes, over and over, while two threads scrape."""
    registry, layout = CollectorRegistry(), Layout((SITE,), rows=64, slots=64)
    created, admission, chance = Metrics.create(registry), Admission(layout, 100), random.Random(0)
    created.watch_admission(admission.usage)

    def change(step: int) -> None:
        rows = tuple(wire.Row("b", latent) for latent in chance.sample(range(1000), 5))
        admission.ledger.acquire(step, wire.Request(1, 4, True, ((wire.Site(0, rows),),)))
        if step > 10:
            admission.release(step - 10)
        created.request_ended(f"method {step % 50}", f"outcome {step % 31}", 0.1, f"caller {step % 70}")
        created.inter_token(chance.random(), 3)
        created.edit_applied(f"site {step % 100}", "add 1", "request", "", 2)
        created.benign_score(f"policy {step % 9}", "r", 0.5, 1.0)
        created.policies_in_force([(f"policy {i}", step, "enforce") for i in range(step % 9)])
        if step % 2 == 0:
            pinned = chance.randrange(1, 9)
            created.pin([PinnedFeature("b", "s", i, "label") for i in range(pinned)], list(range(pinned)))
        created.feature_totals(np.ones((9, 4)))

    def scrape() -> None:
        assert b"rudder_bank_rows" in generate_latest(registry)

    hammer(change, scrape)


@pytest.mark.usefixtures("_frequent_thread_switches")
def test_pinned_features_and_their_totals_change_together() -> None:
    created = Metrics.create()

    def change(step: int) -> None:
        pinned = step % 8 + 1
        created.pin([PinnedFeature("b", "s", i, "label") for i in range(pinned)], list(range(pinned)))

    hammer(change, created.features.collect)
