"""Positions that the SAEs were not trained on: left out of reading, statistics and edits of every call."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Exclusion:
    """The union of what the manifests of all loaded bundles exclude (`context`).

    The rule is the operator's and holds for every call, whichever bundle it names: a client that could choose would
    lift a policy from tokens. `positions`: of a context, from 0, in ascending order. `tokens`: ids.
    """

    positions: tuple[int, ...] = ()
    tokens: frozenset[int] = frozenset()

    def of(self, prompt_ids: Sequence[int], end: int) -> tuple[int, ...]:
        """Return the excluded positions before `end` of a call, in ascending order.

        Generated tokens are excluded by position only: their ids are known on the device alone when they run.
        """
        positions = self.positions[: bisect_left(self.positions, end)]
        if self.tokens.isdisjoint(prompt_ids):
            return positions
        tokens = (position for position, token in enumerate(prompt_ids) if token in self.tokens)
        return tuple(sorted({*positions, *tokens}))
