"""The record of one call, built up while it runs: source of its log line, metrics and audit entry."""

import hashlib
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rudder.server.caller import Caller
from rudder.server.engine.call import Call, Outcome
from rudder.server.monitoring.logs import fields
from rudder.server.monitoring.metrics import Metrics
from rudder.server.monitoring.spans import CallSpan
from rudder.server.monitoring.traces import Correlation
from rudder.server.program.compile import NOTHING, Compiled
from rudder.server.safety.binding import UNBOUND, Binding
from rudder.server.safety.policy import Policy
from rudder.server.safety.verdicts import Findings, Refusing, Verdict
from rudder.server.service.errors import Refusal
from rudder.v1 import inference_pb2

MAX_LOGGED_FIELDS = 4

logger = logging.getLogger("rudder.access")


class EditRecord(NamedTuple):
    """An edit of the request's program or of a policy, the tokens that it touched, and those that rejected it."""

    origin: str
    site: str
    row: str
    operation: str
    tokens_touched: int
    tokens_rejected: int = 0
    policy: str = ""


class GateRecord(NamedTuple):
    """The gate of the request's program or of a policy: tokens at which it was open, and the statistic of its
    sequence condition after the last token, None without one.
    """

    origin: str
    site: str
    open_tokens: int
    statistic: float | None
    policy: str = ""


@dataclass
class ChoiceRecord:
    """One choice. `finish_reason` is vLLM's: `abort` if the choice is abandoned; empty while it runs or waits.

    `tokens_seen`: tokens that went through the model; `queued_s`: seconds that it waited for the bank,
    None if it never entered it. `findings`: of the guards of the policies that bind the call. `started_s`,
    `first_token_s`: seconds since the call began.
    """

    generated_tokens: int = 0
    cached_tokens: int = 0
    tokens_seen: int = 0
    queued_s: float | None = None
    finish_reason: str = ""
    edits: Sequence[EditRecord] = ()
    gates: Sequence[GateRecord] = ()
    findings: Findings = field(default_factory=Findings)
    started_s: float = 0.0
    first_token_s: float | None = None

    @property
    def verdicts(self) -> Sequence[Verdict]:
        """Guards that held, in the order in which they did."""
        return self.findings.verdicts

    @property
    def refusing(self) -> Refusing | None:
        """The verdict that ended the choice."""
        return self.findings.refusing

    def end(self, outcome: Outcome, call: Call, policies: Sequence[Policy]) -> None:
        """Take over the engine's outcome of a call, which is of the tokens so far if the choice is abandoned."""
        self.generated_tokens, self.cached_tokens = outcome.generated_tokens, outcome.cached_tokens
        self.tokens_seen, self.queued_s = outcome.tokens_seen, outcome.queued_s
        self.finish_reason = outcome.finish_reason
        stages = stages_run(call, policies)
        moved, rejected = (outcome.moved, *outcome.policy_moved), (outcome.rejected, *outcome.policy_rejected)
        nothing = ((),) * (len(moved) - len(rejected))
        self.edits = [
            EditRecord(stage.origin, name.site, name.row, name.operation, touched, lost, stage.policy)
            for stage, counts, losses in zip(stages, moved, (*rejected, *nothing), strict=True)
            for name, touched, lost in zip(stage.compiled.edits, counts, losses or (0,) * len(counts), strict=True)
        ]
        self.gates = [
            GateRecord(stage.origin, stage.compiled.gate_site, gate.open_tokens, gate.statistic, stage.policy)
            for gate in outcome.gates
            for stage in [stages[gate.stage]]
        ]


class StageRun(NamedTuple):
    """A stage of a call: whose program ran there. `policy`: its name, empty for the request's own program."""

    origin: str
    policy: str
    compiled: Compiled


def stages_run(call: Call, policies: Sequence[Policy]) -> list[StageRun]:
    """Return the stages of a call that these policies bind."""
    names = [policy.name for policy in policies if policy.programs]
    own = StageRun("request", "", call.compiled or NOTHING)
    return [own, *(StageRun("policy", name, p) for name, p in zip(names, call.policies, strict=True))]


@dataclass
class CallRecord:
    """One call. Times are of `time.monotonic`, durations in seconds.

    `binding`: the policies that bind it, as when it began. `topic`: what the request's topic stood for. `outcome`: OK,
    a key of `errors.REASONS`, CANCELLED or DEADLINE_EXCEEDED; empty while the call runs. `request_bytes`: of its
    message. `audited`: its audit entry was handed over. `span`: of the call, if the server traces.
    """

    method: str
    caller: Caller
    correlation: Correlation
    request_id: str = field(default_factory=lambda: secrets.token_hex(12))
    request_bytes: int = 0
    started: float = field(default_factory=time.monotonic)
    program_digest: str = ""
    binding: Binding = UNBOUND
    topic: inference_pb2.ResolvedTopic | None = None
    prompt_tokens: int = 0
    choices: list[ChoiceRecord] = field(default_factory=list)
    first_token_s: float | None = None
    total_s: float = 0.0
    outcome: str = ""
    refused_fields: Sequence[str] = ()
    error_id: str = ""
    audited: bool = False
    span: CallSpan | None = None

    @property
    def trace_id(self) -> str:
        """The trace of the call: its client's, or the one that began here; empty where there is none."""
        return self.correlation.trace_id or (self.span.trace_id if self.span else "")

    @property
    def routing_key(self) -> str:
        """What calls have in common that may share a prefix cache, for routers: 32 hex digits, and no secret."""
        return hashlib.sha256(f"{self.caller.tenant}\0{self.program_digest}".encode()).hexdigest()[:32]

    @property
    def policies(self) -> tuple[Policy, ...]:
        """The policies that bind the call, in the order in which they apply."""
        return self.binding.policies

    @property
    def policy_digest(self) -> str:
        """SHA-256 over the digests of the policies that bind the call; empty if none does."""
        digests = "".join(policy.digest for policy in self.policies)
        return hashlib.sha256(digests.encode()).hexdigest() if digests else ""

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens of the prompt, those of them that the prefix cache had, and those generated in all choices."""
        return {
            "prompt": self.prompt_tokens,
            "cached": max((choice.cached_tokens for choice in self.choices), default=0),
            "generated": sum(choice.generated_tokens for choice in self.choices),
        }

    @property
    def elapsed_s(self) -> float:
        """Seconds since the call began."""
        return time.monotonic() - self.started

    def end(self, outcome: str, refusal: Refusal | None = None) -> None:
        """Close the record. A call that is answered with a refusal has an outcome of its own."""
        if outcome == "OK" and any(choice.refusing for choice in self.choices):
            outcome = "POLICY_REFUSED"
        self.outcome, self.total_s = outcome, self.elapsed_s
        if refusal:
            self.refused_fields, self.error_id = [v.field for v in refusal.violations], refusal.error_id


def export(record: CallRecord, metrics: Metrics) -> None:
    """Count a closed record."""
    caller = record.caller.id
    metrics.request_ended(record.method, record.outcome, record.total_s, caller, record.trace_id)
    for kind, tokens in record.tokens.items() if record.choices else ():
        metrics.caller_tokens(caller, kind, tokens)
    shadows = {policy.name for policy in record.policies if policy.shadow}
    for edit in (edit for choice in record.choices for edit in choice.edits):
        origin = "shadow" if edit.policy in shadows else edit.origin
        metrics.edit_applied(edit.site, edit.operation, origin, edit.policy, edit.tokens_touched)
        if edit.tokens_rejected:
            metrics.edit_rejected(edit.site, origin, edit.policy, edit.tokens_rejected)
    for choice in record.choices:
        if choice.queued_s is not None:
            metrics.request_queued(choice.queued_s)
        for verdict in choice.verdicts:
            metrics.guard_held(verdict.policy, verdict.rule, verdict.action, "shadow" if verdict.shadow else "enforce")
        for benign in choice.findings.benign:
            metrics.benign_score(*benign)


def log(record: CallRecord) -> None:
    """Write the access-log line of a closed record: identifiers, numbers and names of fields, never a client's text."""
    choices = record.choices
    tokens = {
        **{f"{kind}_tokens": count for kind, count in record.tokens.items()},
        "edited_tokens": sum(edit.tokens_touched for choice in choices for edit in choice.edits),
        "finish": [choice.finish_reason or "none" for choice in choices],
    }
    logger.info(
        "call ended",
        extra=fields(
            method=record.method,
            outcome=record.outcome,
            request_id=record.request_id,
            correlation_id=record.correlation.correlation_id,
            trace_id=record.trace_id,
            caller=record.caller.id,
            refused_fields=record.refused_fields[:MAX_LOGGED_FIELDS] or None,
            error_id=record.error_id,
            program=record.program_digest,
            policies=[f"{policy.name}@{policy.version}" for policy in record.policies] or None,
            refused_by=[choice.refusing.rule for choice in choices if choice.refusing] or None,
            **tokens if choices else {},
            queued_s=rounded(max((c.queued_s for c in choices if c.queued_s is not None), default=None)),
            first_token_s=rounded(record.first_token_s),
            total_s=rounded(record.total_s),
        ),
    )


def rounded(seconds: float | None) -> float | None:
    """Return a duration to 0.1 ms."""
    return None if seconds is None else round(seconds, 4)
