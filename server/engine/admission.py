"""Admit requests to the bank and to vLLM. The server's ledger runs ahead of the worker's: it releases a lease only
after the worker did, so the worker's ledger never overflows.
"""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from math import ceil, inf

from rudder.server.engine.ledger import PINNED_HANDLE, Key, Ledger, ordered_rows
from rudder.server.engine.turns import Turns
from rudder.server.monitoring.collectors import BankUsage, SiteUsage
from rudder.server.program import wire
from rudder.server.program.layout import Layout

# Requests that may be admitted before the one that has waited longest, while that does not fit.
MAX_BYPASSES = 32
# Requests of one caller that are examined, each time that room becomes free.
LOOKAHEAD = 16
# Requests given to vLLM beyond what it runs at once, as a share of that: they take places that become free without a
# wait for this process. The order among them is vLLM's, so there are few.
AHEAD = 1 / 8


class QueueFull(Exception):
    """The queue is at its limit, or the wait was. `resource`: what was lacking: `rows`, `slots`, `capture_tokens` or
    `queue`.
    """

    def __init__(self, resource: str, retry_after_s: float, problem: str = "all taken, and the queue is full") -> None:
        super().__init__(f"{resource}: {problem}")
        self.resource, self.retry_after_s = resource, retry_after_s


@dataclass(eq=False)
class Waiter:
    """A request that waits. `bypassed`: requests admitted to the bank before it, while it had waited longest for it."""

    handle: int
    request: wire.Request
    caller: str
    keys: Sequence[Key]
    future: "asyncio.Future[None]"
    needs_bank: bool = field(init=False)
    bypassed: int = 0

    def __post_init__(self) -> None:
        # Whether it needs a slot, rows or captures.
        self.needs_bank = bool(self.request.edits or self.request.reads or self.keys)

    @property
    def cost(self) -> int:
        """Tokens that the request may run: prompt and answer."""
        return self.request.max_tokens


@dataclass
class Holdings:
    """What the running requests of one caller hold. `rows`: how many of them hold each row."""

    slots: int = 0
    capture: float = 0
    rows: Counter[Key] = field(default_factory=Counter)
    places: Counter[int] = field(default_factory=Counter)


class Admission:
    """The queues of requests that wait for the bank or for vLLM: one for each caller.

    Callers take turns, by the tokens that their requests may run (`Turns`). Within a queue requests are admitted in
    order of arrival, except that one which fits the bank may bypass those which do not. Of those that do not fit, the
    one that has waited longest is bypassed at most MAX_BYPASSES times: then nothing else enters the bank, and it is
    next. So a request at position p of them is admitted after at most (p + 1) * (MAX_BYPASSES + 1) others that need
    the bank, whatever they are.

    `limit`: choices that may wait, here or in vLLM's own queue; where they are more, the last one of the longest queue
    is refused. `running`: choices that vLLM runs at once. `caller_share`: of slots, capture tokens and a site's row
    places; a caller gets no more than this while another waits. `max_wait_s`: seconds that a request may wait; None:
    no bound. `policy_rows`: row places of each site that only policies use.
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
        # By caller and handle, in order of arrival.
        self.queues: dict[str, dict[int, Waiter]] = {}
        self.turns = Turns()
        # Of those that did not fit the bank when room became free, the one that had waited longest.
        self.first: Waiter | None = None
        self.callers: dict[int, str] = {}
        # Rows of each admitted request that count for its caller: those that were not reserved when it was admitted.
        self.counted: dict[int, tuple[Key, ...]] = {}
        self.holdings: dict[str, Holdings] = {}
        self.set_reservations({})

    @property
    def waiting(self) -> int:
        """Choices that wait here."""
        return sum(map(len, self.queues.values()))

    @property
    def queued(self) -> int:
        """Choices that wait: here, or in vLLM for a place in its batch."""
        return self.waiting + self.queued_in_engine

    @property
    def queued_in_engine(self) -> int:
        """Choices that vLLM has beyond what it runs at once."""
        admitted = len(self.callers)
        return int(admitted - min(self.running, admitted))

    @property
    def room_in_engine(self) -> bool:
        """Whether vLLM may be given one more choice."""
        ahead = max(1, int(AHEAD * self.running)) if self.running < inf else 0
        return len(self.callers) < self.running + ahead

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
        """Wait until bank and engine have room. Raises QueueFull if too many wait or this one has waited too long, and
        the error of `fail`.
        """
        waiter = Waiter(handle, request, caller, ordered_rows(request), asyncio.get_running_loop().create_future())
        if self.room_in_engine and (not waiter.needs_bank or (not self.queues and self.lacking(waiter) is None)):
            self.lease(waiter)
            return
        full = self.queued >= self.limit
        self.enqueue(waiter)
        self.admit()
        if full and self.waits(waiter):
            self.refuse_last(waiter)
        await self.wait(waiter)

    async def wait(self, waiter: Waiter) -> None:
        """Wait for admission. Whoever stops waiting leaves no lease behind, and lets those behind it in."""
        try:
            async with asyncio.timeout(self.max_wait_s):
                await waiter.future
        except BaseException as error:
            resource = self.lacking(waiter) or "queue"
            if self.waits(waiter):
                self.dequeue(waiter)
                self.admit()
            else:
                self.release(waiter.handle)
            if isinstance(error, TimeoutError):
                raise self.queue_full(resource, f"none became free within {self.max_wait_s:g} s") from None
            raise

    def waits(self, waiter: Waiter) -> bool:
        """Return whether a request waits."""
        return waiter.handle in self.queues.get(waiter.caller, ())

    def lacking(self, waiter: Waiter) -> str | None:
        """Return the first resource of the bank of which a request needs more than is free, if any."""
        return self.ledger.insufficient(waiter.request, waiter.keys)

    def refuse_last(self, newcomer: Waiter) -> None:
        """Refuse the last one of the longest queue; of queues of one length, the newcomer's."""
        most = max(map(len, self.queues.values()))
        longest = self.queues[newcomer.caller]
        if len(longest) < most:
            longest = next(queue for queue in self.queues.values() if len(queue) == most)
        last = longest[next(reversed(longest))]
        self.dequeue(last)
        resolve(last.future, self.queue_full(self.lacking(last) or "queue"))

    def queue_full(self, resource: str, *problem: str) -> QueueFull:
        """Return a QueueFull with a time to retry that grows with the queue."""
        return QueueFull(resource, 1.0 + 0.05 * self.queued, *problem)

    def enqueue(self, waiter: Waiter) -> None:
        """Append a request to its caller's queue."""
        self.queues.setdefault(waiter.caller, {})[waiter.handle] = waiter
        self.turns.join(waiter.caller)

    def dequeue(self, waiter: Waiter) -> None:
        """Remove a request from its caller's queue."""
        queue = self.queues[waiter.caller]
        del queue[waiter.handle]
        self.first = None if waiter is self.first else self.first
        if not queue:
            del self.queues[waiter.caller]
            self.turns.leave(waiter.caller)

    def admit(self) -> None:
        """Admit waiting requests while one fits; see the class for their order."""
        while self.queues and self.room_in_engine:
            self.first = self.first or min(self.blocked(), key=lambda waiter: waiter.handle, default=None)
            waiter = self.next()
            if waiter is None:
                return
            if self.first and waiter.needs_bank:
                self.first.bypassed += 1
            self.dequeue(waiter)
            self.lease(waiter)
            resolve(waiter.future)

    def next(self) -> Waiter | None:
        """Return the request to be admitted next, and charge its caller; None if none fits."""
        first = self.first if self.first and self.first.bypassed >= MAX_BYPASSES else None
        barred = first is not None and self.lacking(first) is not None
        if first is not None and not barred and not first.future.done() and not self.over_share(first):
            self.turns.charge(first.caller, first.cost)
            return first
        fitting = {caller: waiter for caller in self.queues if (waiter := self.first_fitting(caller, barred))}
        if not fitting:
            return None
        return fitting[self.turns.next({caller: waiter.cost for caller, waiter in fitting.items()})]

    def blocked(self) -> Iterator[Waiter]:
        """Yield, for each caller, the request that has waited longest of those that do not fit the bank."""
        for queue in self.queues.values():
            examined = islice(queue.values(), LOOKAHEAD)
            yield from islice((waiter for waiter in examined if self.lacking(waiter) is not None), 1)

    def first_fitting(self, caller: str, barred: bool) -> Waiter | None:
        """Return the first request of a caller that fits the bank; with `barred`, the first that does not need it.

        One that only its caller's share holds back holds back those of its caller behind it that need the bank.
        """
        examined = 0
        for waiter in self.queues[caller].values():
            if waiter.future.done():
                # Cancelled, and about to leave the queue.
                continue
            if not waiter.needs_bank:
                return waiter
            if barred or examined >= LOOKAHEAD:
                continue
            examined += 1
            if self.lacking(waiter) is None:
                if not self.over_share(waiter):
                    return waiter
                barred = True
        return None

    def over_share(self, waiter: Waiter) -> bool:
        """Return whether another caller waits and this request would bring its own beyond its share.

        A request that is larger than the share runs alone: a caller that holds nothing is never over it.
        """
        others = len(self.queues) - (waiter.caller in self.queues)
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

    def lease(self, waiter: Waiter) -> None:
        """Lease what a request needs, which is free, and note it for its caller."""
        handle, request, caller = waiter.handle, waiter.request, waiter.caller
        self.ledger.acquire(handle, request)
        self.callers[handle] = caller
        self.counted[handle] = tuple(key for key in waiter.keys if key not in self.reserved)
        if waiter.needs_bank:
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
        reserved = self.reserved_rows
        rows = [
            SiteUsage(site, used, layout.rows - used, len(reserved.get(number, ())))
            for number, site in enumerate(layout.sites)
            for used in [ledger.rows_used(number)]
        ]
        slots_used = ledger.slots_used
        queued_in_engine = self.queued_in_engine
        return BankUsage(
            rows=rows,
            slots_used=slots_used,
            slots_free=layout.slots - slots_used,
            running_choices=len(self.callers) - queued_in_engine,
            waiting_choices=self.waiting + queued_in_engine,
            max_running=self.running,
            max_waiting=self.limit,
        )

    def fail(self, error: Exception) -> None:
        """Raise `error` in every waiting `acquire`."""
        for waiter in [waiter for queue in self.queues.values() for waiter in queue.values()]:
            self.dequeue(waiter)
            resolve(waiter.future, error)


def resolve(future: "asyncio.Future[None]", error: Exception | None = None) -> None:
    """Wake a waiter. A waiter that is cancelled but has not run yet releases its lease itself, in `acquire`."""
    if future.done():
        return
    if error:
        future.set_exception(error)
    else:
        future.set_result(None)
