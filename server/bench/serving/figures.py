"""Figures of a measurement: speed, latencies from the intended send time, and goodput."""

from collections.abc import Sequence

import numpy as np

from rudder.server.bench.serving.offered import OBJECTIVES, Objective, Recorded, Request

SHARES = {"p50": 50, "p99": 99}


def figures(recorded: Recorded, new_tokens: int) -> dict[str, float]:
    """Return tokens a second; TTFT and ITL in ms; requests a second that keep each objective.

    ITL is the time between messages of a request, which hold one token or several, as a reader sees it.
    """
    ttft = [1e3 * request.messages[0] for request in recorded.requests]
    gaps = [1e3 * gap for request in recorded.requests for gap in np.diff(request.messages)]
    good = {
        f"goodput_{name}": sum(keeps(request, objective, new_tokens) for request in recorded.requests)
        / recorded.seconds
        for name, objective in OBJECTIVES.items()
    }
    return {
        "tok_s": len(recorded.requests) * new_tokens / recorded.seconds,
        **percentiles("ttft_ms", ttft),
        **percentiles("itl_ms", gaps),
        **good,
        "client_cpu_s": recorded.cpu_seconds,
        "client_peak_mib": recorded.peak_mib,
        "messages": sum(len(request.messages) for request in recorded.requests),
    }


def percentiles(name: str, values: Sequence[float]) -> dict[str, float]:
    """Return the median and the 99th percentile; NaN of no values."""
    return {
        f"{name}_{label}": float(np.percentile(values, share)) if len(values) else float("nan")
        for label, share in SHARES.items()
    }


def keeps(request: Request, objective: Objective, new_tokens: int) -> bool:
    """Return whether a request keeps an objective: its first token, and the mean time of each later one."""
    first, last = request.messages[0], request.messages[-1]
    mean_ms = 1e3 * (last - first) / (new_tokens - 1)
    return 1e3 * first <= objective.ttft_ms and mean_ms <= objective.itl_ms
