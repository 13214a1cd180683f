"""The ledger: no overflow, everything is released, and the server's ledger agrees with the worker's."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rudder.server.engine.ledger import BankFull, Lease, Ledger
from rudder.server.program import wire
from rudder.server.program.layout import Layout

LAYOUT = Layout(("layers.0.resid_post", "layers.1.resid_post"), rows=5, slots=3, capture_tokens=10)
seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=60, deadline=None, derandomize=True)


def random_request(rng: Random) -> wire.Request:
    """Build a request for up to four of eight latents at each of some sites, with edits, watched rows or reads."""
    sites = []
    for number in rng.sample((0, 1), rng.randint(0, 2)):
        rows = tuple(wire.Row("toy", i) for i in rng.sample(range(8), rng.randint(1, 4)))
        edits = (wire.Edit(0, shift=1.0),) if rng.random() < 0.7 else ()
        sites.append(wire.Site(number, rows, edits, watch=(0,)))
    return wire.Request(1, rng.randint(1, 12), True, (tuple(sites),), top_k=rng.choice((0, 0, 3)))


def latents(*numbers: int, site: int = 0, edit: bool = True) -> wire.Request:
    """Build a request for these latents."""
    rows = tuple(wire.Row("toy", i) for i in numbers)
    edits = (wire.Edit(0, shift=1.0),) if edit else ()
    return wire.Request(1, 4, True, ((wire.Site(site, rows, edits, watch=(0,)),),))


def used(ledger: Ledger) -> tuple[int, int, int, float]:
    """Return the slots, row places and capture tokens in use."""
    return ledger.slots_used, ledger.rows_used(0), ledger.rows_used(1), ledger.capture_free


@quick
@given(seeds)
def test_usage_equals_that_of_the_held_requests(seed: int) -> None:
    rng, ledger, held = Random(seed), Ledger(LAYOUT), dict[int, wire.Request]()
    for handle in range(40):
        if held and rng.random() < 0.5:
            released = rng.choice(sorted(held))
            assert ledger.release(released)
            del held[released]
        request = random_request(rng)
        if ledger.insufficient(request):
            with pytest.raises(BankFull):
                ledger.acquire(handle, request)
        else:
            ledger.acquire(handle, request)
            held[handle] = request
        keys = {key for r in held.values() for key in r.rows()}
        rows = [sum(site == number for site, _ in keys) for number in (0, 1)]
        slots = sum(r.edits for r in held.values())
        reads = sum(min(r.max_tokens, 10) for r in held.values() if r.reads)
        assert used(ledger) == (slots, *rows, 10 - reads)
        assert max(rows) <= LAYOUT.rows
        assert slots <= LAYOUT.slots
        assert reads <= 10
    for handle in held:
        ledger.release(handle)
    assert used(ledger) == (0, 0, 0, 10)


@quick
@given(seeds)
def test_no_place_holds_two_rows(seed: int) -> None:
    rng, ledger = Random(seed), Ledger(LAYOUT)
    leases: dict[int, Lease] = {}
    for handle in range(30):
        if leases and rng.random() < 0.4:
            released = rng.choice(sorted(leases))
            ledger.release(released)
            del leases[released]
        request = random_request(rng)
        if not ledger.insufficient(request):
            leases[handle] = ledger.acquire(handle, request)
        slots = [lease.slot for lease in leases.values() if lease.slot]
        assert len(set(slots)) == len(slots)
        places = {((site, place), row) for lease in leases.values() for (site, row), place in lease.places.items()}
        assert len({place for place, _ in places}) == len(places)
        assert all(place < LAYOUT.rows for (_, place), _ in places)


@quick
@given(seeds)
def test_worker_never_overflows_behind_server_admission(seed: int) -> None:
    """The worker admits late and in another order, and releases before the server does."""
    rng, server, worker = Random(seed), Ledger(LAYOUT), Ledger(LAYOUT)
    sent: dict[int, wire.Request] = {}
    running: list[int] = []
    finished: list[int] = []
    for handle in range(60):
        request = random_request(rng)
        if not server.insufficient(request):
            server.acquire(handle, request)
            sent[handle] = request
        for started in rng.sample(sorted(sent), rng.randint(0, len(sent))):
            worker.acquire(started, sent.pop(started))
            running.append(started)
        for done in rng.sample(running, rng.randint(0, len(running))):
            worker.release(done)
            running.remove(done)
            finished.append(done)
        for reported in rng.sample(finished, rng.randint(0, len(finished))):
            server.release(reported)
            finished.remove(reported)
        if not sent and not finished:
            assert used(server) == used(worker)


@quick
@given(seeds)
def test_ranks_with_equal_input_agree(seed: int) -> None:
    rng = Random(seed)
    ranks, held = (Ledger(LAYOUT), Ledger(LAYOUT)), list[int]()
    for handle in range(30):
        if held and rng.random() < 0.5:
            released = held.pop(rng.randrange(len(held)))
            first, second = (rank.release(released) for rank in ranks)
            assert first == second
        request = wire.decode(wire.encode(random_request(rng)))
        if not ranks[0].insufficient(request):
            first, second = (rank.acquire(handle, request) for rank in ranks)
            assert first == second
            held.append(handle)


def test_lowest_free_place_is_used_and_shared_rows_are_filled_once() -> None:
    ledger = Ledger(LAYOUT)
    first = ledger.acquire(1, latents(7, 8))
    second = ledger.acquire(2, latents(8, 9))
    assert (first.slot, second.slot) == (1, 2)
    assert list(first.places.values()) == [0, 1]
    assert list(second.places.values()) == [1, 2]
    assert second.unfilled == ((0, wire.Row("toy", 9)),)
    ledger.release(1)
    third = ledger.acquire(3, latents(5))
    assert (third.slot, list(third.places.values())) == (1, [0])
    assert ledger.acquire(4, latents(8, edit=False)).unfilled == ()


def test_insufficient_resource_is_named_and_nothing_is_leased() -> None:
    ledger = Ledger(LAYOUT)
    reading = wire.Request(1, 11, True, top_k=1)
    ledger.acquire(0, reading)
    for handle, numbers in ((1, (0,)), (2, (1, 2))):
        ledger.acquire(handle, latents(*numbers))
    before = used(ledger)
    for request, resource in ((latents(5, 6, 7), "rows"), (reading, "capture_tokens")):
        with pytest.raises(BankFull, match=resource) as caught:
            ledger.acquire(9, request)
        assert caught.value.resource == resource
    ledger.acquire(3, latents(0))
    assert ledger.insufficient(latents(0)) == "slots"
    assert ledger.insufficient(latents(0, edit=False)) is None
    ledger.release(3)
    assert used(ledger) == before


def test_release_of_an_unknown_handle_changes_nothing() -> None:
    ledger = Ledger(LAYOUT)
    ledger.acquire(1, latents(0))
    assert ledger.release(2) is None
    assert ledger.release(1)
    assert ledger.release(1) is None
    assert used(ledger) == (0, 0, 0, 10)
