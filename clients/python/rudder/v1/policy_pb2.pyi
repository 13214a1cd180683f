from rudder.v1 import inference_pb2 as _inference_pb2
from rudder.v1 import program_pb2 as _program_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PolicyMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POLICY_MODE_UNSPECIFIED: _ClassVar[PolicyMode]
    POLICY_MODE_ENFORCE: _ClassVar[PolicyMode]
    POLICY_MODE_SHADOW: _ClassVar[PolicyMode]

class GuardAction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GUARD_ACTION_UNSPECIFIED: _ClassVar[GuardAction]
    GUARD_ACTION_COUNT: _ClassVar[GuardAction]
    GUARD_ACTION_ANNOTATE: _ClassVar[GuardAction]
    GUARD_ACTION_CLAMP: _ClassVar[GuardAction]
    GUARD_ACTION_CLAMP_FROM_START: _ClassVar[GuardAction]
    GUARD_ACTION_STOP: _ClassVar[GuardAction]
    GUARD_ACTION_REJECT: _ClassVar[GuardAction]
POLICY_MODE_UNSPECIFIED: PolicyMode
POLICY_MODE_ENFORCE: PolicyMode
POLICY_MODE_SHADOW: PolicyMode
GUARD_ACTION_UNSPECIFIED: GuardAction
GUARD_ACTION_COUNT: GuardAction
GUARD_ACTION_ANNOTATE: GuardAction
GUARD_ACTION_CLAMP: GuardAction
GUARD_ACTION_CLAMP_FROM_START: GuardAction
GUARD_ACTION_STOP: GuardAction
GUARD_ACTION_REJECT: GuardAction

class Policy(_message.Message):
    __slots__ = ("name", "description", "version", "mode", "binds", "bundles", "program", "guards", "locked", "watch", "rights", "forbidden_fields", "max_displacement", "refusal", "removed")
    class BundlesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    BINDS_FIELD_NUMBER: _ClassVar[int]
    BUNDLES_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_FIELD_NUMBER: _ClassVar[int]
    GUARDS_FIELD_NUMBER: _ClassVar[int]
    LOCKED_FIELD_NUMBER: _ClassVar[int]
    WATCH_FIELD_NUMBER: _ClassVar[int]
    RIGHTS_FIELD_NUMBER: _ClassVar[int]
    FORBIDDEN_FIELDS_FIELD_NUMBER: _ClassVar[int]
    MAX_DISPLACEMENT_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    name: str
    description: str
    version: int
    mode: PolicyMode
    binds: Binding
    bundles: _containers.ScalarMap[str, str]
    program: _program_pb2.Program
    guards: _containers.RepeatedCompositeFieldContainer[Guard]
    locked: _containers.RepeatedCompositeFieldContainer[_inference_pb2.SiteFeature]
    watch: _containers.RepeatedCompositeFieldContainer[_inference_pb2.SiteFeature]
    rights: Rights
    forbidden_fields: _containers.RepeatedScalarFieldContainer[str]
    max_displacement: float
    refusal: str
    removed: bool
    def __init__(self, name: _Optional[str] = ..., description: _Optional[str] = ..., version: _Optional[int] = ..., mode: _Optional[_Union[PolicyMode, str]] = ..., binds: _Optional[_Union[Binding, _Mapping]] = ..., bundles: _Optional[_Mapping[str, str]] = ..., program: _Optional[_Union[_program_pb2.Program, _Mapping]] = ..., guards: _Optional[_Iterable[_Union[Guard, _Mapping]]] = ..., locked: _Optional[_Iterable[_Union[_inference_pb2.SiteFeature, _Mapping]]] = ..., watch: _Optional[_Iterable[_Union[_inference_pb2.SiteFeature, _Mapping]]] = ..., rights: _Optional[_Union[Rights, _Mapping]] = ..., forbidden_fields: _Optional[_Iterable[str]] = ..., max_displacement: _Optional[float] = ..., refusal: _Optional[str] = ..., removed: _Optional[bool] = ...) -> None: ...

class Binding(_message.Message):
    __slots__ = ("all", "callers", "roles")
    ALL_FIELD_NUMBER: _ClassVar[int]
    CALLERS_FIELD_NUMBER: _ClassVar[int]
    ROLES_FIELD_NUMBER: _ClassVar[int]
    all: bool
    callers: _containers.RepeatedScalarFieldContainer[str]
    roles: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, all: _Optional[bool] = ..., callers: _Optional[_Iterable[str]] = ..., roles: _Optional[_Iterable[str]] = ...) -> None: ...

class Rights(_message.Message):
    __slots__ = ("edit_latents", "raw_vectors", "edit_behind_policy", "edit_before_guard", "read_guards")
    EDIT_LATENTS_FIELD_NUMBER: _ClassVar[int]
    RAW_VECTORS_FIELD_NUMBER: _ClassVar[int]
    EDIT_BEHIND_POLICY_FIELD_NUMBER: _ClassVar[int]
    EDIT_BEFORE_GUARD_FIELD_NUMBER: _ClassVar[int]
    READ_GUARDS_FIELD_NUMBER: _ClassVar[int]
    edit_latents: bool
    raw_vectors: bool
    edit_behind_policy: bool
    edit_before_guard: bool
    read_guards: bool
    def __init__(self, edit_latents: _Optional[bool] = ..., raw_vectors: _Optional[bool] = ..., edit_behind_policy: _Optional[bool] = ..., edit_before_guard: _Optional[bool] = ..., read_guards: _Optional[bool] = ...) -> None: ...

class Guard(_message.Message):
    __slots__ = ("name", "score", "share", "moving_average", "window", "cusum", "agreement", "level", "min_tokens", "phase", "action", "hold_back", "refusal", "spare_other_choices")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    MOVING_AVERAGE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    CUSUM_FIELD_NUMBER: _ClassVar[int]
    AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    HOLD_BACK_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    SPARE_OTHER_CHOICES_FIELD_NUMBER: _ClassVar[int]
    name: str
    score: Score
    share: _program_pb2.Share
    moving_average: _program_pb2.MovingAverage
    window: _program_pb2.Window
    cusum: _program_pb2.Cusum
    agreement: Agreement
    level: float
    min_tokens: int
    phase: _program_pb2.Phase
    action: GuardAction
    hold_back: int
    refusal: str
    spare_other_choices: bool
    def __init__(self, name: _Optional[str] = ..., score: _Optional[_Union[Score, _Mapping]] = ..., share: _Optional[_Union[_program_pb2.Share, _Mapping]] = ..., moving_average: _Optional[_Union[_program_pb2.MovingAverage, _Mapping]] = ..., window: _Optional[_Union[_program_pb2.Window, _Mapping]] = ..., cusum: _Optional[_Union[_program_pb2.Cusum, _Mapping]] = ..., agreement: _Optional[_Union[Agreement, _Mapping]] = ..., level: _Optional[float] = ..., min_tokens: _Optional[int] = ..., phase: _Optional[_Union[_program_pb2.Phase, str]] = ..., action: _Optional[_Union[GuardAction, str]] = ..., hold_back: _Optional[int] = ..., refusal: _Optional[str] = ..., spare_other_choices: _Optional[bool] = ...) -> None: ...

class Score(_message.Message):
    __slots__ = ("terms", "bias", "token_model")
    TERMS_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_MODEL_FIELD_NUMBER: _ClassVar[int]
    terms: _containers.RepeatedCompositeFieldContainer[ScoreTerm]
    bias: float
    token_model: TokenModel
    def __init__(self, terms: _Optional[_Iterable[_Union[ScoreTerm, _Mapping]]] = ..., bias: _Optional[float] = ..., token_model: _Optional[_Union[TokenModel, _Mapping]] = ...) -> None: ...

class ScoreTerm(_message.Message):
    __slots__ = ("site", "row", "weight")
    SITE_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    site: str
    row: _program_pb2.Row
    weight: float
    def __init__(self, site: _Optional[str] = ..., row: _Optional[_Union[_program_pb2.Row, _Mapping]] = ..., weight: _Optional[float] = ...) -> None: ...

class TokenModel(_message.Message):
    __slots__ = ("file", "sha256")
    FILE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    file: str
    sha256: str
    def __init__(self, file: _Optional[str] = ..., sha256: _Optional[str] = ...) -> None: ...

class Agreement(_message.Message):
    __slots__ = ("above", "tokens")
    ABOVE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    above: float
    tokens: int
    def __init__(self, above: _Optional[float] = ..., tokens: _Optional[int] = ...) -> None: ...

class PolicyServiceListRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PolicyServiceListResponse(_message.Message):
    __slots__ = ("policies",)
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    policies: _containers.RepeatedCompositeFieldContainer[PolicySummary]
    def __init__(self, policies: _Optional[_Iterable[_Union[PolicySummary, _Mapping]]] = ...) -> None: ...

class PolicySummary(_message.Message):
    __slots__ = ("name", "description", "version", "digest", "mode", "guards", "certificate")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    GUARDS_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    name: str
    description: str
    version: int
    digest: str
    mode: PolicyMode
    guards: _containers.RepeatedScalarFieldContainer[str]
    certificate: str
    def __init__(self, name: _Optional[str] = ..., description: _Optional[str] = ..., version: _Optional[int] = ..., digest: _Optional[str] = ..., mode: _Optional[_Union[PolicyMode, str]] = ..., guards: _Optional[_Iterable[str]] = ..., certificate: _Optional[str] = ...) -> None: ...

class PolicyServiceGetRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class PolicyServiceGetResponse(_message.Message):
    __slots__ = ("summary", "policy")
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    summary: PolicySummary
    policy: Policy
    def __init__(self, summary: _Optional[_Union[PolicySummary, _Mapping]] = ..., policy: _Optional[_Union[Policy, _Mapping]] = ...) -> None: ...

class ValidateRequest(_message.Message):
    __slots__ = ("policy",)
    POLICY_FIELD_NUMBER: _ClassVar[int]
    policy: Policy
    def __init__(self, policy: _Optional[_Union[Policy, _Mapping]] = ...) -> None: ...

class ValidateResponse(_message.Message):
    __slots__ = ("problems", "digest")
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    problems: _containers.RepeatedCompositeFieldContainer[PolicyProblem]
    digest: str
    def __init__(self, problems: _Optional[_Iterable[_Union[PolicyProblem, _Mapping]]] = ..., digest: _Optional[str] = ...) -> None: ...

class PolicyProblem(_message.Message):
    __slots__ = ("field", "description")
    FIELD_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    field: str
    description: str
    def __init__(self, field: _Optional[str] = ..., description: _Optional[str] = ...) -> None: ...

class ApplyRequest(_message.Message):
    __slots__ = ("policy",)
    POLICY_FIELD_NUMBER: _ClassVar[int]
    policy: Policy
    def __init__(self, policy: _Optional[_Union[Policy, _Mapping]] = ...) -> None: ...

class ApplyResponse(_message.Message):
    __slots__ = ("summary",)
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    summary: PolicySummary
    def __init__(self, summary: _Optional[_Union[PolicySummary, _Mapping]] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("caller", "roles")
    CALLER_FIELD_NUMBER: _ClassVar[int]
    ROLES_FIELD_NUMBER: _ClassVar[int]
    caller: str
    roles: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, caller: _Optional[str] = ..., roles: _Optional[_Iterable[str]] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("policies", "statements")
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    STATEMENTS_FIELD_NUMBER: _ClassVar[int]
    policies: _containers.RepeatedCompositeFieldContainer[PolicySummary]
    statements: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, policies: _Optional[_Iterable[_Union[PolicySummary, _Mapping]]] = ..., statements: _Optional[_Iterable[str]] = ...) -> None: ...
