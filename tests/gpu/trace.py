"""A torch profiler's trace of decode steps: kernels by name, and the gaps between them in which the GPU was idle."""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Categories of the Chrome trace format as Kineto writes it.
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
ON_CPU = ("cpu_op",)
# How vLLM's worker names a step.
STEP_PREFIX = "execute_"
LONGEST = 15
Event = Mapping[str, Any]


def events_in(folder: Path) -> list[dict[str, Any]]:
    """Return the events of the newest worker's trace in a folder. Raises FileNotFoundError if there is none."""
    files = sorted(folder.rglob("*.pt.trace.json*"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"no trace in {folder}")
    data = files[-1].read_bytes()
    events: list[dict[str, Any]] = json.loads(gzip.decompress(data) if files[-1].suffix == ".gz" else data)[
        "traceEvents"
    ]
    return events


def steps_in(events: Iterable[Event]) -> int:
    """Count the steps of the engine."""
    return sum(event.get("cat") == "user_annotation" and event["name"].startswith(STEP_PREFIX) for event in events)


def kernel_table(events: Iterable[Event], categories: Sequence[str], steps: int) -> list[dict[str, Any]]:
    """Return calls and microseconds a step by name, the longest first."""
    calls, time = defaultdict[str, int](int), defaultdict[str, float](float)
    for event in events:
        if event.get("cat") in categories:
            calls[event["name"]] += 1
            time[event["name"]] += event["dur"]
    table = [
        {"name": name, "calls": round(calls[name] / steps, 2), "us": round(time[name] / steps, 2)} for name in calls
    ]
    return sorted(table, key=lambda line: -float(line["us"]))


def idle_gaps(events: Iterable[Event], steps: int) -> dict[str, Any]:
    """Return the time between events on the device in which none ran: microseconds a step, and the longest gaps."""
    running = sorted((event for event in events if event.get("cat") in ON_DEVICE), key=lambda event: event["ts"])
    gaps, end, last, busy = [], None, "", 0.0
    for event in running:
        start = event["ts"]
        if end is not None and start > end:
            gaps.append({"us": round(start - end, 2), "after": last, "before": event["name"]})
        stop = start + event["dur"]
        if end is None or stop > end:
            busy += stop - (start if end is None else max(start, end))
            end, last = stop, event["name"]
    gaps.sort(key=lambda gap: -float(gap["us"]))
    return {
        "busy_us": round(busy / steps, 1),
        "idle_us": round(sum(gap["us"] for gap in gaps) / steps, 1),
        "gaps": round(len(gaps) / steps, 1),
        "longest": gaps[:LONGEST],
    }


def summary(events: Sequence[Event]) -> dict[str, Any]:
    """Return figures a step: kernels, their time, idle time, and both tables. Raises ValueError without a step."""
    steps = steps_in(events)
    if not steps:
        raise ValueError("the trace has no step of the engine")
    kernels = kernel_table(events, ON_DEVICE, steps)
    if not kernels:
        operators = kernel_table(events, ON_CPU, steps)
        return {"steps": steps, "operators": round(sum(line["calls"] for line in operators), 1), "table": operators}
    return {
        "steps": steps,
        "kernels": round(sum(line["calls"] for line in kernels), 1),
        **idle_gaps(events, steps),
        "table": kernels,
    }
