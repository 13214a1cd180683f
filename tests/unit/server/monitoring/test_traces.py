"""Identifiers from headers: valid ones are kept, all others are ignored."""

import pytest

from rudder.server.monitoring.traces import Correlation, correlation_of, trace_id

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize(
    "header",
    [f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00", f"cc-{TRACE}-{PARENT}-01", f"cc-{TRACE}-{PARENT}-01-more"],
)
def test_valid_traceparent(header: str) -> None:
    assert trace_id(header) == TRACE


@pytest.mark.parametrize(
    "header",
    [
        "",
        TRACE,
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE}-{PARENT}-01-more",
        f"00-{TRACE}-{PARENT}-01\n",
        f"cc-{TRACE}-{PARENT}-01.more",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}g-{PARENT}-01",
    ],
)
def test_invalid_traceparent_is_ignored(header: str) -> None:
    assert trace_id(header) == ""


def test_both_identifiers_are_read_from_headers() -> None:
    headers = [("user-agent", "x"), ("x-request-id", "order 7"), ("traceparent", f"00-{TRACE}-{PARENT}-01")]
    assert correlation_of(headers) == Correlation("order 7", TRACE, f"00-{TRACE}-{PARENT}-01")
    assert correlation_of([]) == Correlation()


def test_two_traceparents_are_ignored() -> None:
    header = ("traceparent", f"00-{TRACE}-{PARENT}-01")
    assert correlation_of([header, header]).trace_id == ""


@pytest.mark.parametrize("value", ["", "x" * 129, "a\nb", "é", "\x1b[31m", b"bytes"])
def test_unprintable_or_long_request_ids_are_ignored(value: str | bytes) -> None:
    assert correlation_of([("x-request-id", value)]).correlation_id == ""
