"""How often a stream sends. A gRPC message costs tens of microseconds of CPU in Python.

So under load tokens are gathered: a reader that waits finds them joined in the engine's own output slot.
"""

import asyncio
import os
import time
from dataclasses import dataclass, field

from rudder.server import config
from rudder.server.monitoring import metrics

# With the client on the same machine a message costs about 0.2 ms of a core.
MESSAGES_PER_CORE = 100
# Seconds of the budget that may be spent at once after a quiet time.
BURST_S = 0.25


@dataclass
class Pace:
    """The tempo of all streams together. Tokens go out as they come while messages are within the budget; above it
    they are gathered, and all streams send at the same ticks: a message alone costs twice one among many.

    `left`: messages that the budget still has at time `since`, below 0 where it is overdrawn. `tick`: the next one.
    """

    settings: config.Stream
    budget: float = field(init=False)
    streams: int = 0
    left: float = 0.0
    since: float = field(default_factory=time.monotonic)
    tick: float = 0.0

    def __post_init__(self) -> None:
        self.budget = self.settings.message_budget_per_s or MESSAGES_PER_CORE * (os.cpu_count() or 1)

    def wait(self, now: float) -> float:
        """Count a message; seconds until its stream may send the next."""
        most = BURST_S * self.budget
        self.left = min(max(self.left + (now - self.since) * self.budget - 1, -most), most)
        self.since = now
        if self.left >= 0:
            return 0.0
        if now >= self.tick:
            self.tick = now + min(self.streams / self.budget, self.settings.max_flush_ms / 1000)
        return self.tick - now


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
        self.left -= tokens
        self.last = now
        if wait := min(self.pace.wait(now), each * max(self.left - 1, 0)):
            await asyncio.sleep(wait)

    def measure(self, tokens: int, each: float) -> None:
        """Tell Prometheus of a message whose tokens took `each` seconds."""
        metrics.stream_message(tokens)
        if not self.last:
            metrics.first_token(each * max(tokens, 1))
        else:
            metrics.inter_token(each, tokens)
