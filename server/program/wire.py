"""The compiled form of a request's programs, as sent to the worker in `SamplingParams.extra_args`.

Operations are resolved to the numbers of the bank's formula; nothing here knows an operation's name.
"""

from bisect import bisect_left
from math import inf

import msgspec

EXTRA_ARG = "rudder"


class Row(msgspec.Struct, frozen=True, array_like=True):
    """The contents of a row place: latent `latent` of bundle `bundle`, or raw little-endian fp32 vectors.

    `copy` distinguishes equal rows that need a place each, so that the edits of each are counted separately.
    """

    bundle: str = ""
    latent: int = -1
    encoder: bytes = b""
    decoder: bytes = b""
    bias: float = 0.0
    threshold: float = -inf
    copy: int = 0


class Edit(msgspec.Struct, frozen=True, array_like=True):
    """new = clip(scale * f + shift, lower, upper) on row `row` of the site, where f > above.

    `relative`: shift, lower and upper count in units of ||x|| at the token.
    """

    row: int
    scale: float = 1.0
    shift: float = 0.0
    lower: float = -inf
    upper: float = inf
    above: float = -inf
    relative: bool = False
    prompt: bool = True
    generated: bool = True


class Blend(msgspec.Struct, frozen=True, array_like=True):
    """x' = x + weight * (decoder of `row` - x)."""

    row: int
    weight: float
    prompt: bool = True
    generated: bool = True


class Sequence(msgspec.Struct, frozen=True, array_like=True):
    """State s_t = max(floor, decay * s_{t-1} + gain * u_t + offset) with u_t the score, or 1[score > binary].

    With `window` > 0 the state is the mean of the last `window` scores instead. The condition is
    s_t > level + level_rate * n_t, with n_t the tokens counted so far, and n_t >= min_tokens.
    """

    score: int
    binary: float | None = None
    decay: float = 1.0
    gain: float = 1.0
    offset: float = 0.0
    floor: float = -1e300
    window: int = 0
    level: float = 0.0
    level_rate: float = 0.0
    min_tokens: int = 0
    latch: bool = False


class Gate(msgspec.Struct, frozen=True, array_like=True):
    """Open where any trigger row is above its threshold AND the sequence condition holds; an absent part holds."""

    triggers: tuple[tuple[int, float], ...] = ()
    sequence: Sequence | None = None


class Site(msgspec.Struct, frozen=True, array_like=True):
    """The edits, gate and watched rows of one stage at site number `site` of the layout. Row numbers index `rows`."""

    site: int
    rows: tuple[Row, ...] = ()
    edits: tuple[Edit, ...] = ()
    blend: Blend | None = None
    restore_norm: bool = False
    max_displacement: float = inf
    gate: Gate | None = None
    watch: tuple[int, ...] = ()

    def phases_differ(self) -> bool:
        """Return whether prompt and generated tokens are edited differently."""
        parts: tuple[Edit | Blend, ...] = (*self.edits, self.blend) if self.blend else self.edits
        return any(part.prompt != part.generated for part in parts)


class Request(msgspec.Struct, frozen=True, array_like=True):
    """What the worker knows of a request. `stages[0]` is the request's own program, `stages[1]` the policy.

    `max_tokens` bounds prompt and generated tokens together. `bos`: position 0 holds the BOS token. `watch_prompt`:
    watched rows and top_k are reported at prompt tokens too. `excluded`: positions, in ascending order, that are not
    edited, evaluated by gates, counted or read (`program/exclusion.py`).
    """

    prompt_tokens: int
    max_tokens: int
    bos: bool
    stages: tuple[tuple[Site, ...], ...] = ()
    watch_prompt: bool = False
    top_k: int = 0
    top_k_sites: tuple[int, ...] = ()
    capture: bool = False
    excluded: tuple[int, ...] = ()

    @property
    def uncounted(self) -> tuple[int, ...]:
        """Positions of tokens that are not edited, evaluated by gates or counted: `excluded` and that of BOS."""
        return with_bos(self.excluded, self.bos)

    def counted_before(self, end: int) -> int:
        """Count the tokens at positions before `end` that sequence statistics count."""
        uncounted = self.uncounted
        return end - bisect_left(uncounted, end)

    @property
    def edits(self) -> bool:
        """Whether a token can be edited or a gate evaluated: such a request needs a slot."""
        return any(site.edits or site.blend or site.gate for stage in self.stages for site in stage)

    @property
    def reads(self) -> bool:
        """Whether the residual is read after the forward pass."""
        return self.top_k > 0 or self.capture

    def gates(self) -> list[tuple[int, Gate]]:
        """Return (stage, gate) of each program that has a gate: at most one per stage."""
        return [(stage, site.gate) for stage, sites in enumerate(self.stages) for site in sites if site.gate]

    def rows(self) -> set[tuple[int, Row]]:
        """Return the distinct (site number, row) pairs that the request holds."""
        return {(site.site, row) for stage in self.stages for site in stage for row in site.rows}


def with_bos(excluded: tuple[int, ...], bos: bool) -> tuple[int, ...]:
    """Return excluded positions and, if position 0 holds BOS, that one, in ascending order."""
    return (0, *excluded) if bos and excluded[:1] != (0,) else excluded


def encode(request: Request) -> bytes:
    """Encode a request for `extra_args`."""
    return msgspec.msgpack.encode(request)


def decode(payload: bytes) -> Request:
    """Decode a request. Raises msgspec.DecodeError."""
    return msgspec.msgpack.decode(payload, type=Request)
