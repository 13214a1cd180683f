"""Conversion of response messages, whose features are columns, to Python values."""

from collections.abc import Sequence
from dataclasses import dataclass

from rudder.v1 import inference_pb2

FINISH_REASONS = {
    inference_pb2.FINISH_REASON_UNSPECIFIED: None,
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
    inference_pb2.FINISH_REASON_ABORT: "abort",
    inference_pb2.FINISH_REASON_ERROR: "error",
    inference_pb2.FINISH_REASON_REPETITION: "repetition",
    inference_pb2.FINISH_REASON_REFUSED: "refused",
}
Delta = inference_pb2.ChoiceDelta | inference_pb2.Choice


@dataclass(frozen=True)
class FeatureName:
    """A reported feature. `label`: that of the catalogue, or the name of a probe."""

    site: str
    bundle: str
    index: int
    label: str


@dataclass(frozen=True)
class Activation:
    """Activation of a feature at a position of prompt and output, counted from 0."""

    position: int
    feature: FeatureName
    value: float


@dataclass(frozen=True)
class PooledActivation:
    """Statistics of a feature over the `tokens` of a choice; it is active on `active_tokens` of them."""

    feature: FeatureName
    sum: float
    max: float
    active_tokens: int
    tokens: int


@dataclass(frozen=True)
class Logprobs:
    """Per token: its log-probability, and (token id, log-probability) of the most probable tokens."""

    chosen: tuple[float, ...]
    alternatives: tuple[tuple[tuple[int, float], ...], ...]


@dataclass(frozen=True)
class Usage:
    """Token counts of a choice. `cached_tokens`: tokens of the prompt served from the prefix cache."""

    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class EditCount:
    """Number of tokens that an edit changed. `origin`: `request` or `policy`.

    `tokens_rejected`: tokens left unedited, since their residual would not have stayed finite.
    """

    origin: str
    site: str
    row: str
    operation: str
    tokens_touched: int
    tokens_rejected: int = 0
    # Name of the policy where `origin` is `policy`.
    policy: str = ""


@dataclass(frozen=True)
class GateCount:
    """Number of tokens at which a gate was open. `origin`: `request` or `policy`.

    `statistic`: that of its sequence condition after the last token, in the units of its `level`; None without one.
    """

    origin: str
    site: str
    open_tokens: int
    statistic: float | None
    # Name of the policy where `origin` is `policy`.
    policy: str = ""


@dataclass(frozen=True)
class Verdict:
    """A guard that held. `rule`: its name; `position`: the token at which it did, from 0 over prompt and output.

    `score`: its statistic there; None for callers who may not read guards.
    """

    rule: str
    position: int
    score: float | None


@dataclass(frozen=True)
class AppliedPolicy:
    """A policy that bound the call. `shadow`: it counted what it would have done, and changed nothing.

    `verdicts`: of its guards that annotate, clamp, stop or reject. `withheld`: what its edits and its gate did is left
    out of the attestation, since the caller may not read guards.
    """

    name: str
    version: int
    digest: str
    shadow: bool
    verdicts: tuple[Verdict, ...] = ()
    withheld: bool = False


@dataclass(frozen=True)
class Refusal:
    """Why a policy ended a choice. `rule`: the guard that held; `position` and `score`: as in Verdict.

    `text`: the operator's, which the model did not generate. It is no part of the choice's text.
    """

    policy: str
    rule: str
    text: str
    position: int
    score: float | None


@dataclass(frozen=True)
class TopicRow:
    """A latent that a topic stands for. `dose`: norm of the displacement along it as a share of ||x||.

    `output_score`, `input_score`: of arXiv 2505.20063; None if not measured.
    """

    index: int
    label: str
    dose: float
    output_score: float | None
    input_score: float | None


@dataclass(frozen=True)
class TopicCandidate:
    """Rows with which a topic was tried. `score`: mean probability that texts steered by them are on the topic."""

    kind: str
    rows: tuple[TopicRow, ...]
    score: float


@dataclass(frozen=True)
class ResolvedTopic:
    """What a topic stood for. `strength`: 1 is the largest dose within budgets of fluency.

    `dose`: norm of the displacement as a share of ||x||. `kl`: divergence from the unsteered model at this dose, in
    nats per generated token, as calibrated. `runner_up`: the candidate that came second, if there is one.
    """

    concept: str
    bundle: str
    site: str
    strength: float
    dose: float
    kl: float
    chosen: TopicCandidate
    runner_up: TopicCandidate | None


@dataclass(frozen=True)
class Attestation:
    """The edits that ran, counted in the engine's worker. `tokens_seen`: tokens that the model computed.

    `gates`: of the program and of the policies. `request_id`: the call that this was. `policies`: those that bound the
    call, in the order in which they apply. `topic`: what the request's topic stood for.
    """

    program_digest: str
    policy_digest: str
    edits: tuple[EditCount, ...]
    tokens_seen: int
    engine_epoch: str
    gates: tuple[GateCount, ...] = ()
    request_id: str = ""
    policies: tuple[AppliedPolicy, ...] = ()
    topic: ResolvedTopic | None = None


@dataclass(frozen=True)
class Chunk:
    """Tokens of choice `choice`. Only the last chunk of a choice has `finish_reason` and the fields after it.

    `stop_string`, `stop_token_id`: the one of both that ended the choice; `stop_reason` is its text. `refusal`: why a
    policy ended it, with the finish reason `refused`.
    """

    choice: int
    text: str
    token_ids: tuple[int, ...]
    activations: tuple[Activation, ...]
    logprobs: Logprobs | None
    finish_reason: str | None
    stop_reason: str
    pooled: tuple[PooledActivation, ...]
    usage: Usage | None
    attestation: Attestation | None
    stop_string: str | None = None
    stop_token_id: int | None = None
    # Of the prompt's tokens but the first, in the first chunk of a choice.
    prompt_logprobs: Logprobs | None = None
    refusal: Refusal | None = None


@dataclass(frozen=True)
class Completion:
    """All choices of a request."""

    request_id: str
    choices: tuple[Chunk, ...]

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text

    @property
    def refusal(self) -> Refusal | None:
        """Why a policy ended the first choice; None if none did."""
        return self.choices[0].refusal


@dataclass(frozen=True)
class Token:
    """A token, and its active features, strongest first."""

    position: int
    id: int
    text: str
    activations: tuple[Activation, ...]


@dataclass(frozen=True)
class Inspection:
    """The tokens of a text with their features."""

    request_id: str
    tokens: tuple[Token, ...]
    pooled: tuple[PooledActivation, ...]
    attestation: Attestation


class Names:
    """The features of a stream: columns refer to them by the order in which the server named them."""

    def __init__(self) -> None:
        self.known: list[FeatureName] = []

    def learn(self, infos: Sequence[inference_pb2.FeatureInfo]) -> None:
        """Append the features that a message names."""
        self.known += [FeatureName(i.site, i.bundle, i.index, i.label) for i in infos]

    def activations(self, columns: inference_pb2.FeatureColumns) -> tuple[Activation, ...]:
        """Convert columns of activations."""
        entries = zip(columns.positions, columns.features, columns.activations, strict=True)
        return tuple(Activation(position, self.known[number], value) for position, number, value in entries)

    def pooled(self, features: Sequence[inference_pb2.PooledFeature]) -> tuple[PooledActivation, ...]:
        """Convert pooled features, largest sum first."""
        converted = [PooledActivation(self.known[f.feature], f.sum, f.max, f.active_tokens, f.tokens) for f in features]
        return tuple(sorted(converted, key=lambda pooled: -pooled.sum))


def chunk_of(delta: Delta, names: Names) -> Chunk:
    """Convert a delta, or a complete choice."""
    return Chunk(
        choice=delta.index,
        text=delta.text,
        token_ids=tuple(delta.token_ids),
        activations=names.activations(delta.activations),
        logprobs=logprobs_of(delta.logprobs) if delta.HasField("logprobs") else None,
        finish_reason=FINISH_REASONS[delta.finish_reason],
        stop_reason=delta.stop_reason,
        pooled=names.pooled(delta.pooled),
        usage=usage_of(delta.usage) if delta.HasField("usage") else None,
        attestation=attestation_of(delta.attestation) if delta.HasField("attestation") else None,
        stop_string=delta.stop_string if delta.HasField("stop_string") else None,
        stop_token_id=delta.stop_token_id if delta.HasField("stop_token_id") else None,
        prompt_logprobs=logprobs_of(delta.prompt_logprobs) if delta.HasField("prompt_logprobs") else None,
        refusal=refusal_of(delta.refusal) if delta.HasField("refusal") else None,
    )


def refusal_of(refusal: inference_pb2.PolicyRefusal) -> Refusal:
    """Convert a refusal."""
    return Refusal(refusal.policy, refusal.rule, refusal.text, refusal.position, score_of(refusal))


def score_of(message: inference_pb2.PolicyRefusal | inference_pb2.Verdict) -> float | None:
    """Return the score of a verdict; None if the caller may not read it."""
    return message.score if message.HasField("score") else None


def logprobs_of(columns: inference_pb2.Logprobs) -> Logprobs:
    """Convert columns of log-probabilities to one tuple per token."""
    pairs = list(zip(columns.alternative_ids, columns.alternatives, strict=True))
    width = columns.width
    alternatives = (tuple(pairs[i * width : (i + 1) * width]) for i in range(len(columns.chosen)))
    return Logprobs(tuple(columns.chosen), tuple(alternatives))


def usage_of(usage: inference_pb2.Usage) -> Usage:
    """Convert token counts."""
    return Usage(usage.prompt_tokens, usage.generated_tokens, usage.cached_tokens)


def attestation_of(attestation: inference_pb2.Attestation) -> Attestation:
    """Convert an attestation."""
    edits = (
        EditCount(e.origin, e.site, e.row, e.operation, e.tokens_touched, e.tokens_rejected, e.policy)
        for e in attestation.edits
    )
    return Attestation(
        program_digest=attestation.program_digest,
        policy_digest=attestation.policy_digest,
        edits=tuple(edits),
        tokens_seen=attestation.tokens_seen,
        engine_epoch=attestation.engine_epoch,
        gates=tuple(
            GateCount(g.origin, g.site, g.open_tokens, g.statistic if g.HasField("statistic") else None, g.policy)
            for g in attestation.gates
        ),
        request_id=attestation.request_id,
        policies=tuple(
            AppliedPolicy(
                policy.name,
                policy.version,
                policy.digest,
                policy.shadow,
                tuple(Verdict(v.rule, v.position, score_of(v)) for v in policy.verdicts),
                policy.withheld,
            )
            for policy in attestation.policies
        ),
        topic=topic_of(attestation.topic) if attestation.HasField("topic") else None,
    )


def topic_of(topic: inference_pb2.ResolvedTopic) -> ResolvedTopic:
    """Convert what a topic stood for."""
    return ResolvedTopic(
        concept=topic.concept,
        bundle=topic.bundle,
        site=topic.site,
        strength=topic.strength,
        dose=topic.dose,
        kl=topic.kl,
        chosen=candidate_of(topic.chosen),
        runner_up=candidate_of(topic.runner_up) if topic.HasField("runner_up") else None,
    )


def candidate_of(candidate: inference_pb2.TopicCandidate) -> TopicCandidate:
    """Convert a candidate of a topic."""
    rows = (
        TopicRow(row.index, row.label, row.dose, *(optional(row, name) for name in ("output_score", "input_score")))
        for row in candidate.rows
    )
    return TopicCandidate(candidate.kind, tuple(rows), candidate.score)


def optional(message: inference_pb2.TopicRow, field: str) -> float | None:
    """Return a number of a message; None if it is absent."""
    value: float = getattr(message, field)
    return value if message.HasField(field) else None


def completion_of(response: inference_pb2.CompleteResponse) -> Completion:
    """Convert the response of `complete`."""
    names = Names()
    names.learn(response.features)
    return Completion(response.request_id, tuple(chunk_of(choice, names) for choice in response.choices))


def inspection_of(response: inference_pb2.InspectResponse) -> Inspection:
    """Convert the response of `inspect`."""
    names = Names()
    names.learn(response.features)
    by_position: dict[int, list[Activation]] = {}
    for activation in names.activations(response.activations):
        by_position.setdefault(activation.position, []).append(activation)
    tokens = tuple(
        Token(i, id_, text, tuple(sorted(by_position.get(i, ()), key=lambda activation: -activation.value)))
        for i, (id_, text) in enumerate(zip(response.token_ids, response.token_texts, strict=True))
    )
    return Inspection(response.request_id, tokens, names.pooled(response.pooled), attestation_of(response.attestation))


def tokens_of(response: inference_pb2.TokenizeResponse) -> tuple[Token, ...]:
    """Convert the response of `tokenize`."""
    pairs = zip(response.token_ids, response.token_texts, strict=True)
    return tuple(Token(i, token, text, ()) for i, (token, text) in enumerate(pairs))
