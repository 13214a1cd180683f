"""Send the lines of the audit log to a web server as well, from a thread of its own: no call ever waits for it."""

import hashlib
import hmac
import http.client
import logging
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

from rudder.server.config import ConfigError, is_loopback
from rudder.server.monitoring.logs import fields
from rudder.server.monitoring.metrics import Metrics

SIGNATURE = "Rudder-Signature"
MAX_BATCH, WAIT_S, POST_TIMEOUT_S = 256, 1.0, 10.0
FIRST_DELAY_S, MAX_DELAY_S = 0.25, 30.0
CLOSE_S = 5.0
# Statuses of a client error after which the same request may succeed: timeout, too early, too many requests.
RETRIED = frozenset({408, 425, 429})

logger = logging.getLogger(__name__)


class NoRedirect(HTTPRedirectHandler):
    """Follow no redirect: the log goes where the operator said, or nowhere."""

    def redirect_request(self, *_: Any) -> None:
        """Return no request."""


class Webhook:
    """Posts lines, as JSON lines, in their order; `Rudder-Signature: sha256=HMAC` of the body.

    A batch is repeated, after growing delays, until the receiver takes it. Lines that the queue has no room for
    meanwhile are dropped and counted: the receiver sees the gap in `sequence`.
    """

    def __init__(self, url: str, secret: bytes, size: int, metrics: Metrics) -> None:
        self.url, self.secret, self.metrics = checked_url(url), secret, metrics
        self.queue: queue.Queue[bytes] = queue.Queue(size)
        self.opener: OpenerDirector = build_opener(NoRedirect)
        self.closing, self.deadline = threading.Event(), float("inf")
        self.thread = threading.Thread(target=self.run, name="audit-webhook", daemon=True)
        self.thread.start()

    def put(self, lines: Sequence[bytes]) -> None:
        """Queue lines, as many as there is room for."""
        for sent, line in enumerate(lines):
            try:
                self.queue.put_nowait(line)
            except queue.Full:
                return self.drop(len(lines) - sent, "the receiver is too slow")
        return None

    def close(self) -> None:
        """Deliver for a few seconds what waits; drop the rest."""
        self.deadline = time.monotonic() + CLOSE_S
        self.closing.set()
        self.thread.join(CLOSE_S + POST_TIMEOUT_S)
        if self.queue.qsize():
            self.drop(self.queue.qsize(), "the server stops")

    def run(self) -> None:
        """Deliver batches until closed: the thread."""
        while time.monotonic() < self.deadline:
            batch = self.take()
            if batch:
                self.deliver(batch)
            elif self.closing.is_set():
                return

    def take(self) -> list[bytes]:
        """Return the lines that wait, or none after a while."""
        batch: list[bytes] = []
        try:
            batch.append(self.queue.get(timeout=0 if self.closing.is_set() else WAIT_S))
            while len(batch) < MAX_BATCH:
                batch.append(self.queue.get_nowait())
        except queue.Empty:
            pass
        return batch

    def deliver(self, batch: list[bytes]) -> None:
        """Post a batch until the receiver takes it, refuses it for good, or time is up."""
        body, delay = b"".join(batch), FIRST_DELAY_S
        while True:
            problem, final = self.post(body)
            if problem is None:
                return self.metrics.audit_sent(len(batch))
            if final or time.monotonic() + delay > self.deadline:
                return self.drop(len(batch), problem)
            logger.debug("the audit webhook failed", extra=fields(error=problem, retry_s=delay))
            self.pause(delay)
            delay = min(2 * delay, MAX_DELAY_S)

    def pause(self, delay_s: float) -> None:
        """Wait before the next attempt; not for long once the server stops."""
        if self.closing.wait(delay_s):
            time.sleep(min(delay_s, FIRST_DELAY_S))

    def post(self, body: bytes) -> tuple[str | None, bool]:
        """Post once; return the problem, None without one, and whether it will stay."""
        headers = {"Content-Type": "application/x-ndjson", SIGNATURE: signature(self.secret, body)}
        try:
            with self.opener.open(Request(self.url, body, headers, method="POST"), timeout=POST_TIMEOUT_S):
                return None, False
        except HTTPError as error:
            return f"status {error.code}", error.code < 500 and error.code not in RETRIED
        except (OSError, http.client.HTTPException) as error:
            return f"{type(error).__name__}: {error}", False

    def drop(self, lines: int, problem: str) -> None:
        """Count and log lines that are not delivered."""
        self.metrics.audit_dropped(lines)
        logger.warning("the audit webhook dropped entries", extra=fields(entries=lines, cause=problem))


def signature(secret: bytes, body: bytes) -> str:
    """Return the value of `Rudder-Signature` for a body."""
    return f"sha256={hmac.new(secret, body, hashlib.sha256).hexdigest()}"


def checked_url(url: str) -> str:
    """Return the URL. ConfigError: it is neither https nor http to this machine."""
    parts = urlsplit(url)
    if not parts.hostname or not (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname))):
        raise ConfigError("audit.webhook", f"must be https, or http to this machine, not {parts.scheme or url!r}")
    return url
