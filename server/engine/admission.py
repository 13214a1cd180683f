"""Admit requests to the bank. The server's ledger runs ahead of the worker's: it releases a lease only after the worker
did, so the worker's ledger never overflows.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import ceil, inf

from rudder.server.engine.ledger import PINNED_HANDLE, Key, Ledger, ordered_rows
from rudder.server.monitoring.metrics import BankUsage, SiteUsage
from rudder.server.program import wire
from rudder.server.program.layout import Layout

# Requests that may be admitted before the one that has waited longest, while that does not fit.
MAX_BYPASSES = 32
# Requests of one caller that are examined, each time that room becomes free, before those of other callers.
LOOKAHEAD = 16


class QueueFull(Exception):
    """The queue is at its limit, or the wait was. `resource`: what was lacking: `rows`, `slots`, `capture_tokens` or
    `queue`.
    """

    def __init__(self, resource: str, retry_after_s: float, problem: str = "all taken, and the queue is full") -> None:
        super().__init__(f"{resource}: {problem}")
        self.resource, self.retry_after_s = resource, retry_after_s


@dataclass(eq=False)
class Waiter:
    """A request that waits for the bank. `bypassed`: requests admitted before it while it was first in the queue."""

    request: wire.Request
    caller: str
    keys: Sequence[Key]
    future: "asyncio.Future[None]"
    bypassed: int = 0


@dataclass
class Holdings:
    """What the running requests of one caller hold. `rows`: how many of them hold each row."""

    slots: int = 0
    capture: float = 0
    rows: Counter[Key] = field(default_factory=Counter)
    places: Counter[int] = field(default_factory=Counter)


class Admission:
    """The queue of requests that need the bank; the others are admitted at once.

    Requests are admitted in order of arrival, except that one which fits may bypass those which do not, at most
    MAX_BYPASSES of them past the first. So a request at position p of the queue is admitted after at most
    (p + 1) * (MAX_BYPASSES + 1) others, whatever they are.

    `limit`: choices that may wait, for the bank or in vLLM's own queue. `running`: choices that vLLM runs at once.
    `caller_share`: of slots, capture tokens and a site's row places; a caller gets no more than this while another
    waits. `max_wait_s`: seconds that a request may wait for the bank; None: no bound. `policy_rows`: row places of each
    site that only policies use.
    """

    def __init__(
        self,
        layout: Layout,
        limit: int,
        *,
        running: float = inf,
        caller_share: float = 1.0,
        max_wait_s: float | None = None,
        policy_rows: int = 0,
    ) -> None:
        self.ledger, self.limit, self.running = Ledger(layout), limit, running
        self.caller_share, self.max_wait_s, self.policy_rows = caller_share, max_wait_s, policy_rows
        # By handle; all of them together; and their rows by site number.
        self.reservations: dict[int, frozenset[Key]] = {}
        self.reserved: frozenset[Key] = frozenset()
        self.reserved_rows: dict[int, frozenset[wire.Row]] = {}
        self.waiting: dict[int, Waiter] = {}
        self.waiting_by_caller: Counter[str] = Counter()
        self.callers: dict[int, str] = {}
        # Rows of each admitted request that count for its caller: those that were not reserved when it was admitted.
        self.counted: dict[int, tuple[Key, ...]] = {}
        self.holdings: dict[str, Holdings] = {}
        self.set_reservations({})

    @property
    def queued(self) -> int:
        """Choices that wait: for the bank, or in vLLM for their turn in a batch."""
        return len(self.waiting) + self.queued_in_engine

    @property
    def queued_in_engine(self) -> int:
        """Choices admitted to the bank beyond what vLLM runs at once."""
        admitted = len(self.callers)
        return int(admitted - min(self.running, admitted))

    def reserve(self, handle: int, request: wire.Request) -> None:
        """Hold the rows of a policy or of pinned features. They count for no caller. Raises BankFull."""
        self.ledger.acquire(handle, request)
        self.set_reservations(self.reservations | {handle: frozenset(ordered_rows(request))})

    def unreserve(self, handle: int) -> None:
        """Hold these rows no longer, and admit waiting requests while they fit. Rows that a request uses stay."""
        self.ledger.release(handle)
        self.set_reservations({key: rows for key, rows in self.reservations.items() if key != handle})
        self.admit()

    def set_reservations(self, reservations: dict[int, frozenset[Key]]) -> None:
        """Replace all reservations."""
        self.reservations = reservations
        self.reserved = frozenset().union(*reservations.values())
        sites = {site for site, _ in self.reserved}
        self.reserved_rows = {at: frozenset(row for site, row in self.reserved if site == at) for at in sites}
        of_policies = Counter(at for at, _ in {*chain(*(r for h, r in reservations.items() if h != PINNED_HANDLE))})
        kept = range(len(self.ledger.layout.sites)) if self.policy_rows else ()
        self.ledger.kept = {site: max(0, self.policy_rows - of_policies[site]) for site in kept}

    async def acquire(self, handle: int, request: wire.Request, caller: str = "") -> None:
        """Wait until the bank has room. Raises QueueFull if too many wait or this one has waited too long, and the
        error of `fail`.
        """
        self.require_room_in_engine()
        waiter = Waiter(request, caller, ordered_rows(request), asyncio.get_running_loop().create_future())
        needs_nothing = not request.reads and not waiter.keys
        if (needs_nothing or not self.waiting) and self.ledger.insufficient(request) is None:
            self.lease(handle, waiter)
            return
        full = self.queued >= self.limit
        self.enqueue(handle, waiter)
        self.admit()
        if handle not in self.waiting:
            return
        if full:
            self.dequeue(handle)
            raise self.queue_full(self.ledger.insufficient(request) or "queue")
        await self.wait(handle, waiter)

    async def wait(self, handle: int, waiter: Waiter) -> None:
        """Wait for admission. Whoever stops waiting leaves no lease behind, and lets those behind it in."""
        try:
            async with asyncio.timeout(self.max_wait_s):
                await waiter.future
        except BaseException as error:
            resource = self.ledger.insufficient(waiter.request) or "queue"
            if handle in self.waiting:
                self.dequeue(handle)
                self.admit()
            else:
                self.release(handle)
            if isinstance(error, TimeoutError):
                raise self.queue_full(resource, f"none became free within {self.max_wait_s:g} s") from None
            raise

    def require_room_in_engine(self) -> None:
        """Raise QueueFull if one more choice would wait in vLLM, and as many as may do wait."""
        if len(self.callers) >= self.running and self.queued >= self.limit:
            raise self.queue_full("queue", "as many choices wait as may")

    def queue_full(self, resource: str, *problem: str) -> QueueFull:
        """Return a QueueFull with a time to retry that grows with the queue."""
        return QueueFull(resource, 1.0 + 0.05 * self.queued, *problem)

    def enqueue(self, handle: int, waiter: Waiter) -> None:
        """Append a request to the queue."""
        self.waiting[handle] = waiter
        self.waiting_by_caller[waiter.caller] += 1

    def dequeue(self, handle: int) -> Waiter:
        """Remove a request from the queue and return it."""
        waiter = self.waiting.pop(handle)
        self.waiting_by_caller[waiter.caller] -= 1
        if not self.waiting_by_caller[waiter.caller]:
            del self.waiting_by_caller[waiter.caller]
        return waiter

    def admit(self) -> None:
        """Admit the waiting requests that fit, in order; see the class for which may bypass which."""
        first: Waiter | None = None
        examined: Counter[str] = Counter()
        for handle, waiter in list(self.waiting.items()):
            if first is not None and first.bypassed >= MAX_BYPASSES:
                return
            if examined[waiter.caller] >= LOOKAHEAD:
                continue
            if self.ledger.insufficient(waiter.request) is not None:
                # What only its caller's share holds back must not hold back other callers.
                first = first or waiter
                examined[waiter.caller] += 1
            elif self.over_share(waiter):
                examined[waiter.caller] = LOOKAHEAD
            else:
                if first is not None:
                    first.bypassed += 1
                self.dequeue(handle)
                self.lease(handle, waiter)
                resolve(waiter.future)

    def over_share(self, waiter: Waiter) -> bool:
        """Return whether another caller waits and this request would bring its own beyond its share.

        A request that is larger than the share runs alone: a caller that holds nothing is never over it.
        """
        others = len(self.waiting_by_caller) - (waiter.caller in self.waiting_by_caller)
        holdings = self.holdings.get(waiter.caller)
        if not others or holdings is None:
            return False
        layout, share, request = self.ledger.layout, self.caller_share, waiter.request
        if request.edits and holdings.slots and holdings.slots + 1 > ceil(share * layout.slots):
            return True
        cost = self.ledger.capture_cost(request) if request.reads and layout.capture_tokens else 0
        if cost and holdings.capture and holdings.capture + cost > share * (layout.capture_tokens or inf):
            return True
        new = Counter(site for site, row in waiter.keys if (site, row) not in self.ledger.held)
        return any(
            holdings.places[site] and holdings.places[site] + rows > ceil(share * self.shared_places(site))
            for site, rows in new.items()
        )

    def shared_places(self, site: int) -> int:
        """Return the row places at site number `site` that are not reserved."""
        held = sum(at == site for at, _ in self.reserved)
        return self.ledger.layout.rows - held - self.ledger.kept.get(site, 0)

    def lease(self, handle: int, waiter: Waiter) -> None:
        """Lease what a request needs, which is free, and note it for its caller."""
        request, caller = waiter.request, waiter.caller
        self.ledger.acquire(handle, request)
        self.callers[handle] = caller
        self.counted[handle] = tuple(key for key in waiter.keys if key not in self.reserved)
        if request.edits or request.reads or waiter.keys:
            self.note(self.holdings.setdefault(caller, Holdings()), request, self.counted[handle], 1)

    def note(self, holdings: Holdings, request: wire.Request, keys: Sequence[Key], sign: int) -> None:
        """Add a request with these rows to its caller's holdings, or with `sign` -1 remove it."""
        holdings.slots += sign * request.edits
        holdings.capture += sign * (self.ledger.capture_cost(request) if request.reads else 0)
        for key in keys:
            before = holdings.rows[key]
            holdings.rows[key] = before + sign
            if not (before and holdings.rows[key]):
                holdings.places[key[0]] += sign
            if not holdings.rows[key]:
                del holdings.rows[key]

    def release(self, handle: int) -> None:
        """Release the lease of `handle`, and admit waiting requests while they fit."""
        request, _ = self.ledger.leases.get(handle, (None, None))
        self.ledger.release(handle)
        caller, counted = self.callers.pop(handle, None), self.counted.pop(handle, ())
        if request is not None and caller in self.holdings:
            holdings = self.holdings[caller]
            self.note(holdings, request, counted, -1)
            if not (holdings.slots or holdings.capture or holdings.rows):
                del self.holdings[caller]
        self.admit()

    def usage(self) -> BankUsage:
        """Snapshot of what is held and who waits, for another thread: every container is copied or measured at once."""
        ledger, layout = self.ledger, self.ledger.layout
        used = [(site, ledger.rows_used(number)) for number, site in enumerate(layout.sites)]
        slots_used = ledger.slots_used
        queued_in_engine = self.queued_in_engine
        return BankUsage(
            rows=[SiteUsage(site, rows, layout.rows - rows) for site, rows in used],
            slots_used=slots_used,
            slots_free=layout.slots - slots_used,
            running_choices=len(self.callers) - queued_in_engine,
            waiting_choices=len(self.waiting) + queued_in_engine,
        )

    def fail(self, error: Exception) -> None:
        """Raise `error` in every waiting `acquire`."""
        for handle in list(self.waiting):
            resolve(self.dequeue(handle).future, error)


def resolve(future: "asyncio.Future[None]", error: Exception | None = None) -> None:
    """Wake a waiter. A waiter that is cancelled but has not run yet releases its lease itself, in `acquire`."""
    if future.done():
        return
    if error:
        future.set_exception(error)
    else:
        future.set_result(None)
