"""How often a stream sends a message. A gRPC message costs tens of microseconds of CPU in Python.

So under load several tokens share a message: while a reader waits, the engine joins them in its own output slot.
"""

import asyncio
import os
import time
from dataclasses import dataclass, field

from rudder.server import config

# A message costs tens of microseconds of a core. A budget of 100, which joined four tokens in each under load, gained
# 3 % of throughput on a CPU and made the gaps between messages seven times as long.
MESSAGES_PER_CORE = 2000
# Seconds' worth of the budget that may be spent at once after an idle time.
BURST_S = 0.25


@dataclass
class Pace:
    """The message budget that all streams share. Within it, each token leaves as it comes. Beyond it, all streams send
    at common ticks: a message alone costs twice as much as one of many.

    `balance`: messages left of the budget at time `updated`, negative if overdrawn. `tick`: time of the next tick.
    """

    settings: config.Stream
    budget: float = field(init=False)
    streams: int = 0
    balance: float = 0.0
    updated: float = field(default_factory=time.monotonic)
    tick: float = 0.0

    def __post_init__(self) -> None:
        self.budget = self.settings.message_budget_per_s or MESSAGES_PER_CORE * (os.cpu_count() or 1)

    def spend(self, now: float) -> float:
        """Count a message at time `now`. Return the seconds until its stream may send the next."""
        burst = BURST_S * self.budget
        self.balance = min(max(self.balance + (now - self.updated) * self.budget - 1, -burst), burst)
        self.updated = now
        if self.balance >= 0:
            return 0.0
        if now >= self.tick:
            self.tick = now + min(self.streams / self.budget, self.settings.max_flush_ms / 1000)
        return self.tick - now


@dataclass
class Stream:
    """One stream of tokens. `remaining`: tokens that it may still generate."""

    pace: Pace
    remaining: int
    last_sent: float = field(default_factory=time.monotonic)
    messages: int = 0
    seconds_per_token: float = 0.0

    def sent(self, tokens: int) -> None:
        """Note a message of `tokens`, sent now."""
        now = time.monotonic()
        self.seconds_per_token = (now - self.last_sent) / max(tokens, 1)
        self.remaining -= tokens
        self.messages += 1
        self.last_sent = now

    async def wait_for_turn(self) -> None:
        """Spend the message just sent, and wait until the next may be read.

        Never wait beyond the time at which the last token is expected: it leaves at once.
        """
        wait = min(self.pace.spend(self.last_sent), self.seconds_per_token * max(self.remaining - 1, 0))
        if wait:
            await asyncio.sleep(wait)
