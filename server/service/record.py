"""The record of one call, built up while it runs: source of its log line and metrics, later of its audit entry."""

import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rudder.server.caller import Caller
from rudder.server.engine.call import Outcome
from rudder.server.monitoring.logs import fields
from rudder.server.monitoring.metrics import Metrics
from rudder.server.monitoring.traces import Correlation
from rudder.server.program.compile import Compiled
from rudder.server.service.errors import Refusal
from rudder.v1 import inference_pb2

MAX_LOGGED_FIELDS = 4

logger = logging.getLogger("rudder.access")


class EditRecord(NamedTuple):
    """An edit of the request's program or of the policy, the tokens that it touched, and those that rejected it."""

    origin: str
    site: str
    row: str
    operation: str
    tokens_touched: int
    tokens_rejected: int = 0


class GateRecord(NamedTuple):
    """The gate of the request's program or of the policy: tokens at which it was open, and the statistic of its
    sequence condition after the last token, None without one.
    """

    origin: str
    site: str
    open_tokens: int
    statistic: float | None


ORIGINS = ("request", "policy")


@dataclass
class ChoiceRecord:
    """One choice. `finish_reason` is vLLM's: `abort` if the choice is abandoned; empty while it runs or waits.

    `tokens_seen`: tokens that went through the model; `queued_s`: seconds that it waited for the bank,
    None if it never entered it.
    """

    generated_tokens: int = 0
    cached_tokens: int = 0
    tokens_seen: int = 0
    queued_s: float | None = None
    finish_reason: str = ""
    edits: Sequence[EditRecord] = ()
    gates: Sequence[GateRecord] = ()

    def end(self, outcome: Outcome, program: Compiled | None, policy: Compiled | None) -> None:
        """Take over the engine's outcome, which is of the tokens so far if the choice is abandoned."""
        self.generated_tokens, self.cached_tokens = outcome.generated_tokens, outcome.cached_tokens
        self.tokens_seen, self.queued_s = outcome.tokens_seen, outcome.queued_s
        self.finish_reason = outcome.finish_reason
        self.edits = [
            EditRecord(origin, name.site, name.row, name.operation, touched, rejected)
            for origin, compiled, counts, rejections in (
                ("request", program, outcome.moved, outcome.rejected),
                ("policy", policy, outcome.policy_moved, outcome.policy_rejected),
            )
            for name, touched, rejected in zip(
                compiled.edits if compiled else (), counts, rejections or (0,) * len(counts), strict=True
            )
        ]
        self.gates = [
            GateRecord(ORIGINS[gate.stage], compiled.gate_site, gate.open_tokens, gate.statistic)
            for gate in outcome.gates
            if (compiled := (program, policy)[gate.stage])
        ]


@dataclass
class CallRecord:
    """One call. Times are of `time.monotonic`, durations in seconds.

    `topic`: what the request's topic stood for. `outcome`: OK, a key of `errors.REASONS`, CANCELLED or
    DEADLINE_EXCEEDED; empty while the call runs.
    """

    method: str
    caller: Caller
    correlation: Correlation
    request_id: str = field(default_factory=lambda: secrets.token_hex(12))
    started: float = field(default_factory=time.monotonic)
    program_digest: str = ""
    policy_digest: str = ""
    topic: inference_pb2.ResolvedTopic | None = None
    prompt_tokens: int = 0
    choices: list[ChoiceRecord] = field(default_factory=list)
    first_token_s: float | None = None
    total_s: float = 0.0
    outcome: str = ""
    refused_fields: Sequence[str] = ()
    error_id: str = ""

    @property
    def elapsed_s(self) -> float:
        """Seconds since the call began."""
        return time.monotonic() - self.started

    def end(self, outcome: str, refusal: Refusal | None = None) -> None:
        """Close the record."""
        self.outcome, self.total_s = outcome, self.elapsed_s
        if refusal:
            self.refused_fields, self.error_id = [v.field for v in refusal.violations], refusal.error_id


def export(record: CallRecord, metrics: Metrics) -> None:
    """Count a closed record."""
    metrics.request_ended(record.method, record.outcome, record.total_s)
    for edit in (edit for choice in record.choices for edit in choice.edits):
        metrics.edit_applied(edit.site, edit.operation, edit.origin, edit.tokens_touched)
        if edit.tokens_rejected:
            metrics.edit_rejected(edit.site, edit.origin, edit.tokens_rejected)


def log(record: CallRecord) -> None:
    """Write the access-log line of a closed record: identifiers, numbers and names of fields, never a client's text."""
    choices = record.choices
    tokens = {
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": max((choice.cached_tokens for choice in choices), default=0),
        "generated_tokens": sum(choice.generated_tokens for choice in choices),
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
            trace_id=record.correlation.trace_id,
            caller=record.caller.id,
            refused_fields=record.refused_fields[:MAX_LOGGED_FIELDS] or None,
            error_id=record.error_id,
            program=record.program_digest,
            policy=record.policy_digest,
            **tokens if choices else {},
            queued_s=rounded(max((c.queued_s for c in choices if c.queued_s is not None), default=None)),
            first_token_s=rounded(record.first_token_s),
            total_s=rounded(record.total_s),
        ),
    )


def rounded(seconds: float | None) -> float | None:
    """Return a duration to 0.1 ms."""
    return None if seconds is None else round(seconds, 4)
