"""Who may enter the bank now. The same ledger as the worker's, ahead of it: places come back only when the worker has
given them back, so the worker never overflows.
"""

import asyncio
from collections import OrderedDict

from rudder.server.engine.ledger import Ledger
from rudder.server.monitoring.metrics import BankUsage, SiteUsage
from rudder.server.program import wire
from rudder.server.program.layout import Layout


class QueueFull(Exception):
    """The waiting line is at its bound; `resource` names what those in front wait for."""

    def __init__(self, resource: str, retry_after_s: float) -> None:
        super().__init__(f"{resource}: all taken, and the queue is full")
        self.resource, self.retry_after_s = resource, retry_after_s


class Admission:
    """First come, first served for requests that need the bank; the others pass."""

    def __init__(self, layout: Layout, bound: int) -> None:
        self.ledger, self.bound = Ledger(layout), bound
        self.waiting: OrderedDict[int, tuple[wire.Request, asyncio.Future[None]]] = OrderedDict()

    async def acquire(self, handle: int, request: wire.Request) -> None:
        """Wait until the bank has room. Raises QueueFull at once when too many wait, and what `fail` is given."""
        needs_nothing = not request.reads and not any(site.rows for stage in request.stages for site in stage)
        if needs_nothing or not self.waiting:
            lease = self.ledger.enter(handle, request)
            if not isinstance(lease, str):
                return
        if len(self.waiting) >= self.bound:
            lacking = self.ledger.lacking(request) or "queue"
            raise QueueFull(lacking, retry_after_s=1.0 + 0.05 * len(self.waiting))
        future = asyncio.get_running_loop().create_future()
        self.waiting[handle] = request, future
        try:
            await future
        except asyncio.CancelledError:
            if self.waiting.pop(handle, None) is None:
                self.release(handle)
            raise

    def release(self, handle: int) -> None:
        """Give back what `handle` holds, and let in whoever now fits, in order."""
        self.ledger.release(handle)
        while self.waiting:
            head, (request, future) = next(iter(self.waiting.items()))
            if self.ledger.lacking(request) is not None:
                return
            del self.waiting[head]
            self.ledger.acquire(head, request)
            settle(future)

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
        """Nobody who waits will be let in any more."""
        while self.waiting:
            _, (_, future) = self.waiting.popitem()
            settle(future, error)


def settle(future: "asyncio.Future[None]", error: Exception | None = None) -> None:
    """Wake who waits. One that was cancelled a moment ago has yet to run, and gives back what it was given."""
    if future.done():
        return
    if error:
        future.set_exception(error)
    else:
        future.set_result(None)
