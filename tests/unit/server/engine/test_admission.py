"""Requests that wait for the bank are admitted in order, fail together, and leave no lease behind."""

import asyncio

import pytest

from rudder.server.engine.admission import Admission
from rudder.server.program import wire
from rudder.server.program.layout import Layout

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
    assert len(admission.waiting) == waiting
    return admission, tasks


async def test_waiter_cancelled_as_it_is_admitted_releases_its_lease() -> None:
    admission, (first, second) = await full_bank(2)
    first.cancel()
    admission.release(0)
    await asyncio.wait_for(second, 1)
    assert first.cancelled()
    admission.release(2)
    assert (admission.ledger.rows_used(0), admission.ledger.slots_used, len(admission.waiting)) == (0, 0, 0)


async def test_fail_raises_in_every_waiter() -> None:
    admission, tasks = await full_bank(3)
    tasks[1].cancel()
    admission.fail(RuntimeError("telemetry is lost"))
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 1)
    assert [type(error) for error in results] == [RuntimeError, asyncio.CancelledError, RuntimeError]
    admission.release(0)
    assert (admission.ledger.rows_used(0), admission.ledger.slots_used, len(admission.waiting)) == (0, 0, 0)


@pytest.mark.parametrize("cancelled", [1, 2])
async def test_cancelled_waiter_leaves_the_queue(cancelled: int) -> None:
    admission, tasks = await full_bank(2)
    tasks[cancelled - 1].cancel()
    await asyncio.sleep(0)
    admission.release(0)
    await asyncio.wait_for(tasks[2 - cancelled], 1)
    assert not admission.waiting
