"""Carry out all attacks, and report them."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from rudder.server.bench.redteam import engine, programs, prompts
from rudder.server.bench.redteam.attack import Attack, Result, carry_out
from rudder.server.bench.redteam.target import Target

ATTACKS: tuple[Attack, ...] = (*prompts.ATTACKS, *programs.ATTACKS, *engine.ATTACKS)


async def carried_out(target: Target, attacks: Sequence[Attack]) -> AsyncIterator[Result]:
    """Carry out attacks one after the other."""
    for attack in attacks:
        yield await carry_out(attack, target)
