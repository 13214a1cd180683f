"""The one way out of the engine: what a call generates leaves when the guards of its policies have judged it.

The score of a token exists one step after the token, when it has gone through the model itself. So an output waits
until every token in it, and `hold_back` tokens behind each, have been judged, or until the answer has ended and is
judged to its end. Nothing leaves before the verdict about the whole prompt. What is not text waits with it:
log-probabilities, activations, and what is pooled from them.

The last token of an answer has not gone through the model. An answer that ends by its length is generated with one
token more, which is dropped. One that ends by a stop string or a stop token is given to the engine again as a prompt.
One that ends with EOS has nothing behind its last judged token.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from copy import copy
from dataclasses import replace
from math import inf
from typing import NamedTuple

from rudder.server.engine.adapter import SamplingParams
from rudder.server.engine.call import Call, FinishReason, Outcome, Output
from rudder.server.engine.engine import Engine
from rudder.server.engine.report import NO_FEATURES
from rudder.server.engine.telemetry.frame import TelemetryLost
from rudder.server.engine.telemetry.hub import Features, joined
from rudder.server.program.compile import Compiled
from rudder.server.safety.binding import stages_of
from rudder.server.safety.guards import ACTIONS, CLAMP_FROM_START, REFUSING, STOP, Guard
from rudder.server.safety.judge import Judge
from rudder.server.safety.policy import Policy
from rudder.server.safety.verdicts import Benign, Findings, Refusing, Siblings, Verdict

OnAbandoned = Callable[[Outcome], None]
# Tokens of a prompt that are judged at once, in about a millisecond for each guard.
JUDGED_AT_ONCE = 1024
BROKEN = (FinishReason.ABORT, FinishReason.ERROR)


class Rule(NamedTuple):
    """A guard and the policy that it belongs to."""

    policy: Policy
    guard: Guard


def released(
    engine: Engine,
    call: Call,
    policies: Sequence[Policy],
    findings: Findings,
    siblings: Siblings,
    on_abandoned: OnAbandoned | None = None,
    *,
    inspects: bool = False,
) -> AsyncGenerator[Output]:
    """Run a choice of a call that these policies bind, as `Engine.stream` does; yield outputs once they may leave.

    The last output of a choice that a guard refused has no tokens, and an outcome with FinishReason.REFUSED. What
    guards find is written to `findings`. `siblings` is shared with the other choices of the call. `inspects`: nothing
    that is generated leaves.
    """
    if not any(policy.guards for policy in policies):
        return engine.stream(call, on_abandoned=on_abandoned)
    return Release(engine, call, policies, findings, siblings, on_abandoned, inspects).outputs()


def tokens_beyond(policies: Sequence[Policy]) -> int:
    """Return how many tokens more than the client asks for a call generates, for which the model must have room."""
    return int(any(rule.guard.rows and rule.guard.generated for rule in enforced(policies)))


def enforced(policies: Sequence[Policy]) -> list[Rule]:
    """Return the guards whose verdicts count."""
    return [Rule(policy, guard) for policy in policies if not policy.shadow for guard in policy.guards]


class Release:
    """One choice on its way out.

    `waiting`: outputs that have not left, with the time at which each came. `ids`, `chars`: the tokens generated and
    the characters of their text, whether they have left or not. `sent`: tokens that have left. `again`: the prompt
    must run again, under other programs.
    """

    def __init__(
        self,
        engine: Engine,
        call: Call,
        policies: Sequence[Policy],
        findings: Findings,
        siblings: Siblings,
        on_abandoned: OnAbandoned | None,
        inspects: bool,
    ) -> None:
        self.engine, self.call, self.policies = engine, call, policies
        self.findings, self.siblings, self.on_abandoned = findings, siblings, on_abandoned
        self.inspects = inspects
        self.rules = [Rule(policy, guard) for policy in policies for guard in policy.guards]
        self.binding = [number for number, rule in enumerate(self.rules) if not rule.policy.shadow]
        stops = [rule.guard for rule in enforced(policies) if rule.guard.action == STOP and rule.guard.generated]
        self.hold_back = max((guard.hold_back for guard in stops), default=0)
        self.beyond = 0 if inspects else tokens_beyond(policies)
        self.prompt_tokens, self.limit = len(call.prompt_ids), call.sampling.max_tokens or 0
        self.forced: frozenset[str] = frozenset()
        self.noted: set[int] = set()
        self.sent = 0
        self.begin()

    def begin(self) -> None:
        """Begin with nothing generated or judged."""
        self.judge = Judge([rule.guard for rule in self.rules], self.prompt_tokens, self.engine.uncounted(self.call))
        self.waiting: deque[tuple[Output, float]] = deque()
        self.ids: list[int] = []
        self.chars = 0
        self.ended = self.again = False
        self.outcome: Outcome | None = None

    def start(self) -> bool:
        """Let token models judge the prompt before it runs; return whether it may run."""
        self.begin()
        self.heed_siblings()
        self.judge.take_tokens(self.call.prompt_ids)
        self.decide()
        return self.start() if self.again else not self.findings.refusing

    async def outputs(self) -> AsyncGenerator[Output]:
        """Yield what may leave."""
        running = self.start()
        while running:
            async with aclosing(self.engine.stream(self.extended(), on_abandoned=self.abandoned)) as outputs:
                async for output in outputs:
                    await self.receive(output)
                    if ready := self.ready():
                        yield ready
                    if self.findings.refusing or self.again:
                        break
            running = self.again and self.start()
        self.findings.benign = self.benign()
        if self.findings.refusing:
            yield self.refused()

    def extended(self) -> Call:
        """Return the call with the rows that guards read, and one token more where the last one must be judged."""
        sampling = copy(self.call.sampling)
        sampling.max_tokens = self.limit + self.beyond
        rows = tuple(row for rule in self.rules for row in rule.guard.rows)
        return replace(self.call, sampling=sampling, guard=rows, policies=self.programs())

    def programs(self) -> tuple[Compiled, ...]:
        """Return the programs of the policies as they run."""
        return stages_of(self.policies, self.forced) if self.forced else self.call.policies

    def abandoned(self, outcome: Outcome) -> None:
        """Take the outcome so far of a run that did not come to its end."""
        self.outcome = outcome
        if self.on_abandoned and not (self.findings.refusing or self.again):
            self.on_abandoned(outcome)

    async def receive(self, output: Output) -> None:
        """Take in an output of the engine, and judge it."""
        if self.heed_siblings():
            return
        output = self.cut(output)
        self.waiting.append((output, time.monotonic()))
        await self.judge_features(output.guard_features)
        self.judge.take_tokens(output.token_ids)
        if output.outcome:
            await self.end(output.outcome)
        self.decide()

    async def judge_features(self, features: Features) -> None:
        """Judge features; those of a long prompt in parts, between which other streams run."""
        for begin in range(features.first, features.end, JUDGED_AT_ONCE):
            if begin > features.first:
                await asyncio.sleep(0)
            self.judge.take(features.between(begin, begin + JUDGED_AT_ONCE))

    def heed_siblings(self) -> bool:
        """Return whether a refusal of another choice ends this one."""
        if self.siblings.refusing and not self.findings.refusing:
            self.findings.refusing = self.siblings.refusing._replace(others=True)
        return self.findings.refusing is not None

    def cut(self, output: Output) -> Output:
        """Count an output's tokens, and drop those that the client did not ask for."""
        if self.inspects:
            return output._replace(text="", token_ids=[], logprobs=None)
        self.ids += output.token_ids
        over = len(self.ids) - self.limit
        if over <= 0:
            self.chars += len(output.text)
            return output
        del self.ids[self.limit :]
        kept = len(output.token_ids) - over
        assert output.outcome
        return output._replace(
            text=self.engine.text_of(self.call, self.ids)[self.chars :],
            token_ids=output.token_ids[:kept],
            logprobs=output.logprobs and output.logprobs[:kept],
            # The last token of an answer without guards has none.
            features=output.features.between(output.features.first, self.prompt_tokens + self.limit - 1),
            outcome=replace(
                output.outcome, finish_reason=FinishReason.LENGTH, stop_reason=None, generated_tokens=self.limit
            ),
        )

    async def end(self, outcome: Outcome) -> None:
        """Judge an answer that has ended to its end. What waits of one that broke off never leaves."""
        self.outcome, self.ended = outcome, True
        if outcome.finish_reason in BROKEN:
            self.waiting.clear()
            self.waiting.append((self.nothing(replace(outcome, generated_tokens=self.sent)), time.monotonic()))
        elif self.last_unjudged():
            await self.judge_last(outcome)
            # The last token is now among those that have gone through the model.
            self.outcome = replace(outcome, tokens_seen=outcome.tokens_seen + 1)
            output, came = self.waiting.pop()
            self.waiting.append((output._replace(outcome=self.outcome), came))

    def nothing(self, outcome: Outcome) -> Output:
        """Return a last output without tokens."""
        return Output("", [], self.prompt_tokens + self.sent, None, NO_FEATURES, NO_FEATURES, outcome)

    def last_unjudged(self) -> bool:
        """Return whether the last token has not gone through the model, and says something."""
        last = self.prompt_tokens + len(self.ids) - 1
        judged = self.judge.next_features > last or last in self.judge.uncounted
        return bool(self.beyond and self.ids and not judged and self.ids[-1] not in self.engine.eos_token_ids)

    async def judge_last(self, outcome: Outcome) -> None:
        """Run the answer as a prompt, for what guards read at its last token. Raises TelemetryLost if they cannot."""
        if self.on_abandoned:
            # If the client leaves now.
            self.on_abandoned(replace(outcome, finish_reason=FinishReason.ABORT))
        last = self.prompt_tokens + len(self.ids) - 1
        async with aclosing(self.engine.stream(self.continued())) as outputs:
            async for output in outputs:
                self.judge.take(output.guard_features.between(last, last + 1))
        if self.judge.next_features <= last:
            raise TelemetryLost(f"no telemetry for position {last}")

    def continued(self) -> Call:
        """Return a call of the prompt with its answer, of which only generated tokens are read, by guards alone.

        Prompt and answer may come from the prefix cache, as the call's programs allow.
        """
        call = self.extended()
        return replace(
            call,
            prompt_ids=(*call.prompt_ids, *self.ids),
            answer=len(self.ids),
            sampling=SamplingParams(max_tokens=1, temperature=0.0, detokenize=False),
            watch=(),
            guard=tuple(row._replace(prompt=False) for row in call.guard),
            top_k=0,
            top_k_sites=(),
            top_k_prompt=False,
        )

    def decide(self) -> None:
        """Act on the guards that hold: refuse, or run the prompt again."""
        held = sorted((track.held.position, number) for number, track in enumerate(self.judge.tracks) if track.held)
        for _, number in held:
            self.note(number)
        binding = [number for _, number in held if number in self.binding]
        for number in binding:
            if self.rules[number].guard.action in REFUSING:
                return self.refuse(number)
        names = {self.rules[n].policy.name for n in binding if self.rules[n].guard.action == CLAMP_FROM_START}
        if not names <= self.forced:
            self.forced |= names
            self.again = True
            self.findings.programs = self.programs()
        return None

    def note(self, number: int) -> None:
        """Write down that a guard holds, once."""
        if number not in self.noted:
            self.noted.add(number)
            self.findings.verdicts.append(self.verdict(number))

    def verdict(self, number: int) -> Verdict:
        """Return the verdict of a guard that holds."""
        (policy, guard), held = self.rules[number], self.judge.tracks[number].held
        assert held
        return Verdict(policy.name, guard.name, ACTIONS[guard.action], policy.shadow, held.position, held.statistic)

    def refuse(self, number: int) -> None:
        """End the choice with a refusal, and the other choices unless the guard spares them."""
        policy, guard = self.rules[number]
        refusing = Refusing(self.verdict(number), guard.refusal or policy.message.refusal)
        self.findings.refusing = refusing
        if not guard.spare_other_choices:
            self.siblings.refusing = self.siblings.refusing or refusing

    def ready(self) -> Output | None:
        """Return what may leave now, as one output."""
        outputs, now, bound = [], time.monotonic(), self.bound()
        while self.waiting and last_position(self.waiting[0][0]) + self.hold_back < bound:
            output, came = self.waiting.popleft()
            self.engine.metrics.held_back(now - came, len(output.token_ids))
            self.sent += len(output.token_ids)
            outputs.append(output)
        return merged(outputs) if outputs else None

    def bound(self) -> float:
        """Return the position before which all tokens are judged, and none of them ended the choice."""
        refusing = self.findings.refusing
        if self.again or (refusing and refusing.others):
            return -inf
        judged = inf if self.ended else min((self.judge.judged(number) for number in self.binding), default=inf)
        return min(judged, refusing.verdict.position) if refusing else judged

    def refused(self) -> Output:
        """Return the last output of a choice that was refused: it says what ran, and has nothing of it."""
        outcome = self.outcome or self.engine.outcome_without_run(self.extended())
        return self.nothing(
            replace(outcome, finish_reason=FinishReason.REFUSED, stop_reason=None, generated_tokens=self.sent)
        )

    def benign(self) -> list[Benign]:
        """Return the largest statistics of guards that judged something and did not hold."""
        tracks = zip(self.rules, self.judge.tracks, strict=True)
        return [
            Benign(policy.name, guard.name, track.maximum, guard.level)
            for (policy, guard), track in tracks
            if track.held is None and track.statistic.count
        ]


def last_position(output: Output) -> int:
    """Return the position of the last token of an output, or of the one before it if it has none."""
    return output.first_position + len(output.token_ids) - 1


def merged(outputs: Sequence[Output]) -> Output:
    """Join consecutive outputs, as vLLM joins those that a reader has not taken."""
    if len(outputs) == 1:
        return outputs[0]
    first, last = outputs[0], outputs[-1]
    features = [output.features for output in outputs if len(output.features.activations)]
    logprobs = [entry for output in outputs for entry in output.logprobs or ()]
    return Output(
        "".join(output.text for output in outputs),
        [token for output in outputs for token in output.token_ids],
        first.first_position,
        logprobs or None,
        joined(features) if features else NO_FEATURES,
        NO_FEATURES,
        last.outcome,
        next((output.prompt_logprobs for output in outputs if output.prompt_logprobs), None),
    )
