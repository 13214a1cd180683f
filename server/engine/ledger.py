"""Who holds which row places and slots. The worker fills the bank by it; the server's admission mirrors it."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from rudder.server.program import wire
from rudder.server.program.layout import Layout

Key = tuple[int, wire.Row]


class BankFull(Exception):
    """A request does not fit now. `resource` is `rows`, `slots` or `capture_tokens`."""

    def __init__(self, resource: str) -> None:
        super().__init__(f"the bank has no free {resource}")
        self.resource = resource


@dataclass(frozen=True)
class Lease:
    """What one request holds: its slot (0: none), the place of each of its rows, and those to be filled first."""

    slot: int
    places: dict[Key, int]
    fresh: tuple[Key, ...]


class Ledger:
    """Reference-counted row places per site and slots. Lowest free place first, so that all ranks agree."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.free_slots = list(range(1, layout.slots + 1))
        self.free_rows = [list(range(layout.rows)) for _ in layout.sites]
        self.held: dict[Key, list[int]] = {}
        self.leases: dict[int, tuple[wire.Request, Lease]] = {}
        self.capture_free = layout.capture_tokens or inf

    def lacking(self, request: wire.Request) -> str | None:
        """The first resource that does not suffice for `request`, if any."""
        return self.lacking_for(request, [key for key in ordered_rows(request) if key not in self.held])

    def lacking_for(self, request: wire.Request, fresh: Sequence[Key]) -> str | None:
        """`lacking`, of a request for which the rows `fresh` are not held yet."""
        if request.edits and not self.free_slots:
            return "slots"
        if request.reads and self.capture_cost(request) > self.capture_free:
            return "capture_tokens"
        sites = [site for site, _ in fresh]
        if any(sites.count(site) > len(self.free_rows[site]) for site in set(sites)):
            return "rows"
        return None

    def capture_cost(self, request: wire.Request) -> float:
        """Tokens of one step that may have to be captured: a preempted request recomputes everything."""
        return min(request.max_tokens, self.layout.capture_tokens or inf)

    def acquire(self, handle: int, request: wire.Request) -> Lease:
        """Give `request` its slot and places. Raises BankFull and changes nothing when something lacks."""
        lease = self.enter(handle, request)
        if isinstance(lease, str):
            raise BankFull(lease)
        return lease

    def enter(self, handle: int, request: wire.Request) -> Lease | str:
        """`acquire`, or the first resource that does not suffice."""
        keys = ordered_rows(request)
        fresh = tuple(key for key in keys if key not in self.held)
        if resource := self.lacking_for(request, fresh):
            return resource
        if request.reads:
            self.capture_free -= self.capture_cost(request)
        slot = heapq.heappop(self.free_slots) if request.edits else 0
        for key in fresh:
            self.held[key] = [heapq.heappop(self.free_rows[key[0]]), 0]
        places = {}
        for key in keys:
            held = self.held[key]
            held[1] += 1
            places[key] = held[0]
        lease = Lease(slot, places, fresh)
        self.leases[handle] = request, lease
        return lease

    def release(self, handle: int) -> Lease | None:
        """Take back what `handle` holds; None when it holds nothing."""
        request, lease = self.leases.pop(handle, (None, None))
        if request is None or lease is None:
            return None
        if request.reads:
            self.capture_free += self.capture_cost(request)
        if lease.slot:
            heapq.heappush(self.free_slots, lease.slot)
        for key in lease.places:
            held = self.held[key]
            held[1] -= 1
            if held[1] == 0:
                heapq.heappush(self.free_rows[key[0]], self.held.pop(key)[0])
        return lease

    def extent(self, site: int) -> int:
        """One more than the highest row place held at site number `site`."""
        free = set(self.free_rows[site])
        return next((place + 1 for place in reversed(range(self.layout.rows)) if place not in free), 0)

    @property
    def slots_used(self) -> int:
        """Slots held now."""
        return self.layout.slots - len(self.free_slots)

    def rows_used(self, site: int) -> int:
        """Row places held now at site number `site`."""
        return self.layout.rows - len(self.free_rows[site])


def ordered_rows(request: wire.Request) -> list[Key]:
    """The request's distinct (site, row) pairs in the order the program names them: the same on every rank."""
    pairs = [(site.site, row) for stage in request.stages for site in stage for row in site.rows]
    return list(dict.fromkeys(pairs))
