from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FeatureServiceGetRequest(_message.Message):
    __slots__ = ("bundle", "index")
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    bundle: str
    index: int
    def __init__(self, bundle: _Optional[str] = ..., index: _Optional[int] = ...) -> None: ...

class FeatureServiceGetResponse(_message.Message):
    __slots__ = ("feature",)
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    feature: FeatureDetail
    def __init__(self, feature: _Optional[_Union[FeatureDetail, _Mapping]] = ...) -> None: ...

class FeatureServiceListRequest(_message.Message):
    __slots__ = ("bundle", "page_size", "page_token")
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    bundle: str
    page_size: int
    page_token: str
    def __init__(self, bundle: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class FeatureServiceListResponse(_message.Message):
    __slots__ = ("features", "next_page_token")
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    features: _containers.RepeatedCompositeFieldContainer[FeatureSummary]
    next_page_token: str
    def __init__(self, features: _Optional[_Iterable[_Union[FeatureSummary, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class FeatureServiceSearchRequest(_message.Message):
    __slots__ = ("bundle", "query", "limit", "by_meaning", "for_steering")
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    BY_MEANING_FIELD_NUMBER: _ClassVar[int]
    FOR_STEERING_FIELD_NUMBER: _ClassVar[int]
    bundle: str
    query: str
    limit: int
    by_meaning: bool
    for_steering: bool
    def __init__(self, bundle: _Optional[str] = ..., query: _Optional[str] = ..., limit: _Optional[int] = ..., by_meaning: _Optional[bool] = ..., for_steering: _Optional[bool] = ...) -> None: ...

class FeatureServiceSearchResponse(_message.Message):
    __slots__ = ("features",)
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    features: _containers.RepeatedCompositeFieldContainer[FeatureSummary]
    def __init__(self, features: _Optional[_Iterable[_Union[FeatureSummary, _Mapping]]] = ...) -> None: ...

class FeatureSummary(_message.Message):
    __slots__ = ("bundle", "site", "index", "label", "frequency", "max_activation", "label_origin", "label_score", "label_error", "intervention", "output_score", "input_score")
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_FIELD_NUMBER: _ClassVar[int]
    MAX_ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    LABEL_ORIGIN_FIELD_NUMBER: _ClassVar[int]
    LABEL_SCORE_FIELD_NUMBER: _ClassVar[int]
    LABEL_ERROR_FIELD_NUMBER: _ClassVar[int]
    INTERVENTION_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_SCORE_FIELD_NUMBER: _ClassVar[int]
    INPUT_SCORE_FIELD_NUMBER: _ClassVar[int]
    bundle: str
    site: str
    index: int
    label: str
    frequency: float
    max_activation: float
    label_origin: str
    label_score: float
    label_error: float
    intervention: float
    output_score: float
    input_score: float
    def __init__(self, bundle: _Optional[str] = ..., site: _Optional[str] = ..., index: _Optional[int] = ..., label: _Optional[str] = ..., frequency: _Optional[float] = ..., max_activation: _Optional[float] = ..., label_origin: _Optional[str] = ..., label_score: _Optional[float] = ..., label_error: _Optional[float] = ..., intervention: _Optional[float] = ..., output_score: _Optional[float] = ..., input_score: _Optional[float] = ...) -> None: ...

class FeatureDetail(_message.Message):
    __slots__ = ("summary", "top_tokens", "contexts", "quantiles", "promoted", "suppressed", "neighbours")
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONTEXTS_FIELD_NUMBER: _ClassVar[int]
    QUANTILES_FIELD_NUMBER: _ClassVar[int]
    PROMOTED_FIELD_NUMBER: _ClassVar[int]
    SUPPRESSED_FIELD_NUMBER: _ClassVar[int]
    NEIGHBOURS_FIELD_NUMBER: _ClassVar[int]
    summary: FeatureSummary
    top_tokens: _containers.RepeatedScalarFieldContainer[str]
    contexts: _containers.RepeatedCompositeFieldContainer[FeatureContext]
    quantiles: _containers.RepeatedCompositeFieldContainer[ActivationQuantile]
    promoted: _containers.RepeatedCompositeFieldContainer[LogitWord]
    suppressed: _containers.RepeatedCompositeFieldContainer[LogitWord]
    neighbours: _containers.RepeatedCompositeFieldContainer[FeatureNeighbour]
    def __init__(self, summary: _Optional[_Union[FeatureSummary, _Mapping]] = ..., top_tokens: _Optional[_Iterable[str]] = ..., contexts: _Optional[_Iterable[_Union[FeatureContext, _Mapping]]] = ..., quantiles: _Optional[_Iterable[_Union[ActivationQuantile, _Mapping]]] = ..., promoted: _Optional[_Iterable[_Union[LogitWord, _Mapping]]] = ..., suppressed: _Optional[_Iterable[_Union[LogitWord, _Mapping]]] = ..., neighbours: _Optional[_Iterable[_Union[FeatureNeighbour, _Mapping]]] = ...) -> None: ...

class FeatureNeighbour(_message.Message):
    __slots__ = ("index", "label", "cosine")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    COSINE_FIELD_NUMBER: _ClassVar[int]
    index: int
    label: str
    cosine: float
    def __init__(self, index: _Optional[int] = ..., label: _Optional[str] = ..., cosine: _Optional[float] = ...) -> None: ...

class ActivationQuantile(_message.Message):
    __slots__ = ("share", "activation")
    SHARE_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    share: float
    activation: float
    def __init__(self, share: _Optional[float] = ..., activation: _Optional[float] = ...) -> None: ...

class LogitWord(_message.Message):
    __slots__ = ("token", "logit")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    LOGIT_FIELD_NUMBER: _ClassVar[int]
    token: str
    logit: float
    def __init__(self, token: _Optional[str] = ..., logit: _Optional[float] = ...) -> None: ...

class FeatureContext(_message.Message):
    __slots__ = ("before", "token", "after", "activation", "source", "held_out")
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_FIELD_NUMBER: _ClassVar[int]
    before: str
    token: str
    after: str
    activation: float
    source: str
    held_out: bool
    def __init__(self, before: _Optional[str] = ..., token: _Optional[str] = ..., after: _Optional[str] = ..., activation: _Optional[float] = ..., source: _Optional[str] = ..., held_out: _Optional[bool] = ...) -> None: ...

class ModelServiceGetRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ModelServiceGetResponse(_message.Message):
    __slots__ = ("model", "model_sha256", "hidden_size", "layers", "max_model_len", "sites", "bundles", "limits", "server_version", "engine_version", "engine_epoch")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_SHA256_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    BUNDLES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VERSION_FIELD_NUMBER: _ClassVar[int]
    ENGINE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    model: str
    model_sha256: str
    hidden_size: int
    layers: int
    max_model_len: int
    sites: _containers.RepeatedCompositeFieldContainer[SiteInfo]
    bundles: _containers.RepeatedCompositeFieldContainer[BundleInfo]
    limits: Limits
    server_version: str
    engine_version: str
    engine_epoch: str
    def __init__(self, model: _Optional[str] = ..., model_sha256: _Optional[str] = ..., hidden_size: _Optional[int] = ..., layers: _Optional[int] = ..., max_model_len: _Optional[int] = ..., sites: _Optional[_Iterable[_Union[SiteInfo, _Mapping]]] = ..., bundles: _Optional[_Iterable[_Union[BundleInfo, _Mapping]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., server_version: _Optional[str] = ..., engine_version: _Optional[str] = ..., engine_epoch: _Optional[str] = ...) -> None: ...

class SiteInfo(_message.Message):
    __slots__ = ("site", "rows", "bundles")
    SITE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    BUNDLES_FIELD_NUMBER: _ClassVar[int]
    site: str
    rows: int
    bundles: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, site: _Optional[str] = ..., rows: _Optional[int] = ..., bundles: _Optional[_Iterable[str]] = ...) -> None: ...

class BundleInfo(_message.Message):
    __slots__ = ("name", "sha256", "site", "architecture", "latents", "l0", "fvu", "output_site", "activation", "editable", "not_editable_because")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    LATENTS_FIELD_NUMBER: _ClassVar[int]
    L0_FIELD_NUMBER: _ClassVar[int]
    FVU_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_SITE_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    EDITABLE_FIELD_NUMBER: _ClassVar[int]
    NOT_EDITABLE_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    name: str
    sha256: str
    site: str
    architecture: str
    latents: int
    l0: float
    fvu: float
    output_site: str
    activation: str
    editable: bool
    not_editable_because: str
    def __init__(self, name: _Optional[str] = ..., sha256: _Optional[str] = ..., site: _Optional[str] = ..., architecture: _Optional[str] = ..., latents: _Optional[int] = ..., l0: _Optional[float] = ..., fvu: _Optional[float] = ..., output_site: _Optional[str] = ..., activation: _Optional[str] = ..., editable: _Optional[bool] = ..., not_editable_because: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_prompt_tokens", "max_tokens", "max_choices", "max_stop_strings", "max_edits", "max_reported_features", "max_top_k", "max_logprobs", "rows_per_site", "slots", "queue", "max_prompt_chars", "max_messages", "max_stop_chars", "max_logit_bias", "max_salt_chars", "max_page_size", "max_query_chars", "max_message_bytes", "max_reply_bytes", "write_timeout_s", "max_bad_words", "max_allowed_token_ids", "max_structured_chars", "max_structured_choices", "max_name_chars", "max_prompt_logprobs", "max_wait_s", "request_share", "caller_share", "max_pending_bytes")
    MAX_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_CHOICES_FIELD_NUMBER: _ClassVar[int]
    MAX_STOP_STRINGS_FIELD_NUMBER: _ClassVar[int]
    MAX_EDITS_FIELD_NUMBER: _ClassVar[int]
    MAX_REPORTED_FEATURES_FIELD_NUMBER: _ClassVar[int]
    MAX_TOP_K_FIELD_NUMBER: _ClassVar[int]
    MAX_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_SITE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_CHARS_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGES_FIELD_NUMBER: _ClassVar[int]
    MAX_STOP_CHARS_FIELD_NUMBER: _ClassVar[int]
    MAX_LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    MAX_SALT_CHARS_FIELD_NUMBER: _ClassVar[int]
    MAX_PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_QUERY_CHARS_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_REPLY_BYTES_FIELD_NUMBER: _ClassVar[int]
    WRITE_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    MAX_BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    MAX_ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_STRUCTURED_CHARS_FIELD_NUMBER: _ClassVar[int]
    MAX_STRUCTURED_CHOICES_FIELD_NUMBER: _ClassVar[int]
    MAX_NAME_CHARS_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MAX_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    REQUEST_SHARE_FIELD_NUMBER: _ClassVar[int]
    CALLER_SHARE_FIELD_NUMBER: _ClassVar[int]
    MAX_PENDING_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_prompt_tokens: int
    max_tokens: int
    max_choices: int
    max_stop_strings: int
    max_edits: int
    max_reported_features: int
    max_top_k: int
    max_logprobs: int
    rows_per_site: int
    slots: int
    queue: int
    max_prompt_chars: int
    max_messages: int
    max_stop_chars: int
    max_logit_bias: int
    max_salt_chars: int
    max_page_size: int
    max_query_chars: int
    max_message_bytes: int
    max_reply_bytes: int
    write_timeout_s: float
    max_bad_words: int
    max_allowed_token_ids: int
    max_structured_chars: int
    max_structured_choices: int
    max_name_chars: int
    max_prompt_logprobs: int
    max_wait_s: float
    request_share: float
    caller_share: float
    max_pending_bytes: int
    def __init__(self, max_prompt_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ..., max_choices: _Optional[int] = ..., max_stop_strings: _Optional[int] = ..., max_edits: _Optional[int] = ..., max_reported_features: _Optional[int] = ..., max_top_k: _Optional[int] = ..., max_logprobs: _Optional[int] = ..., rows_per_site: _Optional[int] = ..., slots: _Optional[int] = ..., queue: _Optional[int] = ..., max_prompt_chars: _Optional[int] = ..., max_messages: _Optional[int] = ..., max_stop_chars: _Optional[int] = ..., max_logit_bias: _Optional[int] = ..., max_salt_chars: _Optional[int] = ..., max_page_size: _Optional[int] = ..., max_query_chars: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., max_reply_bytes: _Optional[int] = ..., write_timeout_s: _Optional[float] = ..., max_bad_words: _Optional[int] = ..., max_allowed_token_ids: _Optional[int] = ..., max_structured_chars: _Optional[int] = ..., max_structured_choices: _Optional[int] = ..., max_name_chars: _Optional[int] = ..., max_prompt_logprobs: _Optional[int] = ..., max_wait_s: _Optional[float] = ..., request_share: _Optional[float] = ..., caller_share: _Optional[float] = ..., max_pending_bytes: _Optional[int] = ...) -> None: ...

class ListProgramsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListProgramsResponse(_message.Message):
    __slots__ = ("programs",)
    PROGRAMS_FIELD_NUMBER: _ClassVar[int]
    programs: _containers.RepeatedCompositeFieldContainer[NamedProgram]
    def __init__(self, programs: _Optional[_Iterable[_Union[NamedProgram, _Mapping]]] = ...) -> None: ...

class NamedProgram(_message.Message):
    __slots__ = ("name", "description", "digest", "always")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ALWAYS_FIELD_NUMBER: _ClassVar[int]
    name: str
    description: str
    digest: str
    always: bool
    def __init__(self, name: _Optional[str] = ..., description: _Optional[str] = ..., digest: _Optional[str] = ..., always: _Optional[bool] = ...) -> None: ...
