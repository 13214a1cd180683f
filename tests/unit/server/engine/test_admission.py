"""Who waits for the bank is let in in order, told when there is no use in waiting, and leaves nothing behind."""

import asyncio

import pytest

from rudder.server.engine.admission import Admission
from rudder.server.program import wire
from rudder.server.program.layout import Layout

SITE = "layers.0.resid_post"


def asks(number: int) -> wire.Request:
    """A request for both of the bank's row places, with latents of its own."""
    rows = wire.Row("toy", 2 * number), wire.Row("toy", 2 * number + 1)
    return wire.Request(1, 4, True, ((wire.Site(0, rows, (wire.Edit(0, shift=1.0),)),),))


async def full(waiting: int) -> tuple[Admission, list["asyncio.Task[None]"]]:
    """A bank that request 0 fills, and those that wait for it."""
    admission = Admission(Layout((SITE,), rows=2, slots=4), bound=8)
    await admission.acquire(0, asks(0))
    tasks = [asyncio.create_task(admission.acquire(number, asks(number))) for number in range(1, 1 + waiting)]
    await asyncio.sleep(0)
    assert len(admission.waiting) == waiting
    return admission, tasks


async def test_one_that_is_cancelled_in_the_moment_it_is_let_in_gives_its_places_to_the_next() -> None:
    admission, (first, second) = await full(2)
    first.cancel()
    admission.release(0)
    await asyncio.wait_for(second, 1)
    assert first.cancelled()
    admission.release(2)
    assert (admission.ledger.rows_used(0), admission.ledger.slots_used, len(admission.waiting)) == (0, 0, 0)


async def test_all_who_wait_are_told_when_nobody_will_be_let_in() -> None:
    admission, tasks = await full(3)
    tasks[1].cancel()
    admission.fail(RuntimeError("telemetry is lost"))
    found = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 1)
    assert [type(error) for error in found] == [RuntimeError, asyncio.CancelledError, RuntimeError]
    admission.release(0)
    assert (admission.ledger.rows_used(0), admission.ledger.slots_used, len(admission.waiting)) == (0, 0, 0)


@pytest.mark.parametrize("gone", [1, 2])
async def test_one_that_goes_while_it_waits_leaves_the_line(gone: int) -> None:
    admission, tasks = await full(2)
    tasks[gone - 1].cancel()
    await asyncio.sleep(0)
    admission.release(0)
    await asyncio.wait_for(tasks[2 - gone], 1)
    assert not admission.waiting
