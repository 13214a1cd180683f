"""An engine that generates what a test says, in the chunks that it says, for a real hold-back."""

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from rudder.server.engine.adapter import SamplingParams
from rudder.server.engine.call import Call, FinishReason, Outcome, Output
from rudder.server.engine.telemetry.frame import TelemetryLost
from rudder.server.engine.telemetry.hub import Features, no_features
from rudder.server.program import wire
from rudder.server.program.watch import Watched
from rudder.server.safety.guards import STOP, Guard
from rudder.server.safety.holdback import released
from rudder.server.safety.policy import Policy
from rudder.server.safety.verdicts import Findings, Siblings
from rudder.v1 import policy_pb2

EOS = 2
OUTCOME = Outcome(FinishReason.LENGTH, None, 0, 0, 0, (), (), 0, ())


def guard(*rows: int, statistic: Any = ("none",), level: float = 0.5, action: Any = STOP, **fields: Any) -> Guard:
    """Return a guard whose score is the sum of these columns of the script."""
    prompt, generated = fields.get("prompt", True), fields.get("generated", True)
    name = fields.pop("name", "rule")
    watched = tuple(Watched(0, wire.Row(latent=row), prompt) for row in rows)
    weights = (1.0,) * len(rows)
    fields |= {"prompt": prompt, "generated": generated}
    return Guard(name, watched, weights, 0.0, statistic, level, action, **fields)


def policy(*guards: Guard, name: str = "p", shadow: bool = False, **fields: Any) -> Policy:
    """Return a policy of these guards."""
    mode = policy_pb2.POLICY_MODE_SHADOW if shadow else policy_pb2.POLICY_MODE_ENFORCE
    message = policy_pb2.Policy(name=name, version=1, mode=mode, refusal="The policy's text.")
    return Policy(message, "digest", guards=guards, **fields)


@dataclass
class Script:
    """What the engine generates. `values` [positions, rows]: activations; `ids`: of the tokens, and behind them those
    that would come if the answer went on; `ends`: how it ends where max_tokens does not end it; `chunks`: tokens of
    each output, then one each.
    """

    prompt: int
    ids: list[int]
    values: Any
    ends: FinishReason = FinishReason.LENGTH
    stop_reason: str | int | None = None
    chunks: Sequence[int] = ()


@dataclass
class Engine:
    """Stands in for `Engine`.

    `calls`: those that it was given; `waits`: (seconds, tokens) held back. Of the run in progress, `delivered`: the
    position before which guards have got features; `finished`: the answer is over, and its last token has run or is
    EOS. `aborted`: runs that were. `lose_at`: number of the token at which telemetry is lost.
    """

    script: Script
    calls: list[Call] = field(default_factory=list)
    waits: list[tuple[float, int]] = field(default_factory=list)
    delivered: int = 0
    finished: bool = False
    aborted: int = 0
    lose_at: int | None = None
    excluded: tuple[int, ...] = ()
    eos_token_ids: frozenset[int] = frozenset({EOS})

    @property
    def metrics(self) -> Any:
        return SimpleNamespace(held_back=lambda seconds, tokens: self.waits.append((seconds, tokens)))

    def uncounted(self, _: Call) -> tuple[int, ...]:
        return self.excluded

    def outcome_without_run(self, _: Call) -> Outcome:
        return OUTCOME

    def text_of(self, _: Call, ids: Sequence[int]) -> str:
        return text(ids)

    async def stream(self, call: Call, on_abandoned: Callable[[Outcome], None] | None = None) -> AsyncGenerator[Output]:
        """Generate the script's tokens; with an answer in the call, one token more."""
        self.calls.append(call)
        script, first = self.script, len(call.prompt_ids)
        wanted = call.sampling.max_tokens or 0
        ids = list(script.ids[:wanted]) if not call.answer else [9]
        by_length = call.answer or wanted <= len(script.ids)
        reason = FinishReason.LENGTH if by_length else script.ends
        reads_prompt = any(row.prompt for row in call.guard)
        self.delivered, self.finished = 0 if reads_prompt else call.prompt_tokens, False
        made, ended, chunks = 0, False, list(script.chunks) if not call.answer else []
        try:
            while made < len(ids):
                size = min(chunks.pop(0) if chunks else 1, len(ids) - made)
                part, position = ids[made : made + size], first + made
                made += size
                if self.lose_at is not None and made > self.lose_at:
                    raise TelemetryLost("a gap")
                end = first + made - 1
                read = self.features(call, end)
                self.delivered, ended = end, made == len(ids)
                stop_reason = None if by_length else script.stop_reason
                self.finished = ended and stop_reason is None
                outcome = replace(OUTCOME, finish_reason=reason, stop_reason=stop_reason, generated_tokens=made)
                client = read._replace(
                    activations=read.activations[:, :1] * 0 + np.arange(read.first, read.end)[:, None]
                )
                yield Output(
                    text(part), part, position, [{i: position + n} for n, i in enumerate(part)], client, read,
                    outcome if ended else None, [None] if position == first else None,
                )  # fmt: skip
        finally:
            if not ended:
                self.aborted += 1
                if on_abandoned:
                    on_abandoned(replace(OUTCOME, finish_reason=FinishReason.ABORT, generated_tokens=made))

    def features(self, call: Call, end: int) -> Features:
        """Return what guards read of the positions from `delivered` to before `end`."""
        columns = [row.row.latent for row in call.guard]
        if not columns:
            return no_features(0, 0, 0)
        values = np.asarray(self.script.values, "<f4")[self.delivered : end][:, columns]
        top = np.zeros((len(values), 0, 0), "<f4")
        return Features(self.delivered, values, top, top)


def text(ids: Sequence[int]) -> str:
    """Return the text of tokens."""
    return "".join(f"<{i}>" for i in ids)


@dataclass
class Result:
    """What left, and what was found."""

    outputs: list[Output] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)
    abandoned: list[Outcome] = field(default_factory=list)
    delivered: list[float] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    @property
    def text(self) -> str:
        return "".join(output.text for output in self.outputs)

    @property
    def positions(self) -> list[int]:
        """Positions whose features left."""
        return [p for o in self.outputs for p in range(o.features.first, o.features.end)]

    @property
    def outcome(self) -> Outcome:
        last = self.outputs[-1].outcome
        assert last
        return last


async def run(
    engine: Engine, *policies: Policy, max_tokens: int, siblings: Siblings | None = None, **options: Any
) -> Result:
    """Run a call; note how far the engine's features had come whenever an output left."""
    result = Result()
    prompt = tuple(range(100, 100 + engine.script.prompt))
    call = Call(prompt, SamplingParams(max_tokens=max_tokens))
    stand_in: Any = engine
    stream = released(
        stand_in, call, policies, result.findings, siblings or Siblings(), result.abandoned.append, **options
    )
    async for output in stream:
        result.outputs.append(output)
        result.delivered.append(float("inf") if engine.finished else engine.delivered)
    return result
