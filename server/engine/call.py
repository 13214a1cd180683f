"""A call to the engine, its outputs and its outcome, and the sampling parameters and cache salt that vLLM receives."""

import hashlib
import hmac
from copy import copy
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import msgspec

from rudder.server.caller import ANONYMOUS, Caller
from rudder.server.engine.adapter import RequestOutputKind, SamplingParams
from rudder.server.engine.telemetry.frame import Capture
from rudder.server.engine.telemetry.hub import Features
from rudder.server.program import wire
from rudder.server.program.compile import Compiled
from rudder.server.program.watch import Watched

# Several times the latents that an SAE has active at a token; each of them is ranked and sent for every token.
MAX_HIDDEN = 256


@dataclass(frozen=True)
class Call:
    """One choice of one request, checked and compiled.

    `policies`: programs that run behind the request's own, in this order, each on what those before it leave.
    `watch`: rows reported to the client. `guard`: rows reported to guards and never to the client. `hidden`: latents
    that are left out of the top k, for each of `top_k_sites`. `top_k_prompt`: report the top-k latents of prompt tokens
    too; with top_k 0 it only makes the prompt run whole, whatever the prefix cache holds, so that its edits are
    counted. `capture`: return the residuals of all tokens at all sites. `answer`: the last so many of `prompt_ids` are
    no prompt but the answer so far: tokens of the phase of generated tokens. `trace_headers`: with which vLLM's own
    span joins the call's trace. `enforced`: the first so many of `policies` must edit what they are to edit, or the
    call ends.
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    compiled: Compiled | None = None
    policies: tuple[Compiled, ...] = ()
    watch: tuple[Watched, ...] = ()
    guard: tuple[Watched, ...] = ()
    top_k: int = 0
    top_k_sites: tuple[str, ...] = ()
    hidden: tuple[tuple[int, ...], ...] = ()
    top_k_prompt: bool = False
    caller: Caller = ANONYMOUS
    cache_salt: str = ""
    capture: bool = False
    answer: int = 0
    trace_headers: tuple[tuple[str, str], ...] = ()
    enforced: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of the prompt."""
        return len(self.prompt_ids) - self.answer

    @property
    def ranked(self) -> int:
        """Latents to rank at each token: so many more than the top k that the hidden ones among them leave k.

        At most MAX_HIDDEN more: a report has fewer than k only where more hidden latents than that are active at a
        token, of an SAE with so many active ones.
        """
        return self.top_k + min(max(map(len, self.hidden), default=0), MAX_HIDDEN) if self.top_k else 0

    @property
    def reads_prompt(self) -> bool:
        """Whether all prompt tokens must run, since activations or latents are reported there."""
        return self.top_k_prompt or any(watched.prompt for watched in (*self.watch, *self.guard))


class PolicyNotApplied(Exception):
    """An edit of an enforced policy was rejected: the token's residual is not finite, or would not have stayed so."""

    def __init__(self, position: int) -> None:
        super().__init__(f"an edit of a policy could not be applied at token {position}")


class FinishReason(StrEnum):
    """Why a call ended: vLLM's reasons, and `REFUSED`, which the engine itself never returns."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    REPETITION = "repetition"
    REFUSED = "refused"


class GateOutcome(NamedTuple):
    """What the worker counted of the gate of one stage, 0 the request's program, 1 + i program i of `Call.policies`.

    `open_tokens`: tokens at which it was open. `statistic`: that of its sequence condition after the last token, which
    is compared with the condition's `level`; None without one.
    """

    stage: int
    open_tokens: int
    statistic: float | None


@dataclass(frozen=True)
class Outcome:
    """How a call ended and what ran, as counted by the worker.

    `moved` and `policy_moved`: tokens touched by each edit of the program and of each of `Call.policies`. `gates`: of
    those of them that have a gate. `tokens_seen`: tokens that went through the forward pass; like all
    others, a token that was computed again after a preemption counts once. `queued_s`: seconds that the call waited for
    the bank.
    """

    finish_reason: FinishReason
    stop_reason: str | int | None
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    moved: tuple[int, ...]
    policy_moved: tuple[tuple[int, ...], ...]
    tokens_seen: int
    captures: tuple[Capture, ...]
    queued_s: float = field(default=0.0, compare=False)
    # Tokens at which each edit of the program and of the policies was rejected: x would not have stayed finite.
    rejected: tuple[int, ...] = ()
    policy_rejected: tuple[tuple[int, ...], ...] = ()
    gates: tuple[GateOutcome, ...] = ()


class Output(NamedTuple):
    """New tokens of a call and the telemetry since the last output; the last output has the outcome.

    `first_position`: position of `token_ids[0]`; the others follow. `features` has the columns of `Call.watch`,
    `guard_features` those of `Call.guard`. Both may be of earlier positions than the new tokens: a token's activations
    exist only after its own forward pass.
    """

    text: str
    token_ids: list[int]
    first_position: int
    logprobs: list[dict[int, Any]] | None
    features: Features
    guard_features: Features
    outcome: Outcome | None = None
    # Per token of the prompt, None for the first; with the first output of a call that asks for them.
    prompt_logprobs: list[dict[int, Any] | None] | None = None


def salt(secret: bytes, call: Call, *, by_id: bool = False) -> str:
    """Compute the prefix-cache salt: an HMAC over tenant, program, policies and the client's own salt.

    Calls share cached keys and values only within a tenant and with the same effective program. Tokens generated under
    a program whose phases differ come back as prompt in the next turn, where they would be edited differently: so the
    prompt's length is then part of the salt. The same holds if tokens are excluded from edits `by_id`, which they are
    in a prompt only.
    """
    by_phase = any(compiled.by_phase or by_id for compiled in programs_of(call))
    boundary = call.prompt_tokens if by_phase else 0
    own, policies = digest(call.compiled), [digest(policy) for policy in call.policies]
    parts = (call.caller.tenant, own, policies, boundary, call.cache_salt)
    return hmac.new(secret, msgspec.json.encode(parts), hashlib.sha256).hexdigest()


def engine_sampling(call: Call, request: wire.Request) -> SamplingParams:
    """Return the call's sampling parameters with the compiled request in place of any `extra_args` of a client."""
    # A shallow copy: vLLM makes a deep one.
    params = copy(call.sampling)
    params.extra_args = {wire.EXTRA_ARG: wire.encode(request)}
    params.output_kind = RequestOutputKind.DELTA
    # Tokens served from the prefix cache produce neither activations nor log-probabilities.
    in_sequence = any(compiled.in_sequence for compiled in programs_of(call))
    params.skip_reading_prefix_cache = (
        call.reads_prompt or call.capture or in_sequence or params.prompt_logprobs is not None
    )
    return params


def programs_of(call: Call) -> list[Compiled]:
    """Return the call's program, if it has one, and those of its policies."""
    return [*([call.compiled] if call.compiled else []), *call.policies]


def digest(compiled: Compiled | None) -> str:
    """Return a program's digest; empty without one."""
    return compiled.digest if compiled else ""
