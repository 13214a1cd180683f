"""Whose turn it is to enter the engine: deficit round robin by tokens (Shreedhar and Varghese, 1995)."""

from collections.abc import Mapping
from math import ceil

# Tokens that a caller may run for each round; a caller with long requests waits some rounds for each.
QUANTUM = 256


class Turns:
    """Callers in the order of the round, the first of whom has the turn, and the tokens that each may still run.

    Over any time in which callers always wait, none of them runs more than a quantum and its longest request beyond
    another one.
    """

    def __init__(self) -> None:
        self.deficits: dict[str, float] = {}

    def join(self, caller: str) -> None:
        """Let a caller take part from the end of the round on, unless it does."""
        self.deficits.setdefault(caller, 0.0)

    def leave(self, caller: str) -> None:
        """Let a caller take part no more; what it has saved is lost."""
        self.deficits.pop(caller, None)

    def charge(self, caller: str, cost: float) -> None:
        """Take the tokens of what a caller runs out of its turn."""
        self.deficits[caller] -= cost

    def next(self, costs: Mapping[str, float]) -> str:
        """Return whose turn it is among the callers of `costs`, the tokens of what each would run, and charge it.

        A caller that has nothing to run now saves nothing for later.
        """
        self.skip_rounds(costs)
        while True:
            caller = next(iter(self.deficits))
            if caller in costs and costs[caller] <= self.deficits[caller]:
                self.charge(caller, costs[caller])
                return caller
            credit = QUANTUM if caller in costs else 0
            self.deficits[caller] = self.deficits.pop(caller) + credit

    def skip_rounds(self, costs: Mapping[str, float]) -> None:
        """Give everybody the rounds at once after which the first of them can run: long requests need many."""
        rounds = min(ceil((cost - self.deficits[caller]) / QUANTUM) for caller, cost in costs.items())
        for caller in costs if rounds > 1 else ():
            self.deficits[caller] += (rounds - 1) * QUANTUM
