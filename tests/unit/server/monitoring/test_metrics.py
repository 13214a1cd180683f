"""Collectors of our own export what the Prometheus library would; series are read safely from another thread."""

import itertools
import random
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from rudder.server.engine.admission import Admission
from rudder.server.monitoring import metrics
from rudder.server.program import wire
from rudder.server.program.layout import Layout

HAMMER_S = 2.0


def series(text: bytes) -> list[str]:
    """Lines that carry values, without the times at which series were created."""
    return [line for line in text.decode().splitlines() if not line.startswith("#") and "_created" not in line]


def test_bulk_histogram_equals_the_library_s_histogram() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    bounds = (0.0005, 0.25, 1, 60)
    bulk = metrics.BulkHistogram("gap_seconds", "Time between.", bounds, ours)
    single = Histogram("gap_seconds", "Time between.", buckets=bounds, registry=theirs)
    assert series(generate_latest(ours)) == series(generate_latest(theirs))
    for value, times in ((0.0005, 3), (0.25, 1), (0.26, 4), (0.0, 2), (61.0, 5), (2.0, 0)):
        bulk.observe(value, times)
        for _ in range(times):
            single.observe(value)
    assert sorted(series(generate_latest(ours))) == sorted(series(generate_latest(theirs)))


def exported(registry: CollectorRegistry, name: str) -> list[str]:
    """Lines of one series."""
    return [line for line in series(generate_latest(registry)) if line.startswith(name)]


def test_bank_and_pinned_features_are_exported() -> None:
    registry = CollectorRegistry()
    created = metrics.Metrics.create(registry)
    assert exported(registry, "rudder_bank") == []
    created.watch_admission(lambda: metrics.BankUsage([metrics.SiteUsage("layers.1.resid_post", 2, 6)], 1, 3, 4, 5))
    created.pin([metrics.PinnedFeature("b", "layers.1.resid_post", 7, "a\nlabel" + "x" * 100)], [1])
    for totals in ([2.0, 5.0, 3.5, 2.5], [1.0, 4.0, 1.5, 1.5]):
        created.feature_totals(np.array([[9.0] * 4, totals]))
    assert exported(registry, "rudder_bank_rows") == [
        'rudder_bank_rows{site="layers.1.resid_post",state="used"} 2.0',
        'rudder_bank_rows{site="layers.1.resid_post",state="free"} 6.0',
    ]
    assert exported(registry, "rudder_bank_slots")[0] == 'rudder_bank_slots{state="used"} 1.0'
    assert exported(registry, "rudder_inflight") == ["rudder_inflight_choices 4.0"]
    assert exported(registry, "rudder_queue") == ["rudder_queue_requests 5.0"]
    labels = 'bundle="b",feature="7",site="layers.1.resid_post"'
    for name, value in (("active_tokens_total", 3), ("tokens_total", 9), ("activation_sum_total", 5)):
        assert exported(registry, f"rudder_feature_{name}") == [f"rudder_feature_{name}{{{labels}}} {value}.0"]
    assert exported(registry, "rudder_feature_activation_max") == [f"rudder_feature_activation_max{{{labels}}} 2.5"]
    (info,) = exported(registry, "rudder_feature_info")
    assert f'label="a label{"x" * 73}"' in info


def test_two_servers_metrics_share_nothing() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    metrics.Metrics.create(first).stream_message(3)
    metrics.Metrics.create(second)
    assert exported(first, "rudder_stream_tokens_total") == ["rudder_stream_tokens_total 3.0"]
    assert exported(second, "rudder_stream_tokens_total") == ["rudder_stream_tokens_total 0.0"]


@pytest.fixture
def _frequent_thread_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_frequent_thread_switches")
def test_no_scrape_fails_while_everything_changes() -> None:
    """Everything that the event loop changes, over and over, while two threads scrape."""
    registry, layout = CollectorRegistry(), Layout(("layers.1.resid_post",), rows=64, slots=64)
    created, admission = metrics.Metrics.create(registry), Admission(layout, 100)
    created.watch_admission(admission.usage)
    end, scrapes, failures = time.monotonic() + HAMMER_S, [0], list[Exception]()

    def scrape() -> None:
        while time.monotonic() < end:
            try:
                assert b"rudder_bank_rows" in generate_latest(registry)
                scrapes[0] += 1
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=scrape) for _ in range(2)]
    for thread in threads:
        thread.start()
    handle, random_numbers = 0, random.Random(0)
    while time.monotonic() < end:
        handle += 1
        rows = tuple(wire.Row("b", latent) for latent in random_numbers.sample(range(1000), 5))
        admission.ledger.acquire(handle, wire.Request(1, 4, True, ((wire.Site(0, rows),),)))
        if handle > 10:
            admission.release(handle - 10)
        created.request_ended(f"method {handle % 50}", f"outcome {handle % 31}", 0.1)
        created.inter_token(random_numbers.random(), 3)
        created.edit_applied(f"site {handle % 100}", "add 1", "request", "", 2)
        if handle % 2 == 0:
            pinned = random_numbers.randrange(1, 9)
            created.pin([metrics.PinnedFeature("b", "s", i, "label") for i in range(pinned)], list(range(pinned)))
        created.feature_totals(np.ones((9, 4)))
    for thread in threads:
        thread.join()
    assert failures == []
    assert scrapes[0] > 10


@pytest.mark.usefixtures("_frequent_thread_switches")
def test_pinned_features_and_their_totals_change_together() -> None:
    bank = (created := metrics.Metrics.create()).bank
    end, failures = time.monotonic() + 1, list[Exception]()

    def collect() -> None:
        while time.monotonic() < end:
            try:
                bank.feature_families()
            except Exception as error:
                failures.append(error)

    thread = threading.Thread(target=collect)
    thread.start()
    for pinned in itertools.cycle(range(1, 9)):
        created.pin([metrics.PinnedFeature("b", "s", i, "label") for i in range(pinned)], list(range(pinned)))
        if time.monotonic() > end:
            break
    thread.join()
    assert failures == []
