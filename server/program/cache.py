"""A cache with a budget in bytes: what clients send is of any size."""

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

from rudder.server.program import wire

V = TypeVar("V")
# A Row, a Struct of seven fields, and its entries in containers.
ROW_BYTES = 512


class ByteCache(Generic[V]):
    """Keeps the latest results, of at most `budget` bytes together. One that is larger is not kept."""

    def __init__(self, budget: int) -> None:
        self.budget, self.used = budget, 0
        self.entries: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()

    def get(self, key: Hashable) -> V | None:
        """Return the result of a key, if it is kept."""
        # Keys are programs, whose hashes take a while: one per look-up, so the order of use is not kept.
        entry = self.entries.get(key)
        return None if entry is None else entry[0]

    def put(self, key: Hashable, value: V, size: int) -> V:
        """Keep and return a result of `size` bytes, its key included; drop the oldest."""
        if key not in self.entries and size <= self.budget:
            self.entries[key] = value, size
            self.used += size
            while self.used > self.budget:
                _, (_, dropped) = self.entries.popitem(last=False)
                self.used -= dropped
        return value


def rows_size(rows: Iterable[wire.Row]) -> int:
    """Return about how many bytes rows hold."""
    return sum(ROW_BYTES + len(row.encoder) + len(row.decoder) for row in rows)
