"""What the engine is asked for, what it answers, and what of a call vLLM is told."""

import hashlib
import hmac
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from rudder.server.engine.telemetry.frame import Capture
from rudder.server.engine.telemetry.hub import Features
from rudder.server.program import wire
from rudder.server.program.compile import Compiled
from rudder.server.program.watch import Watched


@dataclass(frozen=True)
class Call:
    """One choice of one request, checked and compiled.

    `canary` is for the self-test: the stage that its program runs in, without the policy.
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    compiled: Compiled | None = None
    watch: tuple[Watched, ...] = ()
    top_k: int = 0
    top_k_sites: tuple[str, ...] = ()
    report_prompt: bool = False
    tenant: str = ""
    cache_salt: str = ""
    capture: bool = False
    canary: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What ran, as the worker counted it, and how it ended. `queued_s`: seconds that the call waited for the bank."""

    finish_reason: str
    stop_reason: str | int | None
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    moved: tuple[int, ...]
    policy_moved: tuple[int, ...]
    tokens_seen: int
    captures: tuple[Capture, ...]
    queued_s: float = 0.0


class Output(NamedTuple):
    """What happened since the last one; the last has the outcome. `features` are of the columns of `Call.watch`."""

    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Any]] | None
    features: Features
    outcome: Outcome | None = None


def salt(secret: bytes, call: Call, policy: Compiled | None) -> str:
    """Prefix-cache salt: keys and values are shared only by one tenant's requests with one effective program.

    What a program that tells phases apart generated comes back as prompt in the next turn, where it would have been
    edited otherwise: so the prompt's length is part of its effect.
    """
    by_phase = any(c is not None and c.by_phase for c in (call.compiled, policy))
    cut = len(call.prompt_ids) if by_phase else 0
    parts = (call.tenant, digest(call.compiled), digest(policy), cut, call.cache_salt)
    return hmac.new(secret, msgspec.json.encode(parts), hashlib.sha256).hexdigest()


def engine_sampling(call: Call, request: wire.Request, policy: Compiled | None) -> SamplingParams:
    """The call's sampling parameters with the program in them; nothing a client wrote reaches `extra_args`."""
    # vLLM copies them deeply itself.
    params = copy(call.sampling)
    params.extra_args = {wire.EXTRA_ARG: wire.encode(request)}
    params.output_kind = RequestOutputKind.DELTA
    # Tokens served from the cache produce no activations.
    params.skip_reading_prefix_cache = (
        call.report_prompt or call.capture or any(c is not None and c.in_sequence for c in (call.compiled, policy))
    )
    return params


def digest(compiled: Compiled | None) -> str:
    """A program's digest; empty for none."""
    return compiled.digest if compiled else ""
