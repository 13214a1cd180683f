"""What the server is doing now: load, watched features, how calls ended. Numbers and names, never a client's text."""

from typing import Any

from rudder.server.monitoring.series import REQUESTS
from rudder.server.service.serving import Serving


def figures(serving: Serving) -> dict[str, Any]:
    """Return a snapshot. `calls`: ended since the start, by outcome; totals of features are since the start too."""
    metrics = serving.metrics
    usage = metrics.bank.usage() if metrics.bank.usage else None
    pinned = metrics.features.pinned
    return {
        "running": usage.running_choices if usage else 0,
        "waiting": usage.waiting_choices if usage else 0,
        "queue": serving.config.limits.queue,
        "max_running": serving.config.engine.max_num_seqs,
        "slots": {"used": usage.slots_used, "free": usage.slots_free} if usage else None,
        "rows": [site._asdict() for site in usage.rows] if usage else [],
        "pending_bytes": serving.pending.used,
        "max_pending_bytes": serving.config.limits.max_pending_bytes,
        "draining": serving.draining,
        "calls": calls_by_outcome(serving),
        "features": [
            {"bundle": feature.bundle, "site": feature.site, "index": feature.index, "label": feature.label}
            | totals._asdict()
            for feature, totals in zip(pinned.features, tuple(pinned.totals), strict=True)
        ],
    }


def calls_by_outcome(serving: Serving) -> dict[str, int]:
    """Return how many calls of each outcome have ended."""
    result: dict[str, int] = {}
    for family in serving.metrics.values[REQUESTS].collect():
        for sample in family.samples:
            if sample.name.endswith("_total"):
                outcome = sample.labels["outcome"]
                result[outcome] = result.get(outcome, 0) + int(sample.value)
    return result
