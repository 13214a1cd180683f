"""Rudder's Prometheus series, each declared once. Add a metric to `Metrics`."""

import re
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
INTER_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)
MAX_LABEL_CHARS = 80
# Quantiles of a guard's benign scores, and the number of choices that they are of: some above the highest.
BENIGN_QUANTILES = (0.5, 0.99, 0.999)
BENIGN_CHOICES = 10_000


class SiteUsage(NamedTuple):
    """Row places of one site's bank."""

    site: str
    used: int
    free: int


class BankUsage(NamedTuple):
    """Snapshot of what requests hold of the bank, and of the choices that wait for it or for the engine."""

    rows: Sequence[SiteUsage]
    slots_used: int
    slots_free: int
    running_choices: int
    waiting_choices: int


@dataclass(frozen=True)
class PinnedFeature:
    """A feature that is counted over all requests, as its series name it."""

    bundle: str
    site: str
    index: int
    label: str


class FeatureTotals(NamedTuple):
    """Totals of a pinned feature since the start."""

    active_tokens: float = 0.0
    tokens: float = 0.0
    sum: float = 0.0
    max: float = 0.0


class Pinned(NamedTuple):
    """Pinned features, their columns in the array of `feature_totals`, and their totals, which alone change."""

    features: Sequence[PinnedFeature]
    columns: Sequence[int]
    totals: list[FeatureTotals]


class BulkHistogram(Collector):
    """A histogram that observes one value many times in one call; `prometheus_client.Histogram` takes one at a time."""

    def __init__(self, name: str, documentation: str, bounds: Sequence[float], registry: CollectorRegistry) -> None:
        self.name, self.documentation, self.bounds = name, documentation, bounds
        self.counts, self.sum = [0] * (len(bounds) + 1), 0.0
        registry.register(self)

    def observe(self, value: float, times: int) -> None:
        """Count `value` so many times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def collect(self) -> Iterable[Metric]:
        """Return the one series."""
        names = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        family = HistogramMetricFamily(self.name, self.documentation)
        family.add_metric([], list(zip(names, accumulate(list(self.counts)), strict=True)), self.sum)
        return [family]


class BankCollector(Collector):
    """Gauges of the bank and counters of pinned features, computed at scrape time.

    Prometheus scrapes from a thread of its own. So the collector iterates only over copies, each taken in one call
    that holds the GIL, never over a container that the event loop changes meanwhile.
    """

    def __init__(self) -> None:
        self.usage: Callable[[], BankUsage] | None = None
        # Replaced as a whole: a scrape sees the features and the totals of one call of `pin`.
        self.pinned = Pinned((), (), [])

    def collect(self) -> list[Metric]:
        """Return all series; none before `usage` is set."""
        return [*usage_families(self.usage()), *self.feature_families()] if self.usage else []

    def feature_families(self) -> list[Metric]:
        """Return, per pinned feature, its totals, and its label in a series of its own."""
        labels = ["bundle", "site", "feature"]
        active = CounterMetricFamily(
            "rudder_feature_active_tokens", "Tokens on which the feature was active.", labels=labels
        )
        tokens = CounterMetricFamily(
            "rudder_feature_tokens", "Tokens on which the feature was evaluated.", labels=labels
        )
        total = CounterMetricFamily("rudder_feature_activation_sum", "Sum of its activations.", labels=labels)
        maximum = GaugeMetricFamily(
            "rudder_feature_activation_max", "Largest activation since the start.", labels=labels
        )
        info = GaugeMetricFamily(
            "rudder_feature_info", "Always 1; carries the feature's label.", labels=[*labels, "label"]
        )
        pinned = self.pinned
        for feature, totals in zip(pinned.features, tuple(pinned.totals), strict=True):
            key = [feature.bundle, feature.site, str(feature.index)]
            active.add_metric(key, totals.active_tokens)
            tokens.add_metric(key, totals.tokens)
            total.add_metric(key, totals.sum)
            maximum.add_metric(key, totals.max)
            info.add_metric([*key, printable(feature.label)], 1)
        return [active, tokens, total, maximum, info]


class GuardCollector(Collector):
    """Levels of guards, and quantiles of their scores in the last choices in which they did not hold.

    Where these move towards the level, false alarms are about to rise, or the traffic has changed. A deque's copy is
    taken in one call that holds the GIL, as in BankCollector.
    """

    def __init__(self) -> None:
        self.scores: dict[tuple[str, str], deque[float]] = {}
        self.levels: dict[tuple[str, str], float] = {}

    def observe(self, policy: str, rule: str, score: float, level: float) -> None:
        """Note the largest statistic of a choice."""
        key = policy, rule
        self.levels[key] = level
        self.scores.setdefault(key, deque(maxlen=BENIGN_CHOICES)).append(score)

    def collect(self) -> list[Metric]:
        """Return the series of all guards that have judged a choice."""
        names = ["policy", "rule"]
        levels = GaugeMetricFamily("rudder_guard_level", "Level that a guard's statistic must exceed.", labels=names)
        text = f"Quantiles of the largest statistic of a choice, over the last {BENIGN_CHOICES} without an alarm."
        scores = GaugeMetricFamily("rudder_guard_benign_score", text, labels=[*names, "quantile"])
        for key, last in self.scores.copy().items():
            levels.add_metric(key, self.levels[key])
            values = np.quantile(last.copy(), BENIGN_QUANTILES, method="higher").tolist()
            for quantile, value in zip(BENIGN_QUANTILES, values, strict=True):
                scores.add_metric([*key, f"{quantile:g}"], value)
        return [levels, scores]


def usage_families(usage: BankUsage) -> list[Metric]:
    """Return the gauges of a snapshot."""
    rows = GaugeMetricFamily("rudder_bank_rows", "Row places of a site's bank.", labels=["site", "state"])
    for site in usage.rows:
        rows.add_metric([site.site, "used"], site.used)
        rows.add_metric([site.site, "free"], site.free)
    slots = GaugeMetricFamily("rudder_bank_slots", "Slots for requests with a program.", labels=["state"])
    slots.add_metric(["used"], usage.slots_used)
    slots.add_metric(["free"], usage.slots_free)
    inflight = GaugeMetricFamily("rudder_inflight_choices", "Choices that the engine is running.")
    inflight.add_metric([], usage.running_choices)
    queue = GaugeMetricFamily("rudder_queue_requests", "Choices that wait for the bank or for the engine.")
    queue.add_metric([], usage.waiting_choices)
    return [rows, slots, inflight, queue]


@dataclass(frozen=True)
class Metrics:
    """All series of one server. `create` registers them; label values are from closed sets, so series are bounded."""

    requests: Counter
    retried_requests: Counter
    request_seconds: Histogram
    first_token_seconds: Histogram
    inter_token_seconds: BulkHistogram
    stream_messages: Counter
    stream_tokens: Counter
    edited_tokens: Counter
    rejected_edits: Counter
    self_test_failures: Counter
    policies: Gauge
    policy_changes: Counter
    pending_bytes: Gauge
    reload_failures: Counter
    audit_entries: Counter
    audit_webhook_entries: Counter
    audit_failing: Gauge
    verdicts: Counter
    shadow_refusals: Counter
    hold_back_seconds: BulkHistogram
    bank: BankCollector
    guards: GuardCollector

    @classmethod
    def create(cls, registry: CollectorRegistry | None = None) -> "Metrics":
        """Declare every series in `registry`; None: a new one, which nobody scrapes."""
        registry = registry or CollectorRegistry()
        bank, guards = BankCollector(), GuardCollector()
        registry.register(bank)
        registry.register(guards)
        return cls(
            requests=Counter(
                "rudder_requests", "Calls ended, by method and outcome (OK or the reason of the error).",
                ["method", "outcome"], registry=registry,
            ),
            retried_requests=Counter(
                "rudder_retried_requests", "Calls that a client's gRPC library made again by itself.",
                ["method"], registry=registry,
            ),
            request_seconds=Histogram(
                "rudder_request_seconds", "Time from call to end.", ["method"], buckets=SECONDS, registry=registry
            ),
            first_token_seconds=Histogram(
                "rudder_time_to_first_token_seconds", "Time from call to first token.",
                buckets=SECONDS, registry=registry,
            ),
            inter_token_seconds=BulkHistogram(
                "rudder_inter_token_seconds", "Time between tokens of a choice.", INTER_TOKEN_SECONDS, registry
            ),
            stream_messages=Counter("rudder_stream_messages", "Messages of token streams.", registry=registry),
            stream_tokens=Counter("rudder_stream_tokens", "Tokens of token streams.", registry=registry),
            edited_tokens=Counter(
                "rudder_edits_applied_tokens",
                "Tokens that an edit touched; of origin shadow: that it would have touched.",
                ["site", "operation", "origin", "policy"], registry=registry,
            ),
            rejected_edits=Counter(
                "rudder_edits_rejected", "Edits of a token that were rejected, since x would not have stayed finite.",
                ["site", "origin", "policy"], registry=registry,
            ),
            self_test_failures=Counter(
                "rudder_selftest_failures", "Self-tests that a site's bank did not pass.", registry=registry
            ),
            policies=Gauge(
                "rudder_policy", "Always 1; a policy in force.", ["policy", "version", "mode"], registry=registry
            ),
            policy_changes=Counter(
                "rudder_policy_changes", "Policies applied, unchanged, removed or refused.",
                ["outcome"], registry=registry,
            ),
            pending_bytes=Gauge(
                "rudder_pending_request_bytes", "Bytes of the request messages of calls in progress.", registry=registry
            ),
            reload_failures=Counter(
                "rudder_reload_failures", "Changed files that are not in force, since they cannot be read.",
                ["what"], registry=registry,
            ),
            audit_entries=Counter(
                "rudder_audit_records", "Entries of the audit log, by outcome: written or lost.",
                ["outcome"], registry=registry,
            ),
            audit_webhook_entries=Counter(
                "rudder_audit_webhook_records", "Entries for the audit webhook, by outcome: sent or dropped.",
                ["outcome"], registry=registry,
            ),
            audit_failing=Gauge(
                "rudder_audit_failing", "1 while the audit log cannot be written.", registry=registry
            ),
            verdicts=Counter(
                "rudder_guard_verdicts", "Choices in which a guard held; enforced, or in shadow mode.",
                ["policy", "rule", "action", "mode"], registry=registry,
            ),
            shadow_refusals=Counter(
                "rudder_policy_shadow_refusals",
                "Calls that a policy in shadow mode would have refused before they ran.",
                ["policy", "reason"], registry=registry,
            ),
            hold_back_seconds=BulkHistogram(
                "rudder_hold_back_seconds", "Time that a token waited for its verdict.", INTER_TOKEN_SECONDS, registry
            ),
            bank=bank,
            guards=guards,
        )  # fmt: skip

    def request_ended(self, method: str, outcome: str, seconds: float) -> None:
        """Count a call and its duration."""
        self.requests.labels(method, outcome).inc()
        self.request_seconds.labels(method).observe(seconds)

    def request_retried(self, method: str) -> None:
        """Count a call that a client's transport sent again by itself."""
        self.retried_requests.labels(method).inc()

    def stream_message(self, tokens: int) -> None:
        """Count a message of a token stream."""
        self.stream_messages.inc()
        self.stream_tokens.inc(tokens)

    def first_token(self, seconds: float) -> None:
        """Observe the time to a choice's first token."""
        self.first_token_seconds.observe(seconds)

    def inter_token(self, seconds: float, tokens: int) -> None:
        """Observe later tokens, each `seconds` after the one before."""
        self.inter_token_seconds.observe(seconds, tokens)

    def edit_applied(self, site: str, operation: str, origin: str, policy: str, tokens: int) -> None:
        """Count tokens that an edit touched. Its label is the first word of `operation`: the kind, not the numbers."""
        self.edited_tokens.labels(site, operation.split(" ", 1)[0], origin, policy).inc(tokens)

    def edit_rejected(self, site: str, origin: str, policy: str, tokens: int) -> None:
        """Count tokens at which an edit was rejected."""
        self.rejected_edits.labels(site, origin, policy).inc(tokens)

    def policies_in_force(self, policies: Iterable[tuple[str, int, str]]) -> None:
        """Export the policies in force, each by name, version and mode."""
        self.policies.clear()
        for name, version, mode in policies:
            self.policies.labels(name, str(version), mode).set(1)

    def policy_changed(self, outcome: str) -> None:
        """Count what became of a policy that was read or applied."""
        self.policy_changes.labels(outcome).inc()

    def shadow_refused(self, policy: str, reason: str) -> None:
        """Count a call that a policy in shadow mode would have refused before it ran."""
        self.shadow_refusals.labels(policy, reason).inc()

    def guard_held(self, policy: str, rule: str, action: str, mode: str) -> None:
        """Count a choice in which a guard held."""
        self.verdicts.labels(policy, rule, action, mode).inc()

    def benign_score(self, policy: str, rule: str, score: float, level: float) -> None:
        """Observe the largest statistic of a guard that did not hold in a choice."""
        self.guards.observe(policy, rule, score, level)

    def held_back(self, seconds: float, tokens: int) -> None:
        """Observe tokens that each waited for a verdict."""
        self.hold_back_seconds.observe(seconds, tokens)

    def reload_failed(self, what: str) -> None:
        """Count a changed file, named by its field of the configuration, that is not in force."""
        self.reload_failures.labels(what).inc()

    def self_test_failed(self) -> None:
        """Count a failed self-test."""
        self.self_test_failures.inc()

    def audit_written(self, entries: int) -> None:
        """Count entries of the audit log that were written."""
        self.audit_entries.labels("written").inc(entries)

    def audit_lost(self, entries: int) -> None:
        """Count entries of the audit log that could not be written."""
        self.audit_entries.labels("lost").inc(entries)

    def audit_sent(self, entries: int) -> None:
        """Count entries that the audit webhook took."""
        self.audit_webhook_entries.labels("sent").inc(entries)

    def audit_dropped(self, entries: int) -> None:
        """Count entries that the audit webhook did not get."""
        self.audit_webhook_entries.labels("dropped").inc(entries)

    def watch_admission(self, usage: Callable[[], BankUsage]) -> None:
        """Export what `usage` returns at each scrape; it is called from another thread."""
        self.bank.usage = usage

    def pin(self, features: Sequence[PinnedFeature], columns: Sequence[int]) -> None:
        """Count these features; `columns` are their rows in the array that `feature_totals` takes."""
        self.bank.pinned = Pinned(tuple(features), tuple(columns), [FeatureTotals()] * len(features))

    def feature_totals(self, totals: NDArray[Any]) -> None:
        """Add the totals of one step, [pinned rows, 4] with the columns of `FeatureTotals`."""
        _, columns, before_step = self.bank.pinned
        for i, column in enumerate(columns):
            step, before = FeatureTotals(*totals[column].tolist()), before_step[i]
            before_step[i] = FeatureTotals(
                before.active_tokens + step.active_tokens,
                before.tokens + step.tokens,
                before.sum + step.sum,
                max(before.max, step.max),
            )


def printable(label: str) -> str:
    """Return at most MAX_LABEL_CHARS of a label, without control characters."""
    return re.sub(r"[\x00-\x1f\x7f]", " ", label)[:MAX_LABEL_CHARS]
