"""From a job to its deltas: all choices at once, at the pace of all streams."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

import numpy as np

from rudder.server.engine.call import Call, FinishReason, Outcome
from rudder.server.safety.holdback import released
from rudder.server.safety.verdicts import Siblings
from rudder.server.service.deltas import Choice, delta_of, finish
from rudder.server.service.errors import Refusal
from rudder.server.service.pace import Stream
from rudder.server.service.prepare import Job
from rudder.server.service.quotas import Demand, demand_of
from rudder.server.service.record import CallRecord, ChoiceRecord
from rudder.server.service.serving import Serving
from rudder.v1 import inference_pb2

Emit = Callable[[inference_pb2.ChoiceDelta], Awaitable[None]]


async def run(serving: Serving, job: Job, record: CallRecord, emit: Emit) -> None:
    """Run all choices of a job at once. Each delta goes to `emit`, one at a time."""
    record.program_digest = job.program_digest
    record.topic = job.topic
    record.prompt_tokens = len(job.calls[0].prompt_ids)
    record.choices = [ChoiceRecord() for _ in job.calls]
    emitting = asyncio.Lock()

    async def emit_alone(delta: inference_pb2.ChoiceDelta) -> None:
        async with emitting:
            # What waited here while telemetry was lost does not leave any more.
            serving.engine.require_alive()
            await emit(delta)

    with serving.quotas.reserved(record.caller, demand_of(job.calls), lambda: used_of(record)):
        await run_choices(serving, job, record, emit_alone)


def used_of(record: CallRecord) -> Demand:
    """Return what a call has used of its caller's quotas: prompts of choices that entered the engine, and answers."""
    entered = sum(choice.queued_s is not None for choice in record.choices)
    generated = sum(choice.generated_tokens for choice in record.choices)
    return Demand(len(record.choices), 0, entered * record.prompt_tokens, generated)


async def run_choices(serving: Serving, job: Job, record: CallRecord, emit: Emit) -> None:
    """Run all choices of a job at once; one that fails ends the others."""
    siblings = Siblings()
    async with asyncio.TaskGroup() as tasks:
        for index, (call, choice_record) in enumerate(zip(traced(job.calls, record), record.choices, strict=True)):
            uncounted = np.array(serving.engine.uncounted(call), np.int64)
            choice_record.started_s = record.elapsed_s
            choice = Choice(index, call, uncounted, choice_record)
            tasks.create_task(run_choice(serving, job, record, choice, siblings, emit))


def traced(calls: Sequence[Call], record: CallRecord) -> Sequence[Call]:
    """Return the engine calls with the headers by which vLLM's spans join the call's trace."""
    if record.span is None:
        return calls
    return [replace(call, trace_headers=record.span.headers) for call in calls]


async def run_choice(
    serving: Serving, job: Job, record: CallRecord, choice: Choice, siblings: Siblings, emit: Emit
) -> None:
    """Run one choice, and record how far it came in whatever way it ends."""
    stream, findings = Stream(serving.pace, choice.call.sampling.max_tokens or 0), choice.record.findings

    def end(outcome: Outcome) -> None:
        choice.record.end(outcome, findings.as_run(choice.call), record.policies)

    outputs = released(serving.engine, choice.call, record.policies, findings, siblings, end, inspects=job.inspects)

    serving.pace.streams += 1
    try:
        # Closing the iterator aborts the request in the engine.
        async with aclosing(outputs):
            async for output in outputs:
                choice.record.generated_tokens += len(output.token_ids)
                delta = await delta_of(job, choice, output)
                if output.outcome:
                    end(output.outcome)
                    require_completed(output.outcome, serving)
                    finish(delta, job, choice, record, output.outcome.stop_reason, serving.engine.epoch)
                await emit(delta)
                observe_message(serving, record, choice.record, stream, len(output.token_ids))
                await stream.wait_for_turn()
    finally:
        serving.pace.streams -= 1


def require_completed(outcome: Outcome, serving: Serving) -> None:
    """Raise Refusal if the engine aborted a call that is still being read: its answer is cut off."""
    if outcome.finish_reason is FinishReason.ABORT:
        raise Refusal("DRAINING" if serving.draining else "ENGINE_DEAD", "the engine aborted the call")


def observe_message(serving: Serving, record: CallRecord, choice: ChoiceRecord, stream: Stream, tokens: int) -> None:
    """Count a message that was sent, and the time that its tokens took."""
    first = not stream.messages
    stream.sent(tokens)
    serving.metrics.stream_message(tokens)
    trace_id = record.trace_id
    if first:
        elapsed_s = choice.first_token_s = record.elapsed_s
        serving.metrics.first_token(elapsed_s, trace_id)
        record.first_token_s = record.first_token_s or elapsed_s
    else:
        serving.metrics.inter_token(stream.seconds_per_token, tokens, trace_id)


async def run_whole(serving: Serving, job: Job, record: CallRecord) -> list[inference_pb2.ChoiceDelta]:
    """Run a job and return the deltas of each choice merged into one."""
    wholes = [inference_pb2.ChoiceDelta(index=i) for i in range(len(job.calls))]

    async def merge(delta: inference_pb2.ChoiceDelta) -> None:
        whole = wholes[delta.index]
        text = whole.text + delta.text
        whole.MergeFrom(delta)
        whole.text = text

    await run(serving, job, record, merge)
    return wholes
