"""Identifiers under which a client and its own systems know a call: W3C Trace Context and `x-request-id`."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

# https://www.w3.org/TR/trace-context/#traceparent-header: version, trace id, parent id, flags.
# Versions after 00 may append fields; version ff is invalid.
TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
# Printable ASCII, so that an identifier can neither break a log line nor fill the log.
CORRELATION_ID = re.compile(r"[\x20-\x7e]{1,128}")


@dataclass(frozen=True)
class Correlation:
    """The client's identifiers of a call; empty where it sent none, or none that is valid.

    `traceparent`: the header that names `trace_id`, and the client's span.
    """

    correlation_id: str = ""
    trace_id: str = ""
    traceparent: str = ""


def correlation_of(headers: Iterable[tuple[str, str | bytes]]) -> Correlation:
    """Read `x-request-id` and `traceparent` from a call's headers. Names are in lower case; others are ignored."""
    values: dict[str, list[str]] = {"x-request-id": [], "traceparent": []}
    for name, value in headers:
        if name in values and isinstance(value, str):
            values[name].append(value)
    correlation_ids = [value for value in values["x-request-id"] if CORRELATION_ID.fullmatch(value)]
    # Trace Context: with more than one traceparent, none counts.
    header = values["traceparent"][0] if len(values["traceparent"]) == 1 else ""
    trace = trace_id(header)
    return Correlation(next(iter(correlation_ids), ""), trace, header if trace else "")


def trace_id(traceparent: str) -> str:
    """Return the trace id of a `traceparent` header; empty if the header is invalid."""
    match = TRACEPARENT.fullmatch(traceparent)
    if match is None:
        return ""
    version, trace, parent, suffix = match.groups()
    valid = int(trace, 16) and int(parent, 16) and (version != "00" or suffix is None)
    return trace if valid else ""
