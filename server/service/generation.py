"""One request, from its checked message to the engine's calls and back to deltas; all methods share it."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from rudder.server.caller import ANONYMOUS
from rudder.server.engine.call import Call, FinishReason, Outcome, Output
from rudder.server.engine.telemetry.hub import Features
from rudder.server.monitoring import metrics
from rudder.server.program.compile import Compiled, compile_program
from rudder.server.program.rows import LockedRows
from rudder.server.program.watch import Watched, compile_watch
from rudder.server.safety.binding import binding_policy, locked_rows
from rudder.server.service import columns, limits
from rudder.server.service.columns import Entries, Names, Pool
from rudder.server.service.errors import invalid
from rudder.server.service.pace import Stream
from rudder.server.service.prompt import prompt_ids
from rudder.server.service.sampling import sampling_of
from rudder.server.service.serving import Serving, bundle_at, feature_info
from rudder.v1 import inference_pb2

Emit = Callable[[inference_pb2.ChoiceDelta], Awaitable[None]]
REMEMBERED_WATCHES = 256
FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: inference_pb2.FINISH_REASON_ABORT,
    FinishReason.ERROR: inference_pb2.FINISH_REASON_ERROR,
    FinishReason.REPETITION: inference_pb2.FINISH_REASON_REPETITION,
    FinishReason.REFUSED: inference_pb2.FINISH_REASON_REFUSED,
}


@dataclass(frozen=True)
class Job:
    """A request ready to run: one call per choice."""

    calls: tuple[Call, ...]
    report: inference_pb2.Report
    names: Names

    @property
    def digest(self) -> str:
        """Of the request's program; empty without one."""
        compiled = self.calls[0].compiled
        return compiled.digest if compiled else ""


@dataclass
class Progress:
    """What of a choice has to be remembered between its outputs."""

    index: int
    call: Call
    bos: bool
    pool: Pool = field(default_factory=Pool)


async def prepare(
    serving: Serving,
    request: inference_pb2.GenerateRequest | inference_pb2.CompleteRequest | inference_pb2.InspectRequest,
) -> Job:
    """Check a request and compile it. Refusal or ProgramError: a field is wrong."""
    limits.check(request, serving.bounds)
    policy = binding_policy(serving.engine, ANONYMOUS)
    compiled = steering_of(serving, request.steering, locked_rows(policy))
    sites = top_k_sites(serving, request.report)
    ids = await serving.in_tokenizer_thread(
        lambda: prompt_ids(request.prompt, serving.engine.tokenizer, serving.bounds)
    )
    report = request.report
    whole = isinstance(request, inference_pb2.InspectRequest)
    call = Call(
        prompt_ids=ids,
        sampling=sampling_of(inference_pb2.Sampling(max_tokens=1), 0, 0),
        compiled=compiled,
        policy=policy,
        watch=watched_rows(serving, report, report.prompt or whole),
        top_k=report.top_k,
        top_k_sites=sites,
        top_k_prompt=report.prompt or whole,
        caller=ANONYMOUS,
    )
    names = Names([watched_info(serving, feature) for feature in report.features], sites, partial_info(serving))
    if isinstance(request, inference_pb2.InspectRequest):
        return Job((call,), report, names)
    interval = request.stream_interval if isinstance(request, inference_pb2.GenerateRequest) else 0
    sampling = with_room(request.sampling, len(ids), serving.engine.model.max_model_len)
    choices = range(sampling.n or 1)
    call = replace(call, cache_salt=request.cache_salt)
    return Job(tuple(replace(call, sampling=sampling_of(sampling, i, interval)) for i in choices), report, names)


def watched_rows(serving: Serving, report: inference_pb2.Report, prompt: bool) -> tuple[Watched, ...]:
    """The rows that a request wants reported. Callers ask for the same ones again and again."""
    if not report.features:
        return ()
    key = inference_pb2.Report(features=report.features, prompt=prompt).SerializeToString(deterministic=True)
    if key not in serving.watched:
        rows = [(feature.site, feature.row) for feature in report.features]
        if len(serving.watched) >= REMEMBERED_WATCHES:
            serving.watched.clear()
        serving.watched[key] = compile_watch(rows, serving.engine.registry, "report.features", prompt=prompt)
    return serving.watched[key]


def steering_of(serving: Serving, steering: inference_pb2.Steering, locked: LockedRows) -> Compiled | None:
    """The request's program, compiled."""
    match steering.WhichOneof("steering"):
        case "name":
            if steering.name not in serving.engine.programs:
                raise invalid("steering.name", f"no program {steering.name!r} is served", "PROGRAM_UNKNOWN")
            return serving.engine.programs[steering.name].compiled
        case "program":
            return compile_program(steering.program, serving.engine.registry, locked=locked, field="steering.program")
    return None


def top_k_sites(serving: Serving, report: inference_pb2.Report) -> tuple[str, ...]:
    """The sites whose whole dictionary is read."""
    for i, site in enumerate(report.sites):
        if bundle_at(serving.engine, site) is None:
            raise invalid(f"report.sites[{i}]", f"no bundle is served at {site!r}", "SITE_UNKNOWN")
    if not report.top_k:
        return ()
    sites = tuple(dict.fromkeys(report.sites)) or tuple(b.manifest.site for b in serving.engine.bundles.values())
    if not sites:
        raise invalid("report.top_k", "no bundle is served")
    return sites


def with_room(sampling: inference_pb2.Sampling, prompt: int, longest: int) -> inference_pb2.Sampling:
    """The sampling with its max_tokens set. What was asked for must fit; the default shrinks to what does."""
    room = longest - prompt
    result = inference_pb2.Sampling()
    result.CopyFrom(sampling)
    if not sampling.HasField("max_tokens"):
        result.max_tokens = min(limits.DEFAULT_MAX_TOKENS, room)
    if result.max_tokens > room:
        problem = (
            f"{sampling.max_tokens} with a prompt of {prompt} tokens is more than the {longest} that the model takes"
        )
        raise invalid("sampling.max_tokens", problem)
    return result


def partial_info(serving: Serving) -> Callable[[str, int], inference_pb2.FeatureInfo]:
    """Names latents for a stream."""
    return lambda site, latent: feature_info(serving, site, latent)


def watched_info(serving: Serving, feature: inference_pb2.SiteFeature) -> inference_pb2.FeatureInfo:
    """The name of a reported row; whether it exists is for the engine to say."""
    match feature.row.WhichOneof("row"):
        case "probe":
            return inference_pb2.FeatureInfo(site=feature.site, label=feature.row.probe.name)
        case "feature":
            bundle = feature.row.feature.bundle or bundle_at(serving.engine, feature.site) or ""
            labels, index = serving.labels.get(bundle, []), feature.row.feature.index
            label = labels[index] if index < len(labels) else ""
            return inference_pb2.FeatureInfo(site=feature.site, bundle=bundle, index=index, label=label)
    return inference_pb2.FeatureInfo(site=feature.site)


async def run(serving: Serving, job: Job, emit: Emit) -> None:
    """Run all choices of a job at once, each delta to `emit`, one at a time."""
    writing = asyncio.Lock()

    async def emit_alone(delta: inference_pb2.ChoiceDelta) -> None:
        async with writing:
            await emit(delta)

    async with asyncio.TaskGroup() as choices:
        for index, call in enumerate(job.calls):
            choices.create_task(
                run_choice(serving, job, Progress(index, call, starts_with_bos(serving, call)), emit_alone)
            )


async def run_choice(serving: Serving, job: Job, progress: Progress, emit: Emit) -> None:
    """Run one choice at the pace that all streams keep."""
    stream = Stream(serving.pace, progress.call.sampling.max_tokens or 0)
    serving.pace.streams += 1
    try:
        # The iterator is closed, and so the request aborted, in whatever way this ends.
        async with aclosing(serving.engine.stream(progress.call)) as outputs:
            async for output in outputs:
                await emit(delta_of(serving, job, progress, output))
                await stream.rest(len(output.token_ids))
    finally:
        serving.pace.streams -= 1


def delta_of(serving: Serving, job: Job, progress: Progress, output: Output) -> inference_pb2.ChoiceDelta:
    """What of an output the client is told."""
    delta = inference_pb2.ChoiceDelta(
        index=progress.index,
        text=output.text,
        token_ids=output.token_ids,
        logprobs=columns.logprobs(output.logprobs, progress.call.sampling.logprobs or 0),
    )
    if len(output.features.activations):
        entries = columns.entries_of(output.features, job.names)
        if job.report.pooled:
            progress.pool.add(*without_bos(entries, output.features, progress.bos))
        if not job.report.no_tokens and len(entries.positions):
            delta.activations.CopyFrom(columns.columns(entries))
    if output.outcome:
        finish(delta, serving, job, progress, output.outcome)
    return delta


def starts_with_bos(serving: Serving, call: Call) -> bool:
    """Whether position 0 holds the BOS token, which says nothing about the text."""
    return call.prompt_ids[0] == serving.engine.model.bos_token_id


def without_bos(entries: Entries, features: Features, bos: bool) -> tuple[Entries, int]:
    """The entries to pool, and the number of tokens they are of."""
    if not bos or features.first > 0:
        return entries, len(features.activations)
    kept = entries.positions > 0
    return Entries(entries.positions[kept], entries.places[kept], entries.values[kept]), len(features.activations) - 1


def finish(delta: inference_pb2.ChoiceDelta, serving: Serving, job: Job, progress: Progress, outcome: Outcome) -> None:
    """What the last delta of a choice says beside its tokens."""
    delta.finish_reason = FINISH_REASONS[outcome.finish_reason]
    delta.stop_reason = "" if outcome.stop_reason is None else str(outcome.stop_reason)
    if job.report.pooled:
        delta.pooled.extend(progress.pool.features(job.names.watched))
    delta.usage.prompt_tokens = outcome.prompt_tokens
    delta.usage.generated_tokens = outcome.generated_tokens
    delta.usage.cached_tokens = outcome.cached_tokens
    delta.attestation.CopyFrom(attestation_of(serving, progress.call, outcome))


def attestation_of(serving: Serving, call: Call, outcome: Outcome) -> inference_pb2.Attestation:
    """What ran, as the worker counted it."""
    policy = call.policy
    attestation = inference_pb2.Attestation(
        program_digest=call.compiled.digest if call.compiled else "",
        policy_digest=policy.digest if policy else "",
        tokens_seen=outcome.tokens_seen,
        engine_epoch=serving.engine.epoch,
    )
    for origin, compiled, moved in (
        ("request", call.compiled, outcome.moved),
        ("policy", policy, outcome.policy_moved),
    ):
        for name, tokens in zip(compiled.edits if compiled else (), moved, strict=True):
            attestation.edits.add(
                origin=origin, site=name.site, row=name.row, operation=name.operation, tokens_touched=tokens
            )
            metrics.edits_applied(name.site, name.operation, origin, tokens)
    return attestation
