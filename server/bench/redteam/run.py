"""Carry out all attacks, and report them."""

from collections.abc import AsyncIterator, Sequence

from rudder.server.bench.redteam import door, engine, files, programs, prompts
from rudder.server.bench.redteam.attack import Attack, Result, carry_out
from rudder.server.bench.redteam.target import Target

ATTACKS: tuple[Attack, ...] = (
    *prompts.ATTACKS, *programs.ATTACKS, *engine.ATTACKS, *door.ATTACKS, *files.ATTACKS,
)  # fmt: skip


async def carried_out(target: Target, attacks: Sequence[Attack]) -> AsyncIterator[Result]:
    """Carry out attacks one after the other."""
    for attack in attacks:
        yield await carry_out(attack, target)
