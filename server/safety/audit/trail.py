"""The audit log of a running server: entries go through a bounded queue to a thread that writes them.

No call blocks the event loop. With `fsync: always` or `on_failure: closed` a call's answer waits for its entry: entries
that wait at the same time share one write and one fsync.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rudder.server.config import Audit, ConfigError
from rudder.server.monitoring.logs import fields
from rudder.server.monitoring.metrics import Metrics
from rudder.server.safety.audit import chain
from rudder.server.safety.audit.log import AuditLog
from rudder.server.safety.audit.verify import Place
from rudder.server.safety.audit.webhook import Webhook

T = TypeVar("T")
# With `fsync: interval` a power cut loses what was written in this time; no head is older, whatever `fsync` is.
ANCHOR_S = 1.0
MAX_BATCH = 1024

logger = logging.getLogger(__name__)


class AuditFailed(Exception):
    """The log cannot be written, and the server is configured to serve no bound call then."""

    def __init__(self) -> None:
        super().__init__("the audit log cannot be written, and calls that a policy binds are not served without it")


class Item(NamedTuple):
    """An entry in the queue, and whether it has been written."""

    entry: Mapping[str, Any]
    written: "Future[bool]"


class Trail:
    """The audit log of a running server.

    `failing`: the last attempt to write failed. `lost`: entries that were never written; the next entry
    that is written says how many.
    """

    def __init__(self, log: AuditLog, settings: Audit, metrics: Metrics, webhook: Webhook | None = None) -> None:
        self.log, self.settings, self.metrics, self.webhook = log, settings, metrics, webhook
        self.closed = settings.on_failure == "closed"
        self.waits = self.closed or settings.fsync == "always"
        self.queue: queue.Queue[Item | None] = queue.Queue(settings.queue)
        self.lock, self.lost, self.failing = threading.Lock(), 0, False
        self.anchored_at = time.monotonic()
        self.thread = threading.Thread(target=self.run, name="audit", daemon=True)
        self.thread.start()

    def require_open(self) -> None:
        """Raise AuditFailed if the entry of a call that begins now could not be written."""
        if self.failing and self.closed:
            raise AuditFailed

    async def append(self, entry: Mapping[str, Any]) -> None:
        """Write an entry, and wait for it where the configuration asks for that. Raises AuditFailed."""
        written = self.submit(entry)
        if self.waits and not await asyncio.wrap_future(written) and self.closed:
            raise AuditFailed

    def submit(self, entry: Mapping[str, Any]) -> "Future[bool]":
        """Put an entry into the queue; return whether it will have been written. It is lost if the queue is full."""
        written: Future[bool] = Future()
        # Whoever waits may be cancelled; the entry is written all the same.
        written.set_running_or_notify_cancel()
        try:
            self.queue.put_nowait(Item({"time": chain.now(), **entry}, written))
        except queue.Full:
            self.lose(1)
            written.set_result(False)
        return written

    def close(self) -> None:
        """Write what waits, anchor the head as closed, and give the webhook some time to deliver."""
        self.queue.put(None)
        self.thread.join()
        self.attempt(self.log.close)
        if self.webhook:
            self.webhook.close()

    def run(self) -> None:
        """Write entries until the log is closed: the writer's thread."""
        closing = False
        while not closing:
            batch, closing = self.take()
            self.write(batch)
            self.anchor_if_due()

    def take(self) -> tuple[list[Item], bool]:
        """Return the entries that wait, or none after a while; and whether they are the last."""
        batch: list[Item] = []
        try:
            item = self.queue.get(timeout=ANCHOR_S)
            while item is not None:
                batch.append(item)
                if len(batch) == MAX_BATCH:
                    return batch, False
                item = self.queue.get_nowait()
        except queue.Empty:
            return batch, False
        return batch, True

    def write(self, batch: Sequence[Item]) -> None:
        """Write entries, and before them how many were lost; all of them or none."""
        lost = self.lost
        entries = [
            *([{"kind": "lost", "time": chain.now(), "entries": lost}] if lost else []),
            *(i.entry for i in batch),
        ]
        if not entries:
            return
        lines = self.attempt(lambda: self.log.append(entries))
        if lines is None:
            self.lose(len(batch))
        else:
            self.lose(-lost)
            self.metrics.audit_written(len(lines))
            if self.webhook:
                self.webhook.put(lines)
        for item in batch:
            item.written.set_result(lines is not None)

    def anchor_if_due(self) -> None:
        """Anchor the head after so many entries, or after a while."""
        waited = time.monotonic() - self.anchored_at
        if self.log.end.count - self.log.anchored >= self.settings.anchor_every or waited >= ANCHOR_S:
            self.anchored_at = time.monotonic()
            self.attempt(self.log.anchor)

    def attempt(self, work: Callable[[], T]) -> T | None:
        """Return the result of `work`, or None if it failed; note whether the log can be written."""
        try:
            result = work()
        # The boundary of the thread: if it ended, every call would wait for ever.
        except Exception as error:
            self.set_failing(f"{type(error).__name__}: {error}")
            return None
        self.set_failing(None)
        return result

    def set_failing(self, error: str | None) -> None:
        """Log and count that the log can no longer be written, or can again."""
        if error and not self.failing:
            logger.error(
                "the audit log cannot be written", extra=fields(error=error, on_failure=self.settings.on_failure)
            )
        elif self.failing and not error:
            logger.info("the audit log can be written again", extra=fields(lost=self.lost))
        self.failing = error is not None
        self.metrics.set_audit_failing(self.failing)

    def lose(self, entries: int) -> None:
        """Add to the number of lost entries that no entry has named yet."""
        with self.lock:
            self.lost += entries
        if entries > 0:
            self.metrics.audit_lost(entries)


def open_trail(settings: Audit, metrics: Metrics) -> Trail | None:
    """Open the audit log of a configuration; None if it has none. ConfigError or UserError names what is wrong."""
    if settings.folder is None:
        return None
    place = Place.of(settings.folder, settings.head)
    key = configured_key(settings.key_file, "audit.key_file")
    if Path(settings.key_file or "").resolve().is_relative_to(place.folder.resolve()):
        raise ConfigError("audit.key_file", "is in the folder of the log: whoever copies the log must not get its key")
    webhook = None
    if settings.webhook:
        secret = configured_key(settings.webhook_secret_file, "audit.webhook_secret_file")
        webhook = Webhook(settings.webhook, secret, settings.queue, metrics)
    return Trail(AuditLog.open(place, key, settings.max_bytes, settings.fsync), settings, metrics, webhook)


def configured_key(path: str | None, field: str) -> bytes:
    """Read the key that a field of the configuration names."""
    if path is None:
        raise ConfigError(field, "is null: name a file that `rudder audit key FILE` has written")
    return chain.read_key(Path(path))
