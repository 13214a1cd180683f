"""Requests that wait for the bank are admitted in order, fail together, and leave no lease behind."""

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rudder.server.engine.admission import MAX_BYPASSES, Admission, QueueFull
from rudder.server.engine.ledger import PINNED_HANDLE, BankFull, Ledger
from rudder.server.engine.turns import QUANTUM
from rudder.server.program import wire
from rudder.server.program.errors import ProgramError
from rudder.server.program.layout import Layout
from rudder.server.program.rows import Registry, check_capacity

SITE = "layers.0.resid_post"


def request_of(number: int) -> wire.Request:
    """Build a request that needs both row places of the bank, with latents of its own."""
    rows = wire.Row("toy", 2 * number), wire.Row("toy", 2 * number + 1)
    return wire.Request(1, 4, True, ((wire.Site(0, rows, (wire.Edit(0, shift=1.0),)),),))


async def full_bank(waiting: int) -> tuple[Admission, list["asyncio.Task[None]"]]:
    """Fill a bank with request 0; return its admission and the tasks that wait."""
    admission = Admission(Layout((SITE,), rows=2, slots=4), limit=8)
    await admission.acquire(0, request_of(0))
    tasks = [asyncio.create_task(admission.acquire(number, request_of(number))) for number in range(1, 1 + waiting)]
    await asyncio.sleep(0)
    assert admission.waiting == waiting
    return admission, tasks


async def test_waiter_cancelled_as_it_is_admitted_releases_its_lease() -> None:
    admission, (first, second) = await full_bank(2)
    first.cancel()
    admission.release(0)
    await asyncio.wait_for(second, 1)
    assert first.cancelled()
    admission.release(2)
    assert (admission.ledger.rows_used(0), admission.ledger.slots_used, admission.waiting) == (0, 0, 0)


async def test_fail_raises_in_every_waiter() -> None:
    admission, tasks = await full_bank(3)
    tasks[1].cancel()
    admission.fail(RuntimeError("telemetry is lost"))
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 1)
    assert [type(error) for error in results] == [RuntimeError, asyncio.CancelledError, RuntimeError]
    admission.release(0)
    assert (admission.ledger.rows_used(0), admission.ledger.slots_used, admission.waiting) == (0, 0, 0)


@pytest.mark.parametrize("cancelled", [1, 2])
async def test_cancelled_waiter_leaves_the_queue(cancelled: int) -> None:
    admission, tasks = await full_bank(2)
    tasks[cancelled - 1].cancel()
    await asyncio.sleep(0)
    admission.release(0)
    await asyncio.wait_for(tasks[2 - cancelled], 1)
    assert not admission.waiting


def needing(rows: int, first: int, edits: bool = True) -> wire.Request:
    """Build a request that needs so many rows, from latent `first` on."""
    latents = tuple(wire.Row("toy", first + i) for i in range(rows))
    return wire.Request(1, 4, True, ((wire.Site(0, latents, (wire.Edit(0, shift=1.0),) if edits else ()),),))


def admission_of(**rules: Any) -> Admission:
    return Admission(Layout((SITE,), rows=8, slots=6), **{"limit": 64} | rules)


def begin(admission: Admission, handle: int, request: wire.Request, caller: str = "a") -> "asyncio.Task[None]":
    return asyncio.create_task(admission.acquire(handle, request, caller))


def assert_empty(admission: Admission) -> None:
    ledger = admission.ledger
    assert (ledger.rows_used(0), ledger.slots_used, ledger.leases, ledger.held) == (0, 0, {}, {})
    assert (admission.queues, admission.turns.deficits, admission.callers, admission.holdings) == ({}, {}, {}, {})
    assert (admission.queued, admission.usage().running_choices) == (0, 0)


async def settle() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


async def test_waiter_behind_a_cancelled_head_is_admitted() -> None:
    admission = admission_of()
    await admission.acquire(1, needing(6, 0))
    head, behind = begin(admission, 2, needing(8, 10)), begin(admission, 3, needing(2, 20))
    await settle()
    head.cancel()
    await asyncio.wait_for(behind, 1)
    admission.release(1)
    admission.release(3)
    assert_empty(admission)


async def test_small_request_bypasses_a_large_one_that_does_not_fit() -> None:
    admission = admission_of()
    await admission.acquire(1, needing(6, 0))
    large = begin(admission, 2, needing(8, 10))
    await settle()
    await asyncio.wait_for(admission.acquire(3, needing(1, 30), "b"), 1)
    assert not large.done()
    admission.release(1)
    admission.release(3)
    await asyncio.wait_for(large, 1)


async def test_large_request_is_not_starved_by_small_ones() -> None:
    admission = admission_of()
    await admission.acquire(1, needing(1, 0))
    large = begin(admission, 2, needing(8, 10), "large")
    await settle()
    running, handle = [1], 3
    while not large.done():
        waiter = begin(admission, handle, needing(1, 100 + handle), "small")
        await settle()
        if waiter.done():
            running.append(handle)
        handle += 1
        admission.release(running.pop(0))
        await settle()
        assert handle < 3 + 2 * (MAX_BYPASSES + 1)


async def test_caller_gets_no_more_than_its_share_while_another_waits() -> None:
    admission = admission_of(caller_share=0.5)
    for handle in range(1, 5):
        await admission.acquire(handle, needing(2, 10 * handle), "a")
    others = [begin(admission, 10 + i, needing(2, 100 + 10 * i), caller) for i, caller in enumerate("aaaab")]
    await settle()
    assert not any(other.done() for other in others)
    # What `a` releases goes to `b`, though `a` has waited longer: `a` still holds more than its half.
    admission.release(1)
    await settle()
    assert [other.done() for other in others] == [False] * 4 + [True]
    # Nobody else waits any more: `a` may have everything.
    admission.release(2)
    await settle()
    assert [other.done() for other in others] == [True, False, False, False, True]


async def test_share_is_of_slots_too() -> None:
    admission = admission_of(caller_share=0.5)
    request = needing(1, 0)
    for handle in range(1, 7):
        await admission.acquire(handle, request, "a")
    waiting = [begin(admission, 10, request, "a"), begin(admission, 11, request, "b")]
    await settle()
    admission.release(1)
    await settle()
    assert [waiter.done() for waiter in waiting] == [False, True]


async def test_request_larger_than_the_share_runs_when_its_caller_holds_nothing() -> None:
    admission = admission_of(caller_share=0.25)
    await admission.acquire(1, needing(8, 0), "b")
    large, small = begin(admission, 2, needing(8, 20), "a"), begin(admission, 3, needing(1, 50), "b")
    await settle()
    admission.release(1)
    await asyncio.wait_for(large, 1)
    admission.release(2)
    await asyncio.wait_for(small, 1)


async def test_wait_is_bounded_and_says_when_to_retry() -> None:
    admission = admission_of(max_wait_s=0.05)
    await admission.acquire(1, needing(8, 0))
    for request, resource in ((needing(1, 9), "rows"), (needing(2, 90), "rows")):
        with pytest.raises(QueueFull, match="none became free within") as caught:
            await admission.acquire(2, request)
        assert (caught.value.resource, caught.value.retry_after_s >= 1) == (resource, True)
    admission.release(1)
    assert_empty(admission)


async def test_waiter_behind_one_that_gave_up_is_admitted() -> None:
    admission = admission_of(max_wait_s=0.4)
    await admission.acquire(1, needing(4, 0))
    ended: list[str] = []
    first = begin(admission, 2, needing(8, 10))
    first.add_done_callback(lambda _: ended.append("first"))
    await settle()
    for _ in range(MAX_BYPASSES):
        await admission.acquire(3, needing(1, 60))
        admission.release(3)
    admission.max_wait_s = 60.0
    barred = begin(admission, 4, needing(1, 70))
    barred.add_done_callback(lambda _: ended.append("barred"))
    with pytest.raises(QueueFull):
        await first
    await asyncio.wait_for(barred, 10)
    await settle()
    assert ended == ["first", "barred"]


PLAIN = wire.Request(1, 4, True)


@pytest.mark.parametrize("request_", [PLAIN, needing(1, 0), needing(2, 0, edits=False)])
async def test_choices_beyond_what_the_engine_runs_are_queued_and_bounded(request_: wire.Request) -> None:
    admission = Admission(Layout((SITE,), rows=8, slots=64), limit=5, running=3)
    tasks = [begin(admission, handle, request_) for handle in range(1, 9)]
    await settle()
    usage = admission.usage()
    assert (usage.running_choices, usage.waiting_choices) == (3, 5)
    # One more than the engine runs, to take a place that becomes free at once.
    assert [task.done() for task in tasks] == [True] * 4 + [False] * 4
    for handle in (9, 10):
        with pytest.raises(QueueFull) as caught:
            await admission.acquire(handle, PLAIN, "a")
        assert (caught.value.resource, caught.value.retry_after_s >= 1) == ("queue", True)
    admission.release(1)
    last = begin(admission, 11, PLAIN)
    for handle in [*range(2, 9), 11]:
        await settle()
        admission.release(handle)
    await asyncio.gather(*tasks, last)
    assert_empty(admission)


async def test_choices_that_wait_for_the_bank_and_for_the_engine_are_counted_together() -> None:
    admission = Admission(Layout((SITE,), rows=8, slots=64), limit=3, running=2)
    for handle, request in enumerate([needing(8, 0), PLAIN, PLAIN], 1):
        await admission.acquire(handle, request)
    waiting = [begin(admission, 4, PLAIN), begin(admission, 5, needing(1, 20))]
    await settle()
    assert (admission.queued, admission.usage().waiting_choices, admission.usage().running_choices) == (3, 3, 2)
    for request in (needing(1, 30), PLAIN):
        with pytest.raises(QueueFull):
            await admission.acquire(6, request, "a")
    admission.release(1)
    admission.release(2)
    await asyncio.wait_for(asyncio.gather(*waiting), 1)


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("arrive"), st.integers(0, 8), st.integers(0, 12), st.sampled_from("abc"), st.booleans()),
        st.tuples(st.just("release"), st.integers(0, 50)),
        st.tuples(st.just("cancel"), st.integers(0, 50)),
        st.tuples(st.just("settle"), st.integers(0, 2)),
    ),
    max_size=80,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(EVENTS, st.sampled_from([0.25, 0.5, 1.0]), st.integers(1, 12))
async def test_any_arrivals_and_cancellations(events: list[Any], share: float, running: int) -> None:
    """No lease leaks, the worker's ledger never overflows, nobody waits while it fits, and bypasses are bounded."""
    admission = admission_of(caller_share=share, running=running, limit=20)
    worker = Ledger(admission.ledger.layout)
    admission.reserve(0, needing(1, 1000, edits=False))
    worker.acquire(0, needing(1, 1000, edits=False))
    tasks: dict[int, asyncio.Task[None]] = {}
    requests: dict[int, wire.Request] = {}
    mirrored: set[int] = set()

    async def mirror() -> None:
        for handle in [h for h in admission.callers if h not in mirrored]:
            assert worker.acquire(handle, requests[handle]).places == admission.ledger.leases[handle][1].places
            mirrored.add(handle)

    def release(handle: int) -> None:
        if handle in mirrored:
            mirrored.remove(handle)
            worker.release(handle)
        admission.release(handle)

    async def check() -> None:
        await mirror()
        assert admission.queued <= 20
        assert all(admission.queues.values())
        assert set(admission.turns.deficits) == set(admission.queues)
        waiting = [waiter for queue in admission.queues.values() for waiter in queue.values()]
        first = min(waiting, key=lambda waiter: waiter.handle, default=None)
        if first and admission.room_in_engine:
            assert admission.lacking(first) or admission.over_share(first)
        assert all(waiter.bypassed <= MAX_BYPASSES for waiter in waiting)

    for number, (kind, *values) in enumerate(events, 1):
        if kind == "arrive":
            rows, first, caller, edits = values
            requests[number] = needing(min(rows, 7), first, edits and rows > 0)
            tasks[number] = begin(admission, number, requests[number], caller)
        elif kind == "settle":
            for _ in range(values[0]):
                await asyncio.sleep(0)
        else:
            pool = sorted(admission.callers) if kind == "release" else [h for h in tasks if not tasks[h].done()]
            if pool and kind == "release":
                release(pool[values[0] % len(pool)])
            elif pool:
                tasks[pool[values[0] % len(pool)]].cancel()
        if kind != "cancel":
            await settle()
            await check()
    await settle()
    for _ in range(len(events) + 1):
        await check()
        for handle in sorted(admission.callers):
            release(handle)
            await settle()
            await mirror()
    results = await asyncio.gather(*tasks.values(), return_exceptions=True)
    assert all(r is None or isinstance(r, QueueFull | asyncio.CancelledError) for r in results)
    admission.ledger.release(0)
    assert_empty(admission)


def rows_of(*latents: int) -> wire.Request:
    """Hold these latents, as a reservation or as a report."""
    return wire.Request(0, 4, True, ((wire.Site(0, tuple(wire.Row("toy", latent) for latent in latents)),),))


async def test_reservations_may_come_and_go_while_a_caller_holds_their_rows() -> None:
    admission = Admission(Layout((SITE,), rows=8, slots=4), limit=8)
    await admission.acquire(1, rows_of(1, 2), "a")
    admission.reserve(-1, rows_of(2, 3))
    await admission.acquire(2, rows_of(2, 3, 4), "a")
    assert admission.reserved_rows == {0: {wire.Row("toy", 2), wire.Row("toy", 3)}}
    # What was reserved when a request was admitted does not count for its caller.
    assert admission.holdings["a"].places[0] == 3
    admission.unreserve(-1)
    assert (admission.reserved_rows, admission.ledger.rows_used(0)) == ({}, 4)
    admission.release(2)
    assert admission.holdings["a"].places[0] == 2
    admission.release(1)
    assert (admission.holdings, admission.ledger.rows_used(0), admission.counted) == ({}, 0, {})


async def test_room_that_a_reservation_leaves_admits_who_waits() -> None:
    admission = Admission(Layout((SITE,), rows=2, slots=4), limit=8)
    admission.reserve(-1, rows_of(1, 2))
    waiting = asyncio.create_task(admission.acquire(1, rows_of(3), "a"))
    await asyncio.sleep(0)
    assert admission.waiting
    admission.unreserve(-1)
    await asyncio.wait_for(waiting, 1)


def sized(tokens: int) -> wire.Request:
    """Build a request without a program that may run so many tokens."""
    return wire.Request(1, tokens, True)


async def admitted_order(admission: Admission, arrivals: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Let requests (caller, tokens) arrive while one runs; return the order in which they run, one at a time."""
    await admission.acquire(0, PLAIN, "running")
    await admission.acquire(1, PLAIN, "ahead")
    tasks = {i: begin(admission, i, sized(tokens), caller) for i, (caller, tokens) in enumerate(arrivals, 2)}
    await settle()
    admission.release(1)
    order: list[tuple[str, int]] = []
    running = 0
    while tasks:
        await settle()
        (done,) = (handle for handle, task in tasks.items() if task.done())
        order.append(arrivals[done - 2])
        del tasks[done]
        admission.release(running)
        running = done
    admission.release(running)
    assert_empty(admission)
    return order


async def test_a_caller_with_few_requests_does_not_wait_for_the_many_of_another() -> None:
    admission = Admission(Layout((SITE,), rows=8, slots=64), limit=2000, running=1)
    flood = [("many", 100)] * 1000 + [("few", 100)] * 2
    order = await admitted_order(admission, flood)
    assert [at for at, (caller, _) in enumerate(order) if caller == "few"] <= [6, 8]


async def test_callers_share_the_engine_by_tokens_and_not_by_requests() -> None:
    admission = Admission(Layout((SITE,), rows=8, slots=64), limit=2000, running=1)
    order = await admitted_order(admission, [("short", 20)] * 300 + [("long", 600)] * 10)
    ran = {"short": 0, "long": 0}
    for caller, tokens in order:
        ran[caller] += tokens
        if ran["short"] < 6000 and ran["long"] < 6000:
            assert abs(ran["short"] - ran["long"]) <= 600 + 2 * QUANTUM


async def test_a_full_queue_refuses_whoever_has_most_in_it() -> None:
    admission = Admission(Layout((SITE,), rows=8, slots=64), limit=5, running=1)
    flood = [begin(admission, handle, PLAIN, "many") for handle in range(6)]
    await settle()
    assert admission.queued == 5
    few = begin(admission, 6, PLAIN, "few")
    await settle()
    with pytest.raises(QueueFull):
        await asyncio.wait_for(flood[5], 5)
    assert not few.done()
    for handle in range(5):
        admission.release(handle)
        await settle()
    assert few.done()
    admission.release(6)
    await asyncio.gather(*flood[:5], few)
    assert_empty(admission)


async def test_deadline_that_passes_in_the_queue_ends_the_wait_and_leaves_nothing() -> None:
    admission = Admission(Layout((SITE,), rows=8, slots=64), limit=5, running=1)
    for handle in range(2):
        await admission.acquire(handle, PLAIN)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await admission.acquire(2, PLAIN, "late")
    for handle in range(2):
        admission.release(handle)
    assert_empty(admission)


async def test_what_needs_no_bank_passes_those_that_wait_for_it() -> None:
    admission = Admission(Layout((SITE,), rows=8, slots=64), limit=64, running=8)
    await admission.acquire(1, needing(8, 0), "a")
    blocked = [begin(admission, handle, needing(8, 10 * handle), "a") for handle in range(2, 40)]
    await settle()
    for handle in range(50, 50 + 2 * MAX_BYPASSES):
        await asyncio.wait_for(admission.acquire(handle, PLAIN, "a"), 1)
        admission.release(handle)
    assert not any(task.done() for task in blocked)
    admission.fail(RuntimeError("end"))
    await asyncio.gather(*blocked, return_exceptions=True)


async def test_places_that_policies_keep_are_theirs_however_full_the_bank_is() -> None:
    layout = Layout((SITE,), rows=10, slots=8)
    admission = Admission(layout, limit=8, max_wait_s=0.01, policy_rows=4)
    await admission.acquire(1, needing(6, 0))
    with pytest.raises(QueueFull, match="rows"):
        await admission.acquire(2, needing(1, 50))
    # One policy, and then its next version beside it.
    admission.reserve(-1, needing(2, 100, edits=False))
    admission.reserve(-2, needing(2, 200, edits=False))
    with pytest.raises(BankFull):
        admission.reserve(-3, needing(1, 300, edits=False))
    admission.unreserve(-1)
    with pytest.raises(QueueFull, match="rows"):
        await admission.acquire(3, needing(1, 50))
    admission.release(1)
    await admission.acquire(4, needing(6, 60))
    # Rows of pinned features are none of a policy's.
    admission.release(4)
    admission.reserve(PINNED_HANDLE, needing(3, 400, edits=False))
    assert admission.ledger.kept == {0: 2}
    assert admission.shared_places(0) == 10 - 5 - 2


def test_request_that_needs_what_policies_keep_is_refused_at_once() -> None:
    registry = Registry(Layout((SITE,), rows=10, slots=8), 8, {})
    sites = needing(7, 0).stages
    check_capacity(sites, registry, "steering")
    with pytest.raises(ProgramError, match=r"7 distinct rows at .*, which has 6 places"):
        check_capacity(sites, registry, "steering", kept={0: 4})
