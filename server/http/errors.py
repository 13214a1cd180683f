"""From a Refusal to an HTTP answer in the form of the OpenAI API."""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from rudder.server.service.errors import Refusal

Headers = list[tuple[bytes, bytes]]
# What OpenAI's clients distinguish; by status.
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# Statuses that OpenAI's clients repeat by themselves unless told not to.
RETRIED = (408, 409, 429)
MAX_VIOLATIONS = 16


def error_body(status: int, message: str, code: str, param: str | None = None) -> dict[str, Any]:
    """Return the body of an error that has no call."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refusal_body(refusal: Refusal, names: Mapping[str, str]) -> dict[str, Any]:
    """Return the body of a refusal. `names`: the request's own names of the contract's fields."""
    fields = [renamed(violation.field, names) for violation in refusal.violations[:MAX_VIOLATIONS]]
    message = refusal.message
    if fields and message.startswith(f"{refusal.violations[0].field}: "):
        message = fields[0] + message.removeprefix(refusal.violations[0].field)
    body = error_body(refusal.http_status, message, refusal.reason, fields[0] if fields else None)
    details: dict[str, Any] = {"request_id": refusal.request_id}
    if refusal.error_id:
        details["error_id"] = refusal.error_id
    if fields:
        described = zip(fields, refusal.violations, strict=False)
        details["violations"] = [{"field": field, "description": v.description} for field, v in described]
    return body | {"rudder": details}


def refusal_headers(refusal: Refusal) -> Headers:
    """Return the headers of a refusal: when to try again, and whether that helps."""
    headers: Headers = [(b"x-request-id", refusal.request_id.encode())]
    if refusal.http_status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refusal.retry_after_s is not None:
        headers.append((b"retry-after-ms", str(ceil(refusal.retry_after_s * 1000)).encode()))
        headers.append((b"retry-after", str(ceil(refusal.retry_after_s)).encode()))
    elif refusal.code != "UNAVAILABLE" and (refusal.http_status in RETRIED or refusal.http_status >= 500):
        headers.append((b"x-should-retry", b"false"))
    return headers


def renamed(field: str, names: Mapping[str, str]) -> str:
    """Return the request's name of a field of the contract: that of the longest prefix of whole names that has one."""
    for prefix in prefixes(field):
        if prefix in names:
            rest = field[len(prefix) :]
            return (names[prefix] + rest) if names[prefix] else rest.removeprefix(".")
    return field


def prefixes(field: str) -> Sequence[str]:
    """Return a dotted path and its beginnings, the longest first; an index is a part of its own."""
    ends = [i for i, character in enumerate(field) if character in ".["]
    return [field, *(field[:end] for end in reversed(ends))]
