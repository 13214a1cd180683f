"""Whether an engine that has work makes progress."""

from dataclasses import dataclass

STALL_CHECK_S = 1.0


@dataclass
class Progress:
    """The engine's progress, as a number that grows, and since when it has not."""

    seen: int = 0
    since: float = 0.0

    def idle_s(self, progress: int, now: float, *, pending: bool) -> float:
        """Return the seconds for which requests have been pending without progress; 0 if none is."""
        if not pending or progress != self.seen:
            self.seen, self.since = progress, now
        return now - self.since
