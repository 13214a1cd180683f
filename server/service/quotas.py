"""Quotas of callers: token buckets of one minute, per caller and per server process, and what is held at once.

A call is charged when it is admitted: its prompt for each choice, and all tokens that it may generate. What it did not
use is given back at its end. A bucket may run into debt: a call that is larger than a minute's rate runs once the
bucket is full.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rudder.server.caller import Caller
from rudder.server.engine.call import Call
from rudder.server.service.errors import Refusal

MINUTE_S = 60.0
# Callers that have been idle for a minute have full buckets: there is nothing to remember of them.
MAX_IDLE = 4096
# Quotas of what is held at once: the reason of their refusal.
HELD = {"streams": "QUOTA_STREAMS", "rows": "QUOTA_ROWS"}


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
    """What a caller uses: its buckets by the name of the quota, and what it holds at once."""

    buckets: dict[str, Bucket] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=lambda: dict.fromkeys(HELD, 0))


@dataclass
class Demand:
    """What a call needs of its caller's quotas, or what it used of them. `streams`: its choices."""

    streams: int
    rows: int
    prompt_tokens: int
    generated_tokens: int

    @property
    def tokens(self) -> dict[str, int]:
        """What is taken from buckets, by quota."""
        return {"prompt_tokens": self.prompt_tokens, "generated_tokens": self.generated_tokens}


def demand_of(calls: Sequence[Call]) -> Demand:
    """Return what a call with these choices needs at most: its rows once, prompt and answer for each choice."""
    rows = {(site.site, row) for site in (calls[0].compiled.sites if calls[0].compiled else ()) for row in site.rows}
    rows |= {(watched.site, watched.row) for watched in calls[0].watch}
    prompt, generated = (sum(tokens) for tokens in zip(*map(tokens_of, calls), strict=True))
    return Demand(len(calls), len(rows), prompt, generated)


def tokens_of(call: Call) -> tuple[int, int]:
    """Return the tokens of the prompt, and the most that are generated."""
    return len(call.prompt_ids), call.sampling.max_tokens or 0


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
        """Forget callers whose buckets are full again and who hold nothing."""
        now = self.clock()
        for key, usage in list(self.usage.items()):
            for bucket in usage.buckets.values():
                bucket.refill(now)
            if not any(usage.held.values()) and all(bucket.left >= bucket.rate for bucket in usage.buckets.values()):
                del self.usage[key]

    def held(self, name: str) -> int:
        """Return what the calls of all callers hold of a quota of HELD."""
        return sum(usage.held[name] for usage in self.usage.values())

    @contextmanager
    def reserved(self, caller: Caller, demand: Demand, used: Callable[[], Demand]) -> Iterator[None]:
        """Within the block, hold what a call needs of its caller's quotas; then give back what it has not used.

        Raises Refusal QUOTA_STREAMS, QUOTA_ROWS or QUOTA_TOKENS, and takes nothing, if one does not suffice.
        """
        usage, needed = self.of(caller), {name: getattr(demand, name) for name in HELD}
        for name, amount in needed.items():
            require_held(caller, usage, name, amount)
        for name, amount in demand.tokens.items():
            self.require(caller, name, "QUOTA_TOKENS", amount)
        for name, amount in demand.tokens.items():
            self.charge(caller, name, amount)
        hold(usage, needed, 1)
        try:
            yield
        finally:
            hold(usage, needed, -1)
            for name, amount in used().tokens.items():
                self.charge(caller, name, amount - demand.tokens[name])


def hold(usage: Usage, amounts: dict[str, int], sign: int) -> None:
    """Add to what a caller holds, or with `sign` -1 take it away."""
    for name, amount in amounts.items():
        usage.held[name] += sign * amount


def require_held(caller: Caller, usage: Usage, name: str, amount: int) -> None:
    """Raise the Refusal of a quota of HELD if the caller would hold more than it may."""
    most: int | None = getattr(caller.quotas, name)
    if most is not None and usage.held[name] + amount > most:
        has = f"{caller.id} has {usage.held[name]} {name}, this call needs {amount}, and {most} may be held at once"
        # One that never fits is not tried again.
        raise Refusal(HELD[name], has, retry_after_s=1.0 if amount <= most else None)
