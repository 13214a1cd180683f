"""From a request to a job: check, compile, tokenise, one engine call per choice."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rudder.server.caller import Caller
from rudder.server.engine.adapter import check_bad_words
from rudder.server.engine.call import Call
from rudder.server.program.cache import rows_size
from rudder.server.program.compile import Compiled
from rudder.server.program.errors import ProgramError
from rudder.server.program.watch import Watched, compile_watch
from rudder.server.safety.binding import UNBOUND, Binding, stages_of
from rudder.server.safety.holdback import tokens_beyond
from rudder.server.service import limits
from rudder.server.service.authorisation import authorise_fields
from rudder.server.service.columns import FeatureTable
from rudder.server.service.errors import invalid
from rudder.server.service.prompt import ReadIds, read_ids, written_ids
from rudder.server.service.sampling import sampling_of
from rudder.server.service.serving import Serving, bundle_at_site, feature_info
from rudder.server.service.topics import program_of, resolve_topic
from rudder.v1 import inference_pb2

Request = inference_pb2.GenerateRequest | inference_pb2.CompleteRequest | inference_pb2.InspectRequest
# A log-probability and a token id.
LOGPROB_BYTES = 9
# Of the longest prompt, how much a prompt that is truncated may have had.
TRUNCATED = 4


@dataclass(frozen=True)
class Job:
    """A request ready to run: one call per choice. `inspects`: nothing that is generated is of interest.

    `topic`: what the request's topic stands for, None without one.
    """

    calls: tuple[Call, ...]
    report: inference_pb2.Report
    features: FeatureTable
    inspects: bool = False
    topic: inference_pb2.ResolvedTopic | None = None

    @property
    def program_digest(self) -> str:
        """Digest of the request's program; empty without one."""
        program = self.calls[0].compiled
        return program.digest if program else ""


async def prepare(
    serving: Serving,
    caller: Caller,
    request: Request,
    binding: Binding = UNBOUND,
    default_max_tokens: int | None = limits.DEFAULT_MAX_TOKENS,
) -> Job:
    """Check a request of `caller`, whom `binding` binds, and compile it. Raises Refusal or ProgramError.

    `default_max_tokens`: for a request that sets none; None: as many as are allowed and fit beside the prompt.
    """
    limits.check(request, serving.bounds)
    authorise_fields(caller, request)
    serving.quotas.require(caller, "prompt_tokens", "QUOTA_TOKENS")
    serving.quotas.require(caller, "generated_tokens", "QUOTA_TOKENS")
    binding.check_fields(request)
    topic = requested_topic(serving, request.steering)
    program = requested_program(serving, request.steering, topic, binding)
    binding.check_report(request.report.features, serving.engine.registry, "report.features")
    sites = top_k_sites(serving, request.report)
    count_trials(serving, request, topic, binding)
    ids = await tokenised(serving, caller, request.prompt, binding)
    report = request.report
    reads_prompt = report.prompt or isinstance(request, inference_pb2.InspectRequest)
    call = Call(
        prompt_ids=ids,
        sampling=sampling_of(inference_pb2.Sampling(max_tokens=1), 0, 0),
        compiled=program,
        policies=stages_of(binding.policies),
        enforced=binding.stages_enforced,
        watch=watched_rows(serving, report, reads_prompt),
        top_k=report.top_k,
        top_k_sites=sites,
        hidden=hidden_latents(serving, sites, binding),
        top_k_prompt=reads_prompt,
        caller=caller,
        cache_salt=cache_scope(caller, request.cache_salt, serving.config.engine.share_anonymous_prefixes),
    )
    table = FeatureTable([watched_feature_info(serving, w) for w in report.features], sites, info_lookup(serving))
    if isinstance(request, inference_pb2.InspectRequest):
        return Job((call,), report, table, inspects=True, topic=topic)
    interval = request.stream_interval if isinstance(request, inference_pb2.GenerateRequest) else 0
    beyond = tokens_beyond(binding.policies)
    default = default_max_tokens or serving.bounds.limits.max_tokens or limits.DEFAULT_MAX_TOKENS
    sampling = with_max_tokens(request.sampling, len(ids), serving.engine.model.max_model_len - beyond, default)
    require_room_for_logprobs(sampling, len(ids), serving.bounds.limits.max_reply_bytes)
    first = sampling_of(sampling, 0, interval)
    if sampling.bad_words:
        chars = sum(map(len, sampling.bad_words))
        await serving.in_tokenizer_thread(caller, chars, lambda tokenizer: check_bad_words(first, tokenizer))
    choices = range(sampling.n or 1)
    calls = tuple(replace(call, sampling=sampling_of(sampling, choice, interval)) for choice in choices)
    return Job(calls, report, table, topic=topic)


def count_trials(
    serving: Serving, request: Request, topic: inference_pb2.ResolvedTopic | None, binding: Binding
) -> None:
    """Count what policies in shadow mode would refuse of a request that is not refused."""
    for trial in binding.trials:
        try:
            trial.check_fields(request)
            requested_program(serving, request.steering, topic, trial)
            trial.check_report(request.report.features, serving.engine.registry, "report.features")
        except ProgramError as error:
            serving.metrics.shadow_refused(trial.policies[0].name, error.reason)


def requested_topic(serving: Serving, steering: inference_pb2.Steering) -> inference_pb2.ResolvedTopic | None:
    """Return what the request's topic stands for; None without one."""
    return resolve_topic(steering.topic, serving.engine.concepts) if steering.HasField("topic") else None


def requested_program(
    serving: Serving,
    steering: inference_pb2.Steering,
    topic: inference_pb2.ResolvedTopic | None,
    binding: Binding,
) -> Compiled | None:
    """Return the request's program, compiled: the operator's of that name, its own, or that of its topic.

    All obey the policies.
    """
    if topic is not None:
        # The operator's as a named program is: its rows and doses are in a file beside the bundle.
        return binding.compile_topic(program_of(topic), serving.engine.registry, "steering.topic")
    match steering.WhichOneof("steering"):
        case "name":
            if steering.name not in serving.engine.programs:
                raise invalid("steering.name", f"no program {steering.name!r} is served", "PROGRAM_UNKNOWN")
            named = serving.engine.programs[steering.name]
            if not binding.enforced:
                return named.compiled
            return binding.compile_named(steering.name, named.message, serving.engine.registry, "steering.name")
        case "program":
            return binding.compile_own(steering.program, serving.engine.registry, "steering.program")
    return None


async def tokenised(
    serving: Serving, caller: Caller, prompt: inference_pb2.Prompt, binding: Binding
) -> tuple[int, ...]:
    """Return the token ids of a prompt. Those that a bound caller gives, or cuts, must be what the tokenizer writes.

    Other ids of the same text may not look like it to a guard.
    """
    chars = await require_possible_length(prompt, serving)

    def work(tokenizer: Any) -> tuple[ReadIds, tuple[int, ...]]:
        read = read_ids(prompt, tokenizer, serving.bounds, serving.config.prompt)
        unwritten = binding.policies and (read.cut or prompt.WhichOneof("prompt") == "token_ids")
        return read, written_ids(read.ids, tokenizer) if unwritten else read.ids

    (ids, cut), written = await serving.in_tokenizer_thread(caller, chars, work)
    binding.check_token_ids("prompt.truncate_prompt_tokens" if cut else "prompt.token_ids", ids, written)
    for trial in binding.trials if ids != written else ():
        serving.metrics.shadow_refused(trial.policies[0].name, "POLICY_FORBIDS")
    return ids


def hidden_latents(serving: Serving, sites: Sequence[str], binding: Binding) -> tuple[tuple[int, ...], ...]:
    """Return, for each of these sites, the latents that a report leaves out."""
    bundles = [bundle_at_site(serving.engine, site) for site in sites]
    hidden = tuple(tuple(sorted(i for name, i in binding.hidden if name == bundle)) for bundle in bundles)
    return hidden if any(hidden) else ()


async def require_possible_length(prompt: inference_pb2.Prompt, serving: Serving) -> int:
    """Return the characters of a prompt. Raises Refusal if they must be more tokens than a prompt may have.

    Tokenising a long text only to refuse it would take a thread's time from others. A chat template may trim messages,
    and leave out part of an assistant's, so these count for less here.
    """
    texts = [message.content.strip() for message in prompt.chat.messages if message.role != "assistant"]
    chars = len(prompt.text) + sum(map(len, texts))
    tokens = serving.bounds.limits.max_prompt_tokens or 0
    before = ""
    if prompt.HasField("truncate_prompt_tokens"):
        tokens, before = TRUNCATED * tokens, " before it is truncated"
    # One more token for a BOS that the text spells itself.
    if chars > tokens and chars > await serving.tokenizers.max_chars(tokens + 1):
        problem = f"has {chars} characters, which are more than the {tokens} tokens that a prompt may have{before}"
        raise invalid(f"prompt.{prompt.WhichOneof('prompt')}", problem)
    return chars + sum(len(message.content) for message in prompt.chat.messages if message.role == "assistant")


def cache_scope(caller: Caller, cache_salt: str, share_anonymous: bool) -> str:
    """Return what separates the call's prefix cache within its tenant.

    Cached tokens show in usage, in attestation and in the time to the first token, and so tell whoever shares the cache
    that somebody has sent this prompt. Callers that did not authenticate are one tenant, but not one person: without a
    salt of their own, each of their calls has a cache of its own.
    """
    return cache_salt or (secrets.token_hex(16) if caller.anonymous and not share_anonymous else "")


def watched_rows(serving: Serving, report: inference_pb2.Report, prompt: bool) -> tuple[Watched, ...]:
    """Return the rows that a report names, compiled. Clients repeat their reports, so results are cached."""
    if not report.features:
        return ()
    key = inference_pb2.Report(features=report.features, prompt=prompt).SerializeToString(deterministic=True)
    cached = serving.watched.get(key)
    if cached is not None:
        return cached
    rows = [(feature.site, feature.row) for feature in report.features]
    watched = compile_watch(rows, serving.engine.registry, "report.features", prompt=prompt)
    return serving.watched.put(key, watched, len(key) + rows_size(watch.row for watch in watched))


def top_k_sites(serving: Serving, report: inference_pb2.Report) -> tuple[str, ...]:
    """Return the sites at which the whole dictionary is read."""
    for i, site in enumerate(report.sites):
        if bundle_at_site(serving.engine, site) is None:
            raise invalid(f"report.sites[{i}]", f"no bundle is served at {site!r}", "SITE_UNKNOWN")
    if not report.top_k:
        return ()
    served = (bundle.manifest.site for bundle in serving.engine.bundles.values())
    sites = tuple(dict.fromkeys(report.sites)) or tuple(dict.fromkeys(served))
    if not sites:
        raise invalid("report.top_k", "no bundle is served")
    return sites


def with_max_tokens(
    sampling: inference_pb2.Sampling, prompt: int, max_model_len: int, default: int = limits.DEFAULT_MAX_TOKENS
) -> inference_pb2.Sampling:
    """Return the sampling with max_tokens set. A requested value must fit beside the prompt; the default shrinks."""
    room = max_model_len - prompt
    if room < 1:
        raise invalid("prompt", f"{prompt} tokens leave no room for an answer: at most {max_model_len - 1} do")
    result = inference_pb2.Sampling()
    result.CopyFrom(sampling)
    if not sampling.HasField("max_tokens"):
        result.max_tokens = min(default, room)
    if result.max_tokens > room:
        problem = (
            f"{sampling.max_tokens} with a prompt of {prompt} tokens is more than the {max_model_len} that the model"
            " takes"
        )
        raise invalid("sampling.max_tokens", problem)
    if result.min_tokens > result.max_tokens:
        problem = f"{result.min_tokens} is more than the {result.max_tokens} tokens that fit beside the prompt"
        raise invalid("sampling.min_tokens", problem)
    return result


def require_room_for_logprobs(sampling: inference_pb2.Sampling, prompt: int, max_reply_bytes: int) -> None:
    """Raise Refusal if the log-probabilities of a prompt may not fit into one message."""
    size = prompt * (sampling.prompt_logprobs + 1) * LOGPROB_BYTES
    if sampling.HasField("prompt_logprobs") and size > max_reply_bytes:
        problem = f"{sampling.prompt_logprobs} for {prompt} tokens may need {size} bytes, at most {max_reply_bytes}"
        raise invalid("sampling.prompt_logprobs", problem)


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
