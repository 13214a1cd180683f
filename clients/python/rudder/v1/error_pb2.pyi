import datetime

from google.protobuf import any_pb2 as _any_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REASON_UNSPECIFIED: _ClassVar[Reason]
    REASON_FIELD_INVALID: _ClassVar[Reason]
    REASON_FEATURE_UNKNOWN: _ClassVar[Reason]
    REASON_SITE_UNKNOWN: _ClassVar[Reason]
    REASON_PROGRAM_UNKNOWN: _ClassVar[Reason]
    REASON_ROW_LOCKED: _ClassVar[Reason]
    REASON_QUEUE_FULL: _ClassVar[Reason]
    REASON_BANK_ROWS_FULL: _ClassVar[Reason]
    REASON_BANK_SLOTS_FULL: _ClassVar[Reason]
    REASON_BANK_CAPTURE_FULL: _ClassVar[Reason]
    REASON_DRAINING: _ClassVar[Reason]
    REASON_ENGINE_DEAD: _ClassVar[Reason]
    REASON_CLIENT_TOO_SLOW: _ClassVar[Reason]
    REASON_VERDICT_LOST: _ClassVar[Reason]
    REASON_INTERNAL: _ClassVar[Reason]
    REASON_POLICY_FORBIDS: _ClassVar[Reason]
    REASON_MESSAGE_TOO_LARGE: _ClassVar[Reason]
    REASON_POLICY_UNKNOWN: _ClassVar[Reason]
    REASON_POLICY_INVALID: _ClassVar[Reason]
    REASON_POLICY_REFUSED: _ClassVar[Reason]
    REASON_AUDIT_FAILED: _ClassVar[Reason]
    REASON_NOT_ALLOWED: _ClassVar[Reason]
    REASON_UNAUTHENTICATED: _ClassVar[Reason]
    REASON_TOKEN_EXPIRED: _ClassVar[Reason]
    REASON_ROLE_MISSING: _ClassVar[Reason]
    REASON_QUOTA_REQUESTS: _ClassVar[Reason]
    REASON_QUOTA_TOKENS: _ClassVar[Reason]
    REASON_QUOTA_STREAMS: _ClassVar[Reason]
    REASON_TOPIC_UNKNOWN: _ClassVar[Reason]
    REASON_TOPIC_INERT: _ClassVar[Reason]
    REASON_QUOTA_ROWS: _ClassVar[Reason]
    REASON_ENGINE_STALLED: _ClassVar[Reason]
    REASON_POLICY_NOT_APPLIED: _ClassVar[Reason]
REASON_UNSPECIFIED: Reason
REASON_FIELD_INVALID: Reason
REASON_FEATURE_UNKNOWN: Reason
REASON_SITE_UNKNOWN: Reason
REASON_PROGRAM_UNKNOWN: Reason
REASON_ROW_LOCKED: Reason
REASON_QUEUE_FULL: Reason
REASON_BANK_ROWS_FULL: Reason
REASON_BANK_SLOTS_FULL: Reason
REASON_BANK_CAPTURE_FULL: Reason
REASON_DRAINING: Reason
REASON_ENGINE_DEAD: Reason
REASON_CLIENT_TOO_SLOW: Reason
REASON_VERDICT_LOST: Reason
REASON_INTERNAL: Reason
REASON_POLICY_FORBIDS: Reason
REASON_MESSAGE_TOO_LARGE: Reason
REASON_POLICY_UNKNOWN: Reason
REASON_POLICY_INVALID: Reason
REASON_POLICY_REFUSED: Reason
REASON_AUDIT_FAILED: Reason
REASON_NOT_ALLOWED: Reason
REASON_UNAUTHENTICATED: Reason
REASON_TOKEN_EXPIRED: Reason
REASON_ROLE_MISSING: Reason
REASON_QUOTA_REQUESTS: Reason
REASON_QUOTA_TOKENS: Reason
REASON_QUOTA_STREAMS: Reason
REASON_TOPIC_UNKNOWN: Reason
REASON_TOPIC_INERT: Reason
REASON_QUOTA_ROWS: Reason
REASON_ENGINE_STALLED: Reason
REASON_POLICY_NOT_APPLIED: Reason

class ErrorStatus(_message.Message):
    __slots__ = ("code", "message", "details")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    details: _containers.RepeatedCompositeFieldContainer[_any_pb2.Any]
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., details: _Optional[_Iterable[_Union[_any_pb2.Any, _Mapping]]] = ...) -> None: ...

class ErrorInfo(_message.Message):
    __slots__ = ("reason", "domain", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REASON_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    reason: str
    domain: str
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, reason: _Optional[str] = ..., domain: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class BadRequest(_message.Message):
    __slots__ = ("field_violations",)
    FIELD_VIOLATIONS_FIELD_NUMBER: _ClassVar[int]
    field_violations: _containers.RepeatedCompositeFieldContainer[FieldViolation]
    def __init__(self, field_violations: _Optional[_Iterable[_Union[FieldViolation, _Mapping]]] = ...) -> None: ...

class FieldViolation(_message.Message):
    __slots__ = ("field", "description")
    FIELD_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    field: str
    description: str
    def __init__(self, field: _Optional[str] = ..., description: _Optional[str] = ...) -> None: ...

class RetryInfo(_message.Message):
    __slots__ = ("retry_delay",)
    RETRY_DELAY_FIELD_NUMBER: _ClassVar[int]
    retry_delay: _duration_pb2.Duration
    def __init__(self, retry_delay: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...
