"""Series that are computed at each scrape: what the bank and the queue hold, watched features, scores of guards.

Prometheus scrapes from a thread of its own. So a collector iterates only over copies, each taken in one call that holds
the GIL, never over a container that the event loop changes meanwhile.
"""

import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from rudder.server.monitoring import series
from rudder.server.monitoring.families import samples_of

MAX_LABEL_CHARS = 80
# Quantiles of a guard's benign scores, and the number of choices that they are of: some above the highest.
BENIGN_QUANTILES = (0.5, 0.99, 0.999)
BENIGN_CHOICES = 10_000


class SiteUsage(NamedTuple):
    """Row places of one site's bank. `reserved`: those of `used` that policies and watched features hold for good."""

    site: str
    used: int
    free: int
    reserved: int = 0


class BankUsage(NamedTuple):
    """Snapshot of what requests hold of the bank, and of the choices that wait for it or for the engine.

    `max_running`, `max_waiting`: how many there may be; infinite where nothing bounds them.
    """

    rows: Sequence[SiteUsage]
    slots_used: int
    slots_free: int
    running_choices: int
    waiting_choices: int
    max_running: float = float("inf")
    max_waiting: float = float("inf")

    @property
    def saturation(self) -> float:
        """The largest share in use of what bounds the number of requests, 0 to 1."""
        parts = [
            (self.running_choices, self.max_running),
            (self.waiting_choices, self.max_waiting),
            (self.slots_used, self.slots_used + self.slots_free),
            *((site.used - site.reserved, site.used - site.reserved + site.free) for site in self.rows),
        ]
        return max(min(used / of, 1.0) if of else float(used > 0) for used, of in parts)


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
    """Pinned features, their columns in the array of `Features.add`, and their totals, which alone change."""

    features: Sequence[PinnedFeature]
    columns: Sequence[int]
    totals: list[FeatureTotals]


class Bank(Collector):
    """Gauges of a snapshot that `usage` returns; none before it is set."""

    def __init__(self) -> None:
        self.usage: Callable[[], BankUsage] | None = None

    def collect(self) -> list[Metric]:
        """Return all series."""
        return usage_families(self.usage()) if self.usage else []


def usage_families(usage: BankUsage) -> list[Metric]:
    """Return the gauges of a snapshot."""
    rows, slots = samples_of(series.BANK_ROWS), samples_of(series.BANK_SLOTS)
    for site in usage.rows:
        rows.add_metric([site.site, "used"], site.used)
        rows.add_metric([site.site, "free"], site.free)
    slots.add_metric(["used"], usage.slots_used)
    slots.add_metric(["free"], usage.slots_free)
    single = (
        (series.INFLIGHT, usage.running_choices),
        (series.QUEUE, usage.waiting_choices),
        (series.SATURATION, usage.saturation),
    )
    families: list[Metric] = [rows, slots]
    for declared, value in single:
        family = samples_of(declared)
        family.add_metric([], value)
        families.append(family)
    return families


class Features(Collector):
    """Counters of watched features."""

    def __init__(self) -> None:
        # Replaced as a whole: a scrape sees the features and the totals of one call of `pin`.
        self.pinned = Pinned((), (), [])

    def pin(self, features: Sequence[PinnedFeature], columns: Sequence[int]) -> None:
        """Count these features; `columns` are their rows in the array that `add` takes."""
        self.pinned = Pinned(tuple(features), tuple(columns), [FeatureTotals()] * len(features))

    def add(self, totals: NDArray[Any]) -> None:
        """Add the totals of one step, [pinned rows, 4] with the columns of `FeatureTotals`."""
        _, columns, before_step = self.pinned
        for i, column in enumerate(columns):
            step, before = FeatureTotals(*totals[column].tolist()), before_step[i]
            before_step[i] = FeatureTotals(
                before.active_tokens + step.active_tokens,
                before.tokens + step.tokens,
                before.sum + step.sum,
                max(before.max, step.max),
            )

    def collect(self) -> list[Metric]:
        """Return, per pinned feature, its totals, and its label in a series of its own."""
        declared = series.ACTIVE_TOKENS, series.EVALUATED_TOKENS, series.ACTIVATION_SUM, series.ACTIVATION_MAX
        families, info = [samples_of(each) for each in declared], samples_of(series.FEATURE_INFO)
        pinned = self.pinned
        for feature, totals in zip(pinned.features, tuple(pinned.totals), strict=True):
            key = [feature.bundle, feature.site, str(feature.index)]
            for family, value in zip(families, totals, strict=True):
                family.add_metric(key, value)
            info.add_metric([*key, printable(feature.label)], 1)
        return [*families, info]


def printable(label: str) -> str:
    """Return at most MAX_LABEL_CHARS of a label, without control characters."""
    return re.sub(r"[\x00-\x1f\x7f]", " ", label)[:MAX_LABEL_CHARS]


class Guards(Collector):
    """Levels of guards, and quantiles of their scores in the last choices in which they did not hold.

    Where these move towards the level, false alarms are about to rise, or the traffic has changed.
    """

    def __init__(self) -> None:
        self.scores: dict[tuple[str, str], deque[float]] = {}
        self.levels: dict[tuple[str, str], float] = {}

    def observe(self, policy: str, rule: str, score: float, level: float) -> None:
        """Note the largest statistic of a choice."""
        key = policy, rule
        self.levels[key] = level
        if key in self.scores:
            self.scores[key].append(score)
        else:
            # A scrape never sees a guard without a score: it has no quantiles.
            self.scores[key] = deque([score], maxlen=BENIGN_CHOICES)

    def keep(self, policies: set[str]) -> None:
        """Forget the guards of all other policies."""
        self.scores = {key: scores for key, scores in self.scores.items() if key[0] in policies}

    def collect(self) -> list[Metric]:
        """Return the series of all guards that have judged a choice."""
        levels, scores = samples_of(series.GUARD_LEVEL), samples_of(series.BENIGN_SCORE)
        for key, last in self.scores.copy().items():
            levels.add_metric(key, self.levels[key])
            values = np.quantile(last.copy(), BENIGN_QUANTILES, method="higher").tolist()
            for quantile, value in zip(BENIGN_QUANTILES, values, strict=True):
                scores.add_metric([*key, f"{quantile:g}"], value)
        return [levels, scores]
