"""What the span of a call says: identifiers, numbers and names, never a client's text."""

from collections.abc import Iterator

from rudder.server.monitoring.spans import Event, Part, Value
from rudder.server.service.record import CallRecord, ChoiceRecord

# Outcomes that are no failure of the call.
FINE = ("OK", "CANCELLED", "POLICY_REFUSED")


def trace(record: CallRecord, model: str) -> None:
    """End the span of a closed record, if it has one."""
    if record.span:
        parts = [part for choice in record.choices for part in parts_of(choice, record.total_s)]
        error = "" if record.outcome in FINE else record.outcome
        record.span.end(attributes_of(record, model), parts, verdicts_of(record), error)


def attributes_of(record: CallRecord, model: str) -> dict[str, Value]:
    """Return the attributes of a call."""
    attributes: dict[str, Value] = {
        "rpc.method": f"rudder.v1.{record.method.replace('.', '/')}",
        "rudder.outcome": record.outcome,
        "rudder.caller": record.caller.id,
        "gen_ai.response.id": record.request_id,
    }
    if record.choices:
        attributes |= {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "rudder",
            "gen_ai.request.model": model,
            "gen_ai.request.choice.count": len(record.choices),
            "gen_ai.response.finish_reasons": [choice.finish_reason or "none" for choice in record.choices],
            "gen_ai.usage.input_tokens": record.tokens["prompt"],
            "gen_ai.usage.output_tokens": record.tokens["generated"],
            "rudder.program.digest": record.program_digest,
        }
    if record.policies:
        attributes["rudder.policy"] = [f"{policy.name}@{policy.version}" for policy in record.policies]
    if record.first_token_s is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = record.first_token_s
    return attributes


def parts_of(choice: ChoiceRecord, end: float) -> Iterator[Part]:
    """Yield what a choice spent its time on: the queue, the prompt, the answer."""
    if choice.queued_s is None:
        return
    entered = choice.started_s + choice.queued_s
    yield Part("queue", choice.started_s, entered)
    first = choice.first_token_s
    yield Part("prefill", entered, end if first is None else first)
    if first is not None:
        yield Part("decode", first, end, {"gen_ai.usage.output_tokens": choice.generated_tokens})


def verdicts_of(record: CallRecord) -> Iterator[Event]:
    """Yield the guards that held."""
    for choice in record.choices:
        for verdict in choice.verdicts:
            names = {"rudder.policy": verdict.policy, "rudder.rule": verdict.rule, "rudder.action": verdict.action}
            yield Event("rudder.verdict", names | {"rudder.shadow": verdict.shadow})
