from rudder.v1 import program_pb2 as _program_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_ABORT: _ClassVar[FinishReason]
    FINISH_REASON_ERROR: _ClassVar[FinishReason]
    FINISH_REASON_REPETITION: _ClassVar[FinishReason]
    FINISH_REASON_REFUSED: _ClassVar[FinishReason]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_ABORT: FinishReason
FINISH_REASON_ERROR: FinishReason
FINISH_REASON_REPETITION: FinishReason
FINISH_REASON_REFUSED: FinishReason

class GenerateRequest(_message.Message):
    __slots__ = ("prompt", "sampling", "steering", "report", "stream_interval", "cache_salt")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STEERING_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    STREAM_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    prompt: Prompt
    sampling: Sampling
    steering: Steering
    report: Report
    stream_interval: int
    cache_salt: str
    def __init__(self, prompt: _Optional[_Union[Prompt, _Mapping]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., steering: _Optional[_Union[Steering, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ..., stream_interval: _Optional[int] = ..., cache_salt: _Optional[str] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("request_id", "features", "choices")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    features: _containers.RepeatedCompositeFieldContainer[FeatureInfo]
    choices: _containers.RepeatedCompositeFieldContainer[ChoiceDelta]
    def __init__(self, request_id: _Optional[str] = ..., features: _Optional[_Iterable[_Union[FeatureInfo, _Mapping]]] = ..., choices: _Optional[_Iterable[_Union[ChoiceDelta, _Mapping]]] = ...) -> None: ...

class CompleteRequest(_message.Message):
    __slots__ = ("prompt", "sampling", "steering", "report", "cache_salt")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    STEERING_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    prompt: Prompt
    sampling: Sampling
    steering: Steering
    report: Report
    cache_salt: str
    def __init__(self, prompt: _Optional[_Union[Prompt, _Mapping]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., steering: _Optional[_Union[Steering, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ..., cache_salt: _Optional[str] = ...) -> None: ...

class CompleteResponse(_message.Message):
    __slots__ = ("request_id", "features", "choices")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    features: _containers.RepeatedCompositeFieldContainer[FeatureInfo]
    choices: _containers.RepeatedCompositeFieldContainer[Choice]
    def __init__(self, request_id: _Optional[str] = ..., features: _Optional[_Iterable[_Union[FeatureInfo, _Mapping]]] = ..., choices: _Optional[_Iterable[_Union[Choice, _Mapping]]] = ...) -> None: ...

class InspectRequest(_message.Message):
    __slots__ = ("prompt", "steering", "report", "cache_salt")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    STEERING_FIELD_NUMBER: _ClassVar[int]
    REPORT_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    prompt: Prompt
    steering: Steering
    report: Report
    cache_salt: str
    def __init__(self, prompt: _Optional[_Union[Prompt, _Mapping]] = ..., steering: _Optional[_Union[Steering, _Mapping]] = ..., report: _Optional[_Union[Report, _Mapping]] = ..., cache_salt: _Optional[str] = ...) -> None: ...

class InspectResponse(_message.Message):
    __slots__ = ("request_id", "features", "token_ids", "token_texts", "activations", "pooled", "attestation")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_TEXTS_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    POOLED_FIELD_NUMBER: _ClassVar[int]
    ATTESTATION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    features: _containers.RepeatedCompositeFieldContainer[FeatureInfo]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    token_texts: _containers.RepeatedScalarFieldContainer[str]
    activations: FeatureColumns
    pooled: _containers.RepeatedCompositeFieldContainer[PooledFeature]
    attestation: Attestation
    def __init__(self, request_id: _Optional[str] = ..., features: _Optional[_Iterable[_Union[FeatureInfo, _Mapping]]] = ..., token_ids: _Optional[_Iterable[int]] = ..., token_texts: _Optional[_Iterable[str]] = ..., activations: _Optional[_Union[FeatureColumns, _Mapping]] = ..., pooled: _Optional[_Iterable[_Union[PooledFeature, _Mapping]]] = ..., attestation: _Optional[_Union[Attestation, _Mapping]] = ...) -> None: ...

class TokenizeRequest(_message.Message):
    __slots__ = ("prompt",)
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    prompt: Prompt
    def __init__(self, prompt: _Optional[_Union[Prompt, _Mapping]] = ...) -> None: ...

class TokenizeResponse(_message.Message):
    __slots__ = ("request_id", "token_ids", "token_texts", "tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_TEXTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    token_texts: _containers.RepeatedScalarFieldContainer[str]
    tokens: int
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., token_texts: _Optional[_Iterable[str]] = ..., tokens: _Optional[int] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("text", "token_ids", "chat", "truncate_prompt_tokens")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: TokenIds
    chat: Chat
    truncate_prompt_tokens: int
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ..., truncate_prompt_tokens: _Optional[int] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Chat(_message.Message):
    __slots__ = ("messages", "template_arguments", "continue_final_message")
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    CONTINUE_FINAL_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    template_arguments: str
    continue_final_message: bool
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ..., template_arguments: _Optional[str] = ..., continue_final_message: _Optional[bool] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "stop", "stop_token_ids", "ignore_eos", "include_stop", "logprobs", "n", "logit_bias", "structured", "bad_words", "allowed_token_ids", "skip_special_tokens", "prompt_logprobs")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_STOP_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    STRUCTURED_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SKIP_SPECIAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    include_stop: bool
    logprobs: int
    n: int
    logit_bias: _containers.ScalarMap[int, float]
    structured: StructuredOutput
    bad_words: _containers.RepeatedScalarFieldContainer[str]
    allowed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    skip_special_tokens: bool
    prompt_logprobs: int
    def __init__(self, max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., min_p: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., include_stop: _Optional[bool] = ..., logprobs: _Optional[int] = ..., n: _Optional[int] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., structured: _Optional[_Union[StructuredOutput, _Mapping]] = ..., bad_words: _Optional[_Iterable[str]] = ..., allowed_token_ids: _Optional[_Iterable[int]] = ..., skip_special_tokens: _Optional[bool] = ..., prompt_logprobs: _Optional[int] = ...) -> None: ...

class StructuredOutput(_message.Message):
    __slots__ = ("json_schema", "regex", "grammar", "choice", "json_object")
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    REGEX_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    JSON_OBJECT_FIELD_NUMBER: _ClassVar[int]
    json_schema: str
    regex: str
    grammar: str
    choice: Choices
    json_object: bool
    def __init__(self, json_schema: _Optional[str] = ..., regex: _Optional[str] = ..., grammar: _Optional[str] = ..., choice: _Optional[_Union[Choices, _Mapping]] = ..., json_object: _Optional[bool] = ...) -> None: ...

class Choices(_message.Message):
    __slots__ = ("texts",)
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, texts: _Optional[_Iterable[str]] = ...) -> None: ...

class Steering(_message.Message):
    __slots__ = ("name", "program", "topic")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    name: str
    program: _program_pb2.Program
    topic: TopicSteering
    def __init__(self, name: _Optional[str] = ..., program: _Optional[_Union[_program_pb2.Program, _Mapping]] = ..., topic: _Optional[_Union[TopicSteering, _Mapping]] = ...) -> None: ...

class TopicSteering(_message.Message):
    __slots__ = ("topic", "strength", "kl")
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    KL_FIELD_NUMBER: _ClassVar[int]
    topic: str
    strength: float
    kl: float
    def __init__(self, topic: _Optional[str] = ..., strength: _Optional[float] = ..., kl: _Optional[float] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("features", "top_k", "sites", "prompt", "pooled", "no_tokens")
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    POOLED_FIELD_NUMBER: _ClassVar[int]
    NO_TOKENS_FIELD_NUMBER: _ClassVar[int]
    features: _containers.RepeatedCompositeFieldContainer[SiteFeature]
    top_k: int
    sites: _containers.RepeatedScalarFieldContainer[str]
    prompt: bool
    pooled: bool
    no_tokens: bool
    def __init__(self, features: _Optional[_Iterable[_Union[SiteFeature, _Mapping]]] = ..., top_k: _Optional[int] = ..., sites: _Optional[_Iterable[str]] = ..., prompt: _Optional[bool] = ..., pooled: _Optional[bool] = ..., no_tokens: _Optional[bool] = ...) -> None: ...

class SiteFeature(_message.Message):
    __slots__ = ("site", "row")
    SITE_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    site: str
    row: _program_pb2.Row
    def __init__(self, site: _Optional[str] = ..., row: _Optional[_Union[_program_pb2.Row, _Mapping]] = ...) -> None: ...

class FeatureInfo(_message.Message):
    __slots__ = ("site", "bundle", "index", "label")
    SITE_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    site: str
    bundle: str
    index: int
    label: str
    def __init__(self, site: _Optional[str] = ..., bundle: _Optional[str] = ..., index: _Optional[int] = ..., label: _Optional[str] = ...) -> None: ...

class FeatureColumns(_message.Message):
    __slots__ = ("positions", "features", "activations")
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    positions: _containers.RepeatedScalarFieldContainer[int]
    features: _containers.RepeatedScalarFieldContainer[int]
    activations: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, positions: _Optional[_Iterable[int]] = ..., features: _Optional[_Iterable[int]] = ..., activations: _Optional[_Iterable[float]] = ...) -> None: ...

class PooledFeature(_message.Message):
    __slots__ = ("feature", "sum", "max", "active_tokens", "tokens")
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    SUM_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    feature: int
    sum: float
    max: float
    active_tokens: int
    tokens: int
    def __init__(self, feature: _Optional[int] = ..., sum: _Optional[float] = ..., max: _Optional[float] = ..., active_tokens: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class ChoiceDelta(_message.Message):
    __slots__ = ("index", "text", "token_ids", "logprobs", "activations", "finish_reason", "stop_reason", "pooled", "usage", "attestation", "stop_string", "stop_token_id", "prompt_logprobs", "refusal")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_REASON_FIELD_NUMBER: _ClassVar[int]
    POOLED_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    ATTESTATION_FIELD_NUMBER: _ClassVar[int]
    STOP_STRING_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    index: int
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: Logprobs
    activations: FeatureColumns
    finish_reason: FinishReason
    stop_reason: str
    pooled: _containers.RepeatedCompositeFieldContainer[PooledFeature]
    usage: Usage
    attestation: Attestation
    stop_string: str
    stop_token_id: int
    prompt_logprobs: Logprobs
    refusal: PolicyRefusal
    def __init__(self, index: _Optional[int] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Union[Logprobs, _Mapping]] = ..., activations: _Optional[_Union[FeatureColumns, _Mapping]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., stop_reason: _Optional[str] = ..., pooled: _Optional[_Iterable[_Union[PooledFeature, _Mapping]]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., attestation: _Optional[_Union[Attestation, _Mapping]] = ..., stop_string: _Optional[str] = ..., stop_token_id: _Optional[int] = ..., prompt_logprobs: _Optional[_Union[Logprobs, _Mapping]] = ..., refusal: _Optional[_Union[PolicyRefusal, _Mapping]] = ...) -> None: ...

class Choice(_message.Message):
    __slots__ = ("index", "text", "token_ids", "logprobs", "activations", "finish_reason", "stop_reason", "pooled", "usage", "attestation", "stop_string", "stop_token_id", "prompt_logprobs", "refusal")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ACTIVATIONS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_REASON_FIELD_NUMBER: _ClassVar[int]
    POOLED_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    ATTESTATION_FIELD_NUMBER: _ClassVar[int]
    STOP_STRING_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    index: int
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: Logprobs
    activations: FeatureColumns
    finish_reason: FinishReason
    stop_reason: str
    pooled: _containers.RepeatedCompositeFieldContainer[PooledFeature]
    usage: Usage
    attestation: Attestation
    stop_string: str
    stop_token_id: int
    prompt_logprobs: Logprobs
    refusal: PolicyRefusal
    def __init__(self, index: _Optional[int] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Union[Logprobs, _Mapping]] = ..., activations: _Optional[_Union[FeatureColumns, _Mapping]] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., stop_reason: _Optional[str] = ..., pooled: _Optional[_Iterable[_Union[PooledFeature, _Mapping]]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., attestation: _Optional[_Union[Attestation, _Mapping]] = ..., stop_string: _Optional[str] = ..., stop_token_id: _Optional[int] = ..., prompt_logprobs: _Optional[_Union[Logprobs, _Mapping]] = ..., refusal: _Optional[_Union[PolicyRefusal, _Mapping]] = ...) -> None: ...

class PolicyRefusal(_message.Message):
    __slots__ = ("policy", "rule", "text", "position", "score")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    policy: str
    rule: str
    text: str
    position: int
    score: float
    def __init__(self, policy: _Optional[str] = ..., rule: _Optional[str] = ..., text: _Optional[str] = ..., position: _Optional[int] = ..., score: _Optional[float] = ...) -> None: ...

class Logprobs(_message.Message):
    __slots__ = ("chosen", "width", "alternative_ids", "alternatives")
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVE_IDS_FIELD_NUMBER: _ClassVar[int]
    ALTERNATIVES_FIELD_NUMBER: _ClassVar[int]
    chosen: _containers.RepeatedScalarFieldContainer[float]
    width: int
    alternative_ids: _containers.RepeatedScalarFieldContainer[int]
    alternatives: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, chosen: _Optional[_Iterable[float]] = ..., width: _Optional[int] = ..., alternative_ids: _Optional[_Iterable[int]] = ..., alternatives: _Optional[_Iterable[float]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("prompt_tokens", "generated_tokens", "cached_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., generated_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Attestation(_message.Message):
    __slots__ = ("program_digest", "policy_digest", "edits", "tokens_seen", "engine_epoch", "gates", "request_id", "policies", "topic")
    PROGRAM_DIGEST_FIELD_NUMBER: _ClassVar[int]
    POLICY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_SEEN_FIELD_NUMBER: _ClassVar[int]
    ENGINE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    GATES_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    program_digest: str
    policy_digest: str
    edits: _containers.RepeatedCompositeFieldContainer[EditCount]
    tokens_seen: int
    engine_epoch: str
    gates: _containers.RepeatedCompositeFieldContainer[GateCount]
    request_id: str
    policies: _containers.RepeatedCompositeFieldContainer[AppliedPolicy]
    topic: ResolvedTopic
    def __init__(self, program_digest: _Optional[str] = ..., policy_digest: _Optional[str] = ..., edits: _Optional[_Iterable[_Union[EditCount, _Mapping]]] = ..., tokens_seen: _Optional[int] = ..., engine_epoch: _Optional[str] = ..., gates: _Optional[_Iterable[_Union[GateCount, _Mapping]]] = ..., request_id: _Optional[str] = ..., policies: _Optional[_Iterable[_Union[AppliedPolicy, _Mapping]]] = ..., topic: _Optional[_Union[ResolvedTopic, _Mapping]] = ...) -> None: ...

class ResolvedTopic(_message.Message):
    __slots__ = ("concept", "bundle", "site", "strength", "dose", "kl", "chosen", "runner_up")
    CONCEPT_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    DOSE_FIELD_NUMBER: _ClassVar[int]
    KL_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    RUNNER_UP_FIELD_NUMBER: _ClassVar[int]
    concept: str
    bundle: str
    site: str
    strength: float
    dose: float
    kl: float
    chosen: TopicCandidate
    runner_up: TopicCandidate
    def __init__(self, concept: _Optional[str] = ..., bundle: _Optional[str] = ..., site: _Optional[str] = ..., strength: _Optional[float] = ..., dose: _Optional[float] = ..., kl: _Optional[float] = ..., chosen: _Optional[_Union[TopicCandidate, _Mapping]] = ..., runner_up: _Optional[_Union[TopicCandidate, _Mapping]] = ...) -> None: ...

class TopicCandidate(_message.Message):
    __slots__ = ("kind", "rows", "score")
    KIND_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    kind: str
    rows: _containers.RepeatedCompositeFieldContainer[TopicRow]
    score: float
    def __init__(self, kind: _Optional[str] = ..., rows: _Optional[_Iterable[_Union[TopicRow, _Mapping]]] = ..., score: _Optional[float] = ...) -> None: ...

class TopicRow(_message.Message):
    __slots__ = ("index", "label", "dose", "output_score", "input_score")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    DOSE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_SCORE_FIELD_NUMBER: _ClassVar[int]
    INPUT_SCORE_FIELD_NUMBER: _ClassVar[int]
    index: int
    label: str
    dose: float
    output_score: float
    input_score: float
    def __init__(self, index: _Optional[int] = ..., label: _Optional[str] = ..., dose: _Optional[float] = ..., output_score: _Optional[float] = ..., input_score: _Optional[float] = ...) -> None: ...

class AppliedPolicy(_message.Message):
    __slots__ = ("name", "version", "digest", "shadow", "verdicts", "withheld")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SHADOW_FIELD_NUMBER: _ClassVar[int]
    VERDICTS_FIELD_NUMBER: _ClassVar[int]
    WITHHELD_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    digest: str
    shadow: bool
    verdicts: _containers.RepeatedCompositeFieldContainer[Verdict]
    withheld: bool
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., digest: _Optional[str] = ..., shadow: _Optional[bool] = ..., verdicts: _Optional[_Iterable[_Union[Verdict, _Mapping]]] = ..., withheld: _Optional[bool] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("rule", "position", "score")
    RULE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    rule: str
    position: int
    score: float
    def __init__(self, rule: _Optional[str] = ..., position: _Optional[int] = ..., score: _Optional[float] = ...) -> None: ...

class GateCount(_message.Message):
    __slots__ = ("origin", "site", "open_tokens", "statistic", "policy")
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    OPEN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STATISTIC_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    origin: str
    site: str
    open_tokens: int
    statistic: float
    policy: str
    def __init__(self, origin: _Optional[str] = ..., site: _Optional[str] = ..., open_tokens: _Optional[int] = ..., statistic: _Optional[float] = ..., policy: _Optional[str] = ...) -> None: ...

class EditCount(_message.Message):
    __slots__ = ("origin", "site", "row", "operation", "tokens_touched", "tokens_rejected", "policy")
    ORIGIN_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    OPERATION_FIELD_NUMBER: _ClassVar[int]
    TOKENS_TOUCHED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_REJECTED_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    origin: str
    site: str
    row: str
    operation: str
    tokens_touched: int
    tokens_rejected: int
    policy: str
    def __init__(self, origin: _Optional[str] = ..., site: _Optional[str] = ..., row: _Optional[str] = ..., operation: _Optional[str] = ..., tokens_touched: _Optional[int] = ..., tokens_rejected: _Optional[int] = ..., policy: _Optional[str] = ...) -> None: ...
