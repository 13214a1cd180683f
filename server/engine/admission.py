"""Admit requests to the bank. The server's ledger runs ahead of the worker's: it releases a lease only after the worker
did, so the worker's ledger never overflows.
"""

import asyncio
from collections import OrderedDict

from rudder.server.engine.ledger import Ledger
from rudder.server.monitoring.metrics import BankUsage, SiteUsage
from rudder.server.program import wire
from rudder.server.program.layout import Layout


class QueueFull(Exception):
    """The queue is at its limit. `resource`: what the request lacked, `rows`, `slots`, `capture_tokens` or `queue`."""

    def __init__(self, resource: str, retry_after_s: float) -> None:
        super().__init__(f"{resource}: all taken, and the queue is full")
        self.resource, self.retry_after_s = resource, retry_after_s


class Admission:
    """A queue, first in first out, of requests that need the bank; the others are admitted at once.

    `limit`: requests that may wait.
    """

    def __init__(self, layout: Layout, limit: int) -> None:
        self.ledger, self.limit = Ledger(layout), limit
        self.waiting: OrderedDict[int, tuple[wire.Request, asyncio.Future[None]]] = OrderedDict()

    async def acquire(self, handle: int, request: wire.Request) -> None:
        """Wait until the bank has room. Raises QueueFull at once if too many wait, and the error of `fail`."""
        needs_nothing = not request.reads and not any(site.rows for stage in request.stages for site in stage)
        if needs_nothing or not self.waiting:
            lease = self.ledger.try_acquire(handle, request)
            if not isinstance(lease, str):
                return
        if len(self.waiting) >= self.limit:
            resource = self.ledger.insufficient(request) or "queue"
            raise QueueFull(resource, retry_after_s=1.0 + 0.05 * len(self.waiting))
        future = asyncio.get_running_loop().create_future()
        self.waiting[handle] = request, future
        try:
            await future
        except asyncio.CancelledError:
            if self.waiting.pop(handle, None) is None:
                self.release(handle)
            raise

    def release(self, handle: int) -> None:
        """Release the lease of `handle`, and admit waiting requests in order while they fit."""
        self.ledger.release(handle)
        while self.waiting:
            head, (request, future) = next(iter(self.waiting.items()))
            if self.ledger.insufficient(request) is not None:
                return
            del self.waiting[head]
            self.ledger.acquire(head, request)
            resolve(future)

    def usage(self) -> BankUsage:
        """Snapshot of what is held and who waits, for another thread: every container is copied or measured at once."""
        ledger, layout = self.ledger, self.ledger.layout
        used = [(site, ledger.rows_used(number)) for number, site in enumerate(layout.sites)]
        slots_used = ledger.slots_used
        return BankUsage(
            rows=[SiteUsage(site, rows, layout.rows - rows) for site, rows in used],
            slots_used=slots_used,
            slots_free=layout.slots - slots_used,
            # Handle 0 holds the pinned rows.
            running_choices=sum(handle != 0 for handle in list(ledger.leases)),
            waiting_requests=len(self.waiting),
        )

    def fail(self, error: Exception) -> None:
        """Raise `error` in every waiting `acquire`."""
        while self.waiting:
            _, (_, future) = self.waiting.popitem()
            resolve(future, error)


def resolve(future: "asyncio.Future[None]", error: Exception | None = None) -> None:
    """Wake a waiter. A waiter that is cancelled but has not run yet releases its lease itself, in `acquire`."""
    if future.done():
        return
    if error:
        future.set_exception(error)
    else:
        future.set_result(None)
