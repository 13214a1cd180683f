"""A server's Prometheus series, as the rest of the server counts them. What there is: `series.TABLE`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from numpy.typing import NDArray
from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector

from rudder.server.monitoring import series
from rudder.server.monitoring.collectors import Bank, BankUsage, Features, Guards, PinnedFeature
from rudder.server.monitoring.families import Histogram, Key, Values
from rudder.server.monitoring.series import TABLE, Series

MAX_SERIES = 2000
LATENCY_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)


class Metrics:
    """All series of one server: a family per line of the table, and the collectors.

    `max_series`: of one family, beyond which observations go to `_other`. `latency_bounds`, `token_bounds`: upper
    bounds of the histograms' buckets, in seconds.
    """

    def __init__(
        self,
        max_series: int = MAX_SERIES,
        latency_bounds: Sequence[float] = LATENCY_BOUNDS,
        token_bounds: Sequence[float] = TOKEN_BOUNDS,
    ) -> None:
        def hit(family: str) -> None:
            self.values[series.SERIES_LIMIT_HITS].add(1, family)

        bounds = {"latency": latency_bounds, "token": token_bounds}
        own = [each for each in TABLE if not each.collected]
        self.values = {each: Values(each, max_series, hit) for each in own if each.kind != "histogram"}
        self.histograms = {
            each: Histogram(each, max_series, hit, bounds[each.buckets]) for each in own if each.kind == "histogram"
        }
        self.bank, self.features, self.guards = Bank(), Features(), Guards()
        for gauge in (series.PENDING_BYTES, series.AUDIT_FAILING, series.READY, series.STALLED):
            self.values[gauge].set(0)

    @classmethod
    def create(cls, registry: CollectorRegistry | None = None, **settings: Any) -> "Metrics":
        """Return new series, exported by `registry`; None: by nobody."""
        metrics = cls(**settings)
        if registry:
            for collector in metrics.collectors():
                registry.register(collector)
        return metrics

    def collectors(self) -> list[Collector]:
        """Return the families and the collectors."""
        return [*self.values.values(), *self.histograms.values(), self.bank, self.features, self.guards]

    def add(self, counter: Series, amount: float, *labels: str) -> None:
        """Count."""
        self.values[counter].add(amount, *labels)

    # Calls

    def request_ended(self, method: str, outcome: str, seconds: float, caller: str = "", trace_id: str = "") -> None:
        """Count a call and its duration."""
        self.add(series.REQUESTS, 1, method, outcome)
        self.add(series.CALLER_REQUESTS, 1, caller)
        self.histograms[series.REQUEST_SECONDS].observe(seconds, method, trace_id=trace_id)
        if outcome == "VERDICT_LOST":
            self.add(series.VERDICTS_LOST, 1)

    def request_retried(self, method: str) -> None:
        """Count a call that a client's transport sent again by itself."""
        self.add(series.RETRIED, 1, method)

    def request_queued(self, seconds: float) -> None:
        """Observe the time that a choice waited for room in the bank."""
        self.histograms[series.QUEUE_SECONDS].observe(seconds)

    def caller_tokens(self, caller: str, kind: str, tokens: int) -> None:
        """Count tokens of a caller: `prompt`, `cached` or `generated`."""
        self.add(series.CALLER_TOKENS, tokens, caller, kind)

    def set_pending_bytes(self, total: int) -> None:
        """Export the bytes of the requests in progress."""
        self.values[series.PENDING_BYTES].set(total)

    # Streams

    def stream_message(self, tokens: int) -> None:
        """Count a message of a token stream."""
        self.add(series.MESSAGES, 1)
        self.add(series.TOKENS, tokens)

    def first_token(self, seconds: float, trace_id: str = "") -> None:
        """Observe the time to a choice's first token."""
        self.histograms[series.FIRST_TOKEN_SECONDS].observe(seconds, trace_id=trace_id)

    def inter_token(self, seconds: float, tokens: int, trace_id: str = "") -> None:
        """Observe later tokens, each `seconds` after the one before."""
        self.histograms[series.INTER_TOKEN_SECONDS].observe(seconds, times=tokens, trace_id=trace_id)

    # Edits, policies and guards

    def edit_applied(self, site: str, operation: str, origin: str, policy: str, tokens: int) -> None:
        """Count tokens that an edit touched. Its label is the first word of `operation`: the kind, not the numbers."""
        self.add(series.EDITED_TOKENS, tokens, site, operation.split(" ", 1)[0], origin, policy)

    def edit_rejected(self, site: str, origin: str, policy: str, tokens: int) -> None:
        """Count tokens at which an edit was rejected."""
        self.add(series.REJECTED_EDITS, tokens, site, origin, policy)

    def policies_in_force(self, policies: Iterable[tuple[str, int, str]]) -> None:
        """Export the policies in force, each by name, version and mode."""
        values: dict[Key, float] = {(name, str(version), mode): 1.0 for name, version, mode in policies}
        self.values[series.POLICIES].replace(values)
        self.guards.keep({labels[0] for labels in values})

    def policy_changed(self, outcome: str) -> None:
        """Count what became of a policy that was read or applied."""
        self.add(series.POLICY_CHANGES, 1, outcome)

    def shadow_refused(self, policy: str, reason: str) -> None:
        """Count a call that a policy in shadow mode would have refused before it ran."""
        self.add(series.SHADOW_REFUSALS, 1, policy, reason)

    def guard_held(self, policy: str, rule: str, action: str, mode: str) -> None:
        """Count a choice in which a guard held."""
        self.add(series.VERDICTS, 1, policy, rule, action, mode)

    def benign_score(self, policy: str, rule: str, score: float, level: float) -> None:
        """Observe the largest statistic of a guard that did not hold in a choice."""
        self.guards.observe(policy, rule, score, level)

    def held_back(self, seconds: float, tokens: int) -> None:
        """Observe tokens that each waited for a verdict."""
        self.histograms[series.HOLD_BACK_SECONDS].observe(seconds, times=tokens)

    # Audit log

    def audit_written(self, entries: int) -> None:
        """Count entries of the audit log that were written."""
        self.add(series.AUDIT_RECORDS, entries, "written")

    def audit_lost(self, entries: int) -> None:
        """Count entries of the audit log that could not be written."""
        self.add(series.AUDIT_RECORDS, entries, "lost")

    def set_audit_failing(self, failing: bool) -> None:
        """Export whether the audit log cannot be written."""
        self.values[series.AUDIT_FAILING].set(failing)

    def audit_sent(self, entries: int) -> None:
        """Count entries that the audit webhook took."""
        self.add(series.WEBHOOK_RECORDS, entries, "sent")

    def audit_dropped(self, entries: int) -> None:
        """Count entries that the audit webhook did not get."""
        self.add(series.WEBHOOK_RECORDS, entries, "dropped")

    # Bank, queue and telemetry

    def watch_admission(self, usage: Callable[[], BankUsage]) -> None:
        """Export what `usage` returns at each scrape; it is called from another thread."""
        self.bank.usage = usage

    def pin(self, features: Sequence[PinnedFeature], columns: Sequence[int]) -> None:
        """Count these features; `columns` are their rows in the array that `feature_totals` takes."""
        self.features.pin(features, columns)

    def feature_totals(self, totals: NDArray[Any]) -> None:
        """Add the totals of one step, [pinned rows, 4]."""
        self.features.add(totals)

    def telemetry_waited(self, seconds: float) -> None:
        """Observe the time that an output waited for the worker's report."""
        self.histograms[series.TELEMETRY_SECONDS].observe(seconds)

    def telemetry_lost(self) -> None:
        """Count a loss of the worker's reports."""
        self.add(series.TELEMETRY_LOST, 1)

    # Server

    def built(self, version: str, vllm: str, model: str) -> None:
        """Export what runs."""
        self.values[series.BUILD_INFO].set(1, version, vllm, model)

    def set_ready(self, ready: bool) -> None:
        """Export what health checks say."""
        self.values[series.READY].set(ready)

    def set_stalled(self, stalled: bool) -> None:
        """Export whether the engine makes no progress though it has work."""
        self.values[series.STALLED].set(stalled)

    def allowed_unsafe(self, name: str) -> None:
        """Export what the server starts in spite of."""
        self.values[series.UNSAFE].set(1, name)

    def self_test_failed(self) -> None:
        """Count a failed self-test."""
        self.add(series.SELF_TEST_FAILURES, 1)

    def reload_failed(self, what: str) -> None:
        """Count a changed file, named by its field of the configuration, that is not in force."""
        self.add(series.RELOAD_FAILURES, 1, what)

    def certificate_expires(self, timestamp: float) -> None:
        """Export when the server's certificate expires, in Unix time."""
        self.values[series.CERTIFICATE_EXPIRY].set(timestamp)
