"""How often a stream sends. A gRPC message costs tens of microseconds of CPU in Python.

So under load tokens are gathered: a reader that waits finds them joined in the engine's own output slot.
"""

import asyncio
import os
import time
from dataclasses import dataclass, field

from server import config
from server.monitoring import metrics

MEASURED_S = 0.5
# With the client on the same machine a message costs about 0.2 ms of a core.
MESSAGES_PER_CORE = 120


@dataclass
class Pace:
    """The tempo of all streams together. Tokens go out as they come while their rate is within the budget."""

    settings: config.Stream
    budget: float = field(init=False)
    streams: int = 0
    tokens: int = 0
    since: float = field(default_factory=time.monotonic)
    rate: float = 0.0

    def __post_init__(self) -> None:
        self.budget = self.settings.message_budget_per_s or MESSAGES_PER_CORE * (os.cpu_count() or 1)

    def count(self, tokens: int, now: float) -> None:
        """Tokens that came, for the rate over the last half second or so."""
        self.tokens += tokens
        if now - self.since >= MEASURED_S:
            self.rate = self.tokens / (now - self.since)
            self.tokens, self.since = 0, now

    def interval(self) -> float:
        """Seconds between two messages of a stream, so that all streams keep to the budget."""
        if self.rate <= self.budget:
            return 0.0
        return min(self.streams / self.budget, self.settings.max_flush_ms / 1000)


@dataclass
class Stream:
    """One stream's place in the tempo. `left`: tokens it may still generate."""

    pace: Pace
    left: int
    began: float = field(default_factory=time.monotonic)
    last: float = 0.0

    async def rest(self, tokens: int) -> None:
        """Count a message of `tokens`, and wait until the next may be read.

        Not beyond the expected last token: it is to leave at once.
        """
        now = time.monotonic()
        each = (now - (self.last or self.began)) / max(tokens, 1)
        self.measure(tokens, each)
        self.pace.count(tokens, now)
        self.left -= tokens
        self.last = now
        if wait := min(self.pace.interval(), each * max(self.left - 1, 0)):
            await asyncio.sleep(wait)

    def measure(self, tokens: int, each: float) -> None:
        """Tell Prometheus of a message whose tokens took `each` seconds."""
        metrics.stream_message(tokens)
        if not self.last:
            metrics.first_token(each * max(tokens, 1))
            return
        for _ in range(tokens):
            metrics.inter_token(each)
