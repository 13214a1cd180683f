"""The ledger of row places and slots. The worker fills the bank by it; the server's admission mirrors it."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from types import MappingProxyType

from rudder.server.program import wire
from rudder.server.program.layout import Layout

Key = tuple[int, wire.Row]
# Handles of what is held without a request: of pinned features, and -1, -2, ... of policies. Requests begin at 1.
PINNED_HANDLE = 0
NOTHING_KEPT: Mapping[int, int] = MappingProxyType({})


class BankFull(Exception):
    """A request does not fit now. `resource` is `rows`, `slots` or `capture_tokens`."""

    def __init__(self, resource: str) -> None:
        super().__init__(f"the bank has no free {resource}")
        self.resource = resource


@dataclass(frozen=True)
class Lease:
    """What one request holds. `slot`: 0 without a program. `places`: of each row. `unfilled`: rows to load first."""

    slot: int
    places: dict[Key, int]
    unfilled: tuple[Key, ...]


@dataclass
class HeldRow:
    """The place of a row in use and the number of requests that hold it."""

    place: int
    holders: int = 0


class Ledger:
    """Slots, and reference-counted row places per site. The lowest free place goes first, so that all ranks agree.

    `kept`: free places, by site number, that requests leave for rows that are held without a request.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.free_slots = list(range(1, layout.slots + 1))
        self.free_rows = [list(range(layout.rows)) for _ in layout.sites]
        self.held: dict[Key, HeldRow] = {}
        self.leases: dict[int, tuple[wire.Request, Lease]] = {}
        self.capture_free = layout.capture_tokens or inf
        self.kept: Mapping[int, int] = {}

    def insufficient(self, request: wire.Request, keys: Sequence[Key] | None = None) -> str | None:
        """Return the first resource of which `request` needs more than is free for requests, if any.

        `keys`: its `ordered_rows`, where the caller has them.
        """
        rows = ordered_rows(request) if keys is None else keys
        return self.insufficient_with(request, [key for key in rows if key not in self.held], self.kept)

    def insufficient_with(self, request: wire.Request, unfilled: Sequence[Key], kept: Mapping[int, int]) -> str | None:
        """Implement `insufficient`; `unfilled`: the request's rows that nothing holds yet, `kept`: as of the ledger."""
        if request.edits and not self.free_slots:
            return "slots"
        if request.reads and self.capture_cost(request) > self.capture_free:
            return "capture_tokens"
        sites = [site for site, _ in unfilled]
        if any(sites.count(site) > len(self.free_rows[site]) - kept.get(site, 0) for site in set(sites)):
            return "rows"
        return None

    def capture_cost(self, request: wire.Request) -> float:
        """Return the tokens of one step that may be captured: a preempted request recomputes all of its tokens."""
        return min(request.max_tokens, self.layout.capture_tokens or inf)

    def acquire(self, handle: int, request: wire.Request) -> Lease:
        """Lease a slot and row places. Raises BankFull, and changes nothing, if a resource is insufficient."""
        lease = self.try_acquire(handle, request)
        if isinstance(lease, str):
            raise BankFull(lease)
        return lease

    def try_acquire(self, handle: int, request: wire.Request) -> Lease | str:
        """Like `acquire`, but return the resource that is insufficient instead of raising."""
        keys = ordered_rows(request)
        unfilled = tuple(key for key in keys if key not in self.held)
        if resource := self.insufficient_with(request, unfilled, NOTHING_KEPT):
            return resource
        if request.reads:
            self.capture_free -= self.capture_cost(request)
        slot = heapq.heappop(self.free_slots) if request.edits else 0
        for key in unfilled:
            site, _ = key
            self.held[key] = HeldRow(heapq.heappop(self.free_rows[site]))
        places = {}
        for key in keys:
            held = self.held[key]
            held.holders += 1
            places[key] = held.place
        lease = Lease(slot, places, unfilled)
        self.leases[handle] = request, lease
        return lease

    def release(self, handle: int) -> Lease | None:
        """Release the lease of `handle` and return it; None if it has none."""
        request, lease = self.leases.pop(handle, (None, None))
        if request is None or lease is None:
            return None
        if request.reads:
            self.capture_free += self.capture_cost(request)
        if lease.slot:
            heapq.heappush(self.free_slots, lease.slot)
        for key in lease.places:
            held = self.held[key]
            held.holders -= 1
            if held.holders == 0:
                site, _ = key
                del self.held[key]
                heapq.heappush(self.free_rows[site], held.place)
        return lease

    def extent(self, site: int) -> int:
        """Return one more than the highest row place in use at site number `site`; 0 if none is."""
        free = set(self.free_rows[site])
        return next((place + 1 for place in reversed(range(self.layout.rows)) if place not in free), 0)

    @property
    def capture_used(self) -> float:
        """Capture tokens in use; 0 where they are not bounded."""
        return self.layout.capture_tokens - self.capture_free if self.layout.capture_tokens else 0

    @property
    def slots_used(self) -> int:
        """Slots in use."""
        return self.layout.slots - len(self.free_slots)

    def rows_used(self, site: int) -> int:
        """Return the row places in use at site number `site`."""
        return self.layout.rows - len(self.free_rows[site])


def ordered_rows(request: wire.Request) -> list[Key]:
    """Return the request's distinct (site number, row) pairs in program order, which is the same on every rank."""
    pairs = [(site.site, row) for stage in request.stages for site in stage for row in site.rows]
    return list(dict.fromkeys(pairs))
