"""The bytes of the requests in progress, however far they have come: waiting, running, or sent to a slow reader."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rudder.server.service.errors import Refusal

RETRY_AFTER_S = 1.0


class ByteBudget:
    """Counts the bytes of request messages from their arrival to the end of their calls.

    A compiled program is about as large as its message and lives as long, so the budget bounds both.
    """

    def __init__(self, limit: int, on_change: Callable[[int], None]) -> None:
        self.limit, self.on_change, self.used = limit, on_change, 0

    @contextmanager
    def held(self, size: int) -> Iterator[None]:
        """Hold `size` bytes. Raises Refusal QUEUE_FULL if the budget does not allow that."""
        if self.used + size > self.limit:
            problem = f"requests in progress hold {self.used} bytes; with {size} more, over the {self.limit} allowed"
            raise Refusal("QUEUE_FULL", problem, retry_after_s=RETRY_AFTER_S)
        self.add(size)
        try:
            yield
        finally:
            self.add(-size)

    def add(self, size: int) -> None:
        """Count bytes."""
        self.used += size
        self.on_change(self.used)
