"""From a request to a job: check, compile, tokenise, one engine call per choice."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from rudder.server.caller import Caller
from rudder.server.engine.call import Call
from rudder.server.program.compile import Compiled, compile_program
from rudder.server.program.rows import LockedRows
from rudder.server.program.watch import Watched, compile_watch
from rudder.server.safety.binding import binding_policy, locked_rows
from rudder.server.service import limits
from rudder.server.service.columns import FeatureTable
from rudder.server.service.errors import invalid
from rudder.server.service.prompt import prompt_ids
from rudder.server.service.sampling import sampling_of
from rudder.server.service.serving import Serving, bundle_at_site, feature_info
from rudder.v1 import inference_pb2

Request = inference_pb2.GenerateRequest | inference_pb2.CompleteRequest | inference_pb2.InspectRequest
MAX_CACHED_WATCHES = 256


@dataclass(frozen=True)
class Job:
    """A request ready to run: one call per choice."""

    calls: tuple[Call, ...]
    report: inference_pb2.Report
    features: FeatureTable

    @property
    def program_digest(self) -> str:
        """Digest of the request's program; empty without one."""
        program = self.calls[0].compiled
        return program.digest if program else ""

    @property
    def policy_digest(self) -> str:
        """Digest of the policy that binds the caller; empty without one."""
        policy = self.calls[0].policy
        return policy.digest if policy else ""


async def prepare(serving: Serving, caller: Caller, request: Request) -> Job:
    """Check a request of `caller` and compile it. Raises Refusal or ProgramError if a field is wrong."""
    limits.check(request, serving.bounds)
    policy = binding_policy(serving.engine, caller)
    program = requested_program(serving, request.steering, locked_rows(policy))
    sites = top_k_sites(serving, request.report)
    ids = await serving.in_tokenizer_thread(
        lambda: prompt_ids(request.prompt, serving.engine.tokenizer, serving.bounds)
    )
    report = request.report
    reads_prompt = report.prompt or isinstance(request, inference_pb2.InspectRequest)
    call = Call(
        prompt_ids=ids,
        sampling=sampling_of(inference_pb2.Sampling(max_tokens=1), 0, 0),
        compiled=program,
        policy=policy,
        watch=watched_rows(serving, report, reads_prompt),
        top_k=report.top_k,
        top_k_sites=sites,
        top_k_prompt=reads_prompt,
        caller=caller,
    )
    table = FeatureTable([watched_feature_info(serving, w) for w in report.features], sites, info_lookup(serving))
    if isinstance(request, inference_pb2.InspectRequest):
        return Job((call,), report, table)
    interval = request.stream_interval if isinstance(request, inference_pb2.GenerateRequest) else 0
    sampling = with_max_tokens(request.sampling, len(ids), serving.engine.model.max_model_len)
    call = replace(call, cache_salt=request.cache_salt)
    choices = range(sampling.n or 1)
    calls = tuple(replace(call, sampling=sampling_of(sampling, choice, interval)) for choice in choices)
    return Job(calls, report, table)


def requested_program(serving: Serving, steering: inference_pb2.Steering, locked: LockedRows) -> Compiled | None:
    """Return the request's program, compiled: the operator's of that name, or its own."""
    match steering.WhichOneof("steering"):
        case "name":
            if steering.name not in serving.engine.programs:
                raise invalid("steering.name", f"no program {steering.name!r} is served", "PROGRAM_UNKNOWN")
            return serving.engine.programs[steering.name].compiled
        case "program":
            return compile_program(steering.program, serving.engine.registry, locked=locked, field="steering.program")
    return None


def watched_rows(serving: Serving, report: inference_pb2.Report, prompt: bool) -> tuple[Watched, ...]:
    """Return the rows that a report names, compiled. Clients repeat their reports, so results are cached."""
    if not report.features:
        return ()
    key = inference_pb2.Report(features=report.features, prompt=prompt).SerializeToString(deterministic=True)
    if key not in serving.watched:
        rows = [(feature.site, feature.row) for feature in report.features]
        if len(serving.watched) >= MAX_CACHED_WATCHES:
            serving.watched.clear()
        serving.watched[key] = compile_watch(rows, serving.engine.registry, "report.features", prompt=prompt)
    return serving.watched[key]


def top_k_sites(serving: Serving, report: inference_pb2.Report) -> tuple[str, ...]:
    """Return the sites at which the whole dictionary is read."""
    for i, site in enumerate(report.sites):
        if bundle_at_site(serving.engine, site) is None:
            raise invalid(f"report.sites[{i}]", f"no bundle is served at {site!r}", "SITE_UNKNOWN")
    if not report.top_k:
        return ()
    sites = tuple(dict.fromkeys(report.sites)) or tuple(b.manifest.site for b in serving.engine.bundles.values())
    if not sites:
        raise invalid("report.top_k", "no bundle is served")
    return sites


def with_max_tokens(sampling: inference_pb2.Sampling, prompt: int, max_model_len: int) -> inference_pb2.Sampling:
    """Return the sampling with max_tokens set. A requested value must fit beside the prompt; the default shrinks."""
    room = max_model_len - prompt
    result = inference_pb2.Sampling()
    result.CopyFrom(sampling)
    if not sampling.HasField("max_tokens"):
        result.max_tokens = min(limits.DEFAULT_MAX_TOKENS, room)
    if result.max_tokens > room:
        problem = (
            f"{sampling.max_tokens} with a prompt of {prompt} tokens is more than the {max_model_len} that the model"
            " takes"
        )
        raise invalid("sampling.max_tokens", problem)
    return result


def info_lookup(serving: Serving) -> Callable[[str, int], inference_pb2.FeatureInfo]:
    """Return `feature_info` of this server."""
    return lambda site, latent: feature_info(serving, site, latent)


def watched_feature_info(serving: Serving, feature: inference_pb2.SiteFeature) -> inference_pb2.FeatureInfo:
    """Return the FeatureInfo of a row that a report names; `compile_watch` checks that the row exists."""
    match feature.row.WhichOneof("row"):
        case "probe":
            return inference_pb2.FeatureInfo(site=feature.site, label=feature.row.probe.name)
        case "feature":
            bundle = feature.row.feature.bundle or bundle_at_site(serving.engine, feature.site) or ""
            labels, index = serving.labels.get(bundle, []), feature.row.feature.index
            label = labels[index] if index < len(labels) else ""
            return inference_pb2.FeatureInfo(site=feature.site, bundle=bundle, index=index, label=label)
    return inference_pb2.FeatureInfo(site=feature.site)
