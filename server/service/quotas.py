"""Quotas of callers: token buckets of one minute, per caller and per server process, and streams at once.

A bucket may run into debt: what a call will generate is not known when it begins. A caller in debt waits until a
minute's rate has paid for it; the streams that it has go on.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rudder.server.caller import Caller
from rudder.server.service.errors import Refusal

MINUTE_S = 60.0
# Callers that have been idle for a minute have full buckets: there is nothing to remember of them.
MAX_IDLE = 4096


@dataclass
class Bucket:
    """What is left of a rate per minute; `rate`: also the most that can be left."""

    rate: float
    left: float
    since: float

    def refill(self, now: float) -> None:
        """Add what has come since the last look."""
        self.left = min(self.rate, self.left + (now - self.since) * self.rate / MINUTE_S)
        self.since = now

    def wait_s(self, amount: float) -> float:
        """Return the seconds until `amount`, or a whole minute's rate, is left; 0 now."""
        return max(0.0, min(amount, self.rate) - self.left) * MINUTE_S / self.rate


@dataclass
class Usage:
    """What a caller uses: its buckets by the name of the quota, and its streams."""

    buckets: dict[str, Bucket] = field(default_factory=dict)
    streams: int = 0


class QuotaLedger:
    """What each caller uses of its quotas."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.usage: dict[tuple[str, str], Usage] = {}

    def charge(self, caller: Caller, name: str, amount: float) -> None:
        """Take `amount` from the caller's bucket of this quota, as long as it has one, also into debt."""
        bucket = self.bucket(caller, name)
        if bucket:
            bucket.left -= amount

    def require(self, caller: Caller, name: str, reason: str, amount: float = 1.0) -> None:
        """Raise Refusal `reason`, with the time to wait, if less than `amount` is left of the caller's quota."""
        bucket = self.bucket(caller, name)
        wait_s = bucket.wait_s(amount) if bucket else 0.0
        if bucket and wait_s:
            problem = f"{caller.id} has used its {bucket.rate:g} {name.replace('_', ' ')} a minute"
            raise Refusal(reason, problem, retry_after_s=wait_s)

    def bucket(self, caller: Caller, name: str) -> Bucket | None:
        """Return the refilled bucket of a quota; None where the caller has no such quota."""
        rate: float | None = getattr(caller.quotas, name)
        if rate is None:
            return None
        now, buckets = self.clock(), self.of(caller).buckets
        bucket = buckets.get(name)
        if bucket is None:
            bucket = buckets[name] = Bucket(rate, rate, now)
        bucket.refill(now)
        # Another token of the same caller may have another rate: what was used is used, whatever the rate.
        bucket.left += rate - bucket.rate
        bucket.rate = rate
        return bucket

    def of(self, caller: Caller) -> Usage:
        """Return the usage of a caller."""
        key = caller.tenant, caller.id
        if key not in self.usage and len(self.usage) >= MAX_IDLE:
            self.forget_idle()
        return self.usage.setdefault(key, Usage())

    def forget_idle(self) -> None:
        """Forget callers whose buckets are full again and who have no stream."""
        now = self.clock()
        for key, usage in list(self.usage.items()):
            for bucket in usage.buckets.values():
                bucket.refill(now)
            if not usage.streams and all(bucket.left >= bucket.rate for bucket in usage.buckets.values()):
                del self.usage[key]

    @contextmanager
    def streaming(self, caller: Caller, streams: int) -> Iterator[None]:
        """Within the block, count so many streams of the caller. Raises Refusal QUOTA_STREAMS if they are too many."""
        usage, most = self.of(caller), caller.quotas.streams
        if most is not None and usage.streams + streams > most:
            problem = f"{caller.id} has {usage.streams} streams, and {most} may run at once"
            raise Refusal("QUOTA_STREAMS", problem, retry_after_s=1.0)
        usage.streams += streams
        try:
            yield
        finally:
            usage.streams -= streams
