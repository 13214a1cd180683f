"""Families of series that keep their own values: bounded in number, counted in bulk, read from another thread.

A family has at most `cap` series. What would be one more is counted under `_other` in each label, so that nobody who
can choose a label's value can fill the memory of the server or of Prometheus.
"""

import logging
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, product
from typing import Any, Generic, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from rudder.server.monitoring.logs import fields
from rudder.server.monitoring.series import Series

OTHER = "_other"
# Name of the label under which an exemplar has its trace, as OpenMetrics has it.
TRACE_ID = "trace_id"
Key = tuple[str, ...]
V = TypeVar("V")

logger = logging.getLogger(__name__)


def samples_of(series: Series) -> CounterMetricFamily | GaugeMetricFamily:
    """Return an empty family for samples of a counter or gauge."""
    family = CounterMetricFamily if series.kind == "counter" else GaugeMetricFamily
    return family(series.name, series.help, labels=series.label_names)


class Family(Collector, Generic[V]):
    """What families share: a value per series, bounded in number. `hit`: called with the family's name beyond that.

    Writers hold the lock; a scrape, in a thread of its own, reads a copy that is taken in one call.
    """

    def __init__(self, series: Series, cap: int, hit: Callable[[str], None]) -> None:
        self.series, self.cap, self.hit = series, cap, hit
        self.values: dict[Key, V] = {}
        self.lock = threading.Lock()
        self.warned = False

    def initial_keys(self) -> Iterator[Key]:
        """Yield the series that are there from the start: alerts see the step from 0 to 1, not a first value."""
        if self.series.kind != "gauge" and all(label.known for label in self.series.labels):
            yield from product(*(label.known for label in self.series.labels))

    def key(self, labels: Key) -> Key:
        """Return the series to count under: the last one that may be has `_other` in every label."""
        if labels in self.values:
            return labels
        if len(labels) != len(self.series.labels):
            raise ValueError(f"{self.series.name} has the labels {self.series.label_names}, got {labels}")
        if len(self.values) < self.cap - 1 or not labels:
            return labels
        self.hit(self.series.name)
        if not self.warned:
            self.warned = True
            logger.warning("series limit reached", extra=fields(family=self.series.name, series=self.cap))
        return (OTHER,) * len(labels)


class Values(Family[float]):
    """A counter or a gauge."""

    def __init__(self, series: Series, cap: int, hit: Callable[[str], None]) -> None:
        super().__init__(series, cap, hit)
        self.values = dict.fromkeys(self.initial_keys(), 0.0)

    def add(self, amount: float, *labels: str) -> None:
        """Add to a series."""
        with self.lock:
            key = self.key(labels)
            self.values[key] = self.values.get(key, 0.0) + amount

    def set(self, value: float, *labels: str) -> None:
        """Set a series."""
        with self.lock:
            self.values[self.key(labels)] = value

    def replace(self, values: dict[Key, float]) -> None:
        """Replace all series."""
        with self.lock:
            self.values = {}
            for labels, value in values.items():
                self.values[self.key(labels)] = value

    def collect(self) -> list[Metric]:
        """Return the family."""
        family = samples_of(self.series)
        for labels, value in self.values.copy().items():
            family.add_metric(labels, value)
        return [family]


class Counts:
    """One series of a histogram."""

    def __init__(self, buckets: int) -> None:
        self.counts, self.sum = [0] * buckets, 0.0
        self.exemplars: list[Exemplar | None] = [None] * buckets


class Histogram(Family[Counts]):
    """A histogram that observes one value many times in one call; `prometheus_client.Histogram` takes one at a time."""

    def __init__(self, series: Series, cap: int, hit: Callable[[str], None], bounds: Sequence[float]) -> None:
        super().__init__(series, cap, hit)
        self.bounds = bounds
        self.names = [*(str(float(bound)) for bound in bounds), "+Inf"]
        self.values = {key: Counts(len(self.names)) for key in self.initial_keys()}

    def observe(self, value: float, *labels: str, times: int = 1, trace_id: str = "") -> None:
        """Count `value` so many times. `trace_id`: of the call, which becomes the bucket's exemplar."""
        with self.lock:
            key = self.key(labels)
            counts = self.values.get(key) or self.values.setdefault(key, Counts(len(self.names)))
            bucket = bisect_left(self.bounds, value)
            counts.counts[bucket] += times
            counts.sum += value * times
            if trace_id:
                counts.exemplars[bucket] = Exemplar({TRACE_ID: trace_id}, value)

    def collect(self) -> list[Metric]:
        """Return the family."""
        family = HistogramMetricFamily(self.series.name, self.series.help, labels=self.series.label_names)
        for labels, counts in self.values.copy().items():
            # The library's annotation forgets that a bucket may have no exemplar.
            buckets: Any = zip(self.names, accumulate(counts.counts.copy()), counts.exemplars.copy(), strict=True)
            family.add_metric(labels, list(buckets), counts.sum)
        return [family]
