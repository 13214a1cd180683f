"""From the engine's outputs to the contract's deltas of a choice."""

import asyncio
from dataclasses import dataclass, field

import numpy as np

from rudder.server.engine.call import Call, FinishReason, Output
from rudder.server.engine.telemetry.hub import Features
from rudder.server.service import columns
from rudder.server.service.attestation import attestation_of, policy_refusal
from rudder.server.service.columns import Activations, Ints, PoolingState
from rudder.server.service.prepare import Job
from rudder.server.service.record import CallRecord, ChoiceRecord
from rudder.v1 import inference_pb2

FINISH_REASONS: dict[str, inference_pb2.FinishReason] = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: inference_pb2.FINISH_REASON_ABORT,
    FinishReason.ERROR: inference_pb2.FINISH_REASON_ERROR,
    FinishReason.REPETITION: inference_pb2.FINISH_REASON_REPETITION,
    FinishReason.REFUSED: inference_pb2.FINISH_REASON_REFUSED,
}


@dataclass
class Choice:
    """State of one choice between its outputs.

    `uncounted`: positions that are not pooled, in ascending order: that of BOS, and excluded ones.
    """

    index: int
    call: Call
    uncounted: Ints
    record: ChoiceRecord
    pooling: PoolingState = field(default_factory=PoolingState)


async def delta_of(job: Job, choice: Choice, output: Output) -> inference_pb2.ChoiceDelta:
    """Convert an engine output to a ChoiceDelta, without what `finish` adds to the last one.

    An output may have the features of a whole prompt. They are converted in parts, between which other streams run.
    """
    delta = inference_pb2.ChoiceDelta(
        index=choice.index,
        text=output.text,
        token_ids=output.token_ids,
        logprobs=columns.logprobs(output.logprobs, choice.call.sampling.logprobs or 0),
        prompt_logprobs=prompt_logprobs(output, choice.call),
    )
    if len(output.features.activations):
        for part in columns.slices(output.features):
            if part.first > output.features.first:
                await asyncio.sleep(0)
            activations = columns.activations_of(part, job.features)
            if job.report.pooled:
                choice.pooling.add(*counted_part(activations, part, choice.uncounted))
            if not job.report.no_tokens and len(activations.positions):
                delta.activations.MergeFrom(columns.feature_columns(activations))
    return delta


def prompt_logprobs(output: Output, call: Call) -> inference_pb2.Logprobs | None:
    """Convert the log-probabilities of the prompt's tokens, of which the first has none."""
    if not output.prompt_logprobs:
        return None
    return columns.logprobs([entry for entry in output.prompt_logprobs if entry], call.sampling.prompt_logprobs or 0)


def counted_part(activations: Activations, features: Features, uncounted: Ints) -> tuple[Activations, int]:
    """Return the activations to pool, and the number of tokens that they are of."""
    tokens = len(features.activations)
    begin, end = np.searchsorted(uncounted, (features.first, features.end)).tolist()
    if begin == end:
        return activations, tokens
    counted = ~np.isin(activations.positions, uncounted[begin:end])
    positions, numbers, values = activations
    return Activations(positions[counted], numbers[counted], values[counted]), tokens - (end - begin)


def finish(
    delta: inference_pb2.ChoiceDelta, job: Job, choice: Choice, call: CallRecord, stop_reason: object, epoch: str
) -> None:
    """Add to the last delta of a choice how it ended: finish reason, pooled features, usage, attestation."""
    record = choice.record
    delta.finish_reason = FINISH_REASONS[record.finish_reason]
    delta.stop_reason = "" if stop_reason is None else str(stop_reason)
    match stop_reason:
        case str():
            delta.stop_string = stop_reason
        case int():
            delta.stop_token_id = stop_reason
    if record.refusing:
        delta.refusal.CopyFrom(policy_refusal(call, record.refusing))
    if job.report.pooled:
        delta.pooled.extend(choice.pooling.features(job.features.watched))
    delta.usage.prompt_tokens = call.prompt_tokens
    delta.usage.generated_tokens = record.generated_tokens
    delta.usage.cached_tokens = record.cached_tokens
    delta.attestation.CopyFrom(attestation_of(call, record, epoch))
