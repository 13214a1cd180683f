"""Bytes of every kind on the wire of the shared server, and what a fuzz run must find where it is planted."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from tests.e2e.conftest import Running
from tests.fuzz import wire
from tests.fuzz.cases import drawn

pytestmark = pytest.mark.e2e
KNOWN: dict[str, Sequence[Any]] = {
    "site": ["layers.2.resid_post"], "max_tokens": [1, 2], "n": [1, 2], "index": [7, 100], "role": ["user"],
}  # fmt: skip


async def test_wire_mutations_leave_the_server_as_it_was(server: Running) -> None:
    """Statuses without a fault of the server, its probe's tokens equal, health SERVING, ledger at zero."""
    result = await asyncio.wait_for(wire.run(server.address, drawn(11, 300, KNOWN)), 300)
    assert result.crashes == []
    assert not any(result.held.values())
    assert set(result.outcomes) >= {"OK", "INVALID_ARGUMENT", "NOT_FOUND"}
