"""Rudder's Prometheus series, each declared once, beside vLLM's own in the same registry. A metric is added here."""

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from rudder.sae_models.bundle.bundle import Bundle
from rudder.server.engine.ledger import Ledger
from rudder.server.engine.telemetry.frame import Array

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
INTER_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)


class ManyAtOnce(Collector):
    """A histogram that takes in a value many times at once: the library's own takes each by itself."""

    def __init__(
        self, name: str, documentation: str, bounds: Sequence[float], registry: CollectorRegistry = REGISTRY
    ) -> None:
        self.name, self.documentation, self.bounds = name, documentation, bounds
        self.counts, self.sum = [0] * (len(bounds) + 1), 0.0
        registry.register(self)

    def observe(self, value: float, times: int) -> None:
        """`value` was seen so many times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def collect(self) -> Iterable[Metric]:
        """The one series."""
        names = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        family = HistogramMetricFamily(self.name, self.documentation)
        family.add_metric([], list(zip(names, accumulate(self.counts), strict=True)), self.sum)
        return [family]


REQUESTS = Counter(
    "rudder_requests", "Calls ended, by method and outcome (OK or the reason of the error).", ["method", "outcome"]
)
RETRIED = Counter("rudder_retried_requests", "Calls that a client's gRPC library made again by itself.", ["method"])
REQUEST_SECONDS = Histogram("rudder_request_seconds", "Time from call to end.", ["method"], buckets=SECONDS)
FIRST_TOKEN = Histogram("rudder_time_to_first_token_seconds", "Time from call to first token.", buckets=SECONDS)
INTER_TOKEN = ManyAtOnce("rudder_inter_token_seconds", "Time between tokens of a choice.", INTER_TOKEN_SECONDS)
STREAM_MESSAGES = Counter("rudder_stream_messages", "Messages of token streams.")
STREAM_TOKENS = Counter("rudder_stream_tokens", "Tokens of token streams.")
EDITED_TOKENS = Counter("rudder_edits_applied_tokens", "Tokens that an edit touched.", ["site", "operation", "origin"])
SELF_TEST_FAILURES = Counter("rudder_selftest_failures", "Self-tests that a site's bank did not pass.")


def request_done(method: str, outcome: str, seconds: float) -> None:
    """A call has ended. `method` and `outcome` are from closed sets, so the series are bounded."""
    REQUESTS.labels(method, outcome).inc()
    REQUEST_SECONDS.labels(method).observe(seconds)


def retried(method: str) -> None:
    """A call is another attempt at one that came before."""
    RETRIED.labels(method).inc()


def stream_message(tokens: int) -> None:
    """A message of a stream was sent."""
    STREAM_MESSAGES.inc()
    STREAM_TOKENS.inc(tokens)


def first_token(seconds: float) -> None:
    """A call's first token came."""
    FIRST_TOKEN.observe(seconds)


def inter_token(seconds: float, tokens: int) -> None:
    """Later tokens came, each after so long."""
    INTER_TOKEN.observe(seconds, tokens)


def edits_applied(site: str, operation: str, origin: str, tokens: int) -> None:
    """An edit touched tokens. `operation` is its first word: the closed set of edit operations."""
    EDITED_TOKENS.labels(site, operation.split(" ", 1)[0], origin).inc(tokens)


@dataclass
class Pinned:
    """The features counted over all requests, and the row of the telemetry's `pinned` column of each."""

    names: list[tuple[Bundle, int]]
    columns: tuple[int, ...]
    totals: list[list[float]]


class Bank(Collector):
    """Gauges and per-feature counters read from their owners at scrape time."""

    def __init__(self) -> None:
        self.ledger: Ledger | None = None
        self.waiting: Sized = ()
        self.pinned = Pinned([], (), [])

    def collect(self) -> list[Metric]:
        """All series of the bank."""
        return [*self.usage(), *self.features()] if self.ledger else []

    def usage(self) -> list[Metric]:
        """Rows and slots held, and the requests that wait for them."""
        assert self.ledger
        layout = self.ledger.layout
        rows = GaugeMetricFamily("rudder_bank_rows", "Row places of a site's bank.", labels=["site", "state"])
        for number, site in enumerate(layout.sites):
            used = self.ledger.rows_used(number)
            rows.add_metric([site, "used"], used)
            rows.add_metric([site, "free"], layout.rows - used)
        slots = GaugeMetricFamily("rudder_bank_slots", "Slots for requests with a program.", labels=["state"])
        slots.add_metric(["used"], self.ledger.slots_used)
        slots.add_metric(["free"], layout.slots - self.ledger.slots_used)
        inflight = GaugeMetricFamily("rudder_inflight_choices", "Choices that the engine is running.")
        inflight.add_metric([], len([handle for handle in self.ledger.leases if handle]))
        queue = GaugeMetricFamily("rudder_queue_requests", "Requests that wait for the bank.")
        queue.add_metric([], len(self.waiting))
        return [rows, slots, inflight, queue]

    def features(self) -> list[Metric]:
        """Per watched feature: active tokens, tokens, sum and maximum; its label in a series of its own."""
        labels = ["bundle", "site", "feature"]
        families: tuple[CounterMetricFamily | GaugeMetricFamily, ...] = (
            CounterMetricFamily(
                "rudder_feature_active_tokens", "Tokens on which the feature was active.", labels=labels
            ),
            CounterMetricFamily("rudder_feature_tokens", "Tokens on which the feature was evaluated.", labels=labels),
            CounterMetricFamily("rudder_feature_activation_sum", "Sum of its activations.", labels=labels),
            GaugeMetricFamily("rudder_feature_activation_max", "Largest activation since the start.", labels=labels),
        )
        info = GaugeMetricFamily(
            "rudder_feature_info", "Always 1; carries the feature's label.", labels=[*labels, "label"]
        )
        for (bundle, index), values in zip(self.pinned.names, self.pinned.totals, strict=True):
            key = [bundle.manifest.name, bundle.manifest.site, str(index)]
            for family, value in zip(families, values, strict=True):
                family.add_metric(key, value)
            info.add_metric([*key, plain(bundle.catalogue.get(index).summary.label)], 1)
        return [*families, info]


BANK = Bank()
REGISTRY.register(BANK)


def watch_admission(ledger: Ledger, waiting: Sized) -> None:
    """Show this ledger's use and this queue."""
    BANK.ledger, BANK.waiting = ledger, waiting


def pin(names: Sequence[tuple[Bundle, int]], columns: tuple[int, ...]) -> None:
    """Count these features; `columns` are their rows in the telemetry's `pinned` column."""
    BANK.pinned = Pinned(list(names), columns, [[0.0] * 4 for _ in names])


def feature_totals(totals: Array) -> None:
    """Add a step's [pinned rows, 4]: active tokens, tokens, sum, maximum."""
    for kept, column in zip(BANK.pinned.totals, BANK.pinned.columns, strict=True):
        active, tokens, total, largest = totals[column].tolist()
        kept[:] = kept[0] + active, kept[1] + tokens, kept[2] + total, max(kept[3], largest)


def plain(label: str) -> str:
    """A label of at most 80 characters, without control characters."""
    return re.sub(r"[\x00-\x1f\x7f]", " ", label)[:80]
