from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Unit(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNIT_UNSPECIFIED: _ClassVar[Unit]
    UNIT_ABSOLUTE: _ClassVar[Unit]
    UNIT_MAX_ACTIVATION: _ClassVar[Unit]
    UNIT_RESIDUAL_NORM: _ClassVar[Unit]

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PHASE_BOTH: _ClassVar[Phase]
    PHASE_PROMPT: _ClassVar[Phase]
    PHASE_GENERATED: _ClassVar[Phase]
UNIT_UNSPECIFIED: Unit
UNIT_ABSOLUTE: Unit
UNIT_MAX_ACTIVATION: Unit
UNIT_RESIDUAL_NORM: Unit
PHASE_UNSPECIFIED: Phase
PHASE_BOTH: Phase
PHASE_PROMPT: Phase
PHASE_GENERATED: Phase

class Program(_message.Message):
    __slots__ = ("name", "description", "sites", "gate")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    GATE_FIELD_NUMBER: _ClassVar[int]
    name: str
    description: str
    sites: _containers.RepeatedCompositeFieldContainer[SiteEdits]
    gate: Gate
    def __init__(self, name: _Optional[str] = ..., description: _Optional[str] = ..., sites: _Optional[_Iterable[_Union[SiteEdits, _Mapping]]] = ..., gate: _Optional[_Union[Gate, _Mapping]] = ...) -> None: ...

class SiteEdits(_message.Message):
    __slots__ = ("site", "edits", "blend", "restore_norm", "max_displacement")
    SITE_FIELD_NUMBER: _ClassVar[int]
    EDITS_FIELD_NUMBER: _ClassVar[int]
    BLEND_FIELD_NUMBER: _ClassVar[int]
    RESTORE_NORM_FIELD_NUMBER: _ClassVar[int]
    MAX_DISPLACEMENT_FIELD_NUMBER: _ClassVar[int]
    site: str
    edits: _containers.RepeatedCompositeFieldContainer[Edit]
    blend: Blend
    restore_norm: bool
    max_displacement: float
    def __init__(self, site: _Optional[str] = ..., edits: _Optional[_Iterable[_Union[Edit, _Mapping]]] = ..., blend: _Optional[_Union[Blend, _Mapping]] = ..., restore_norm: _Optional[bool] = ..., max_displacement: _Optional[float] = ...) -> None: ...

class Row(_message.Message):
    __slots__ = ("feature", "vector", "probe")
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    feature: Feature
    vector: Vector
    probe: Probe
    def __init__(self, feature: _Optional[_Union[Feature, _Mapping]] = ..., vector: _Optional[_Union[Vector, _Mapping]] = ..., probe: _Optional[_Union[Probe, _Mapping]] = ...) -> None: ...

class Feature(_message.Message):
    __slots__ = ("bundle", "index")
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    bundle: str
    index: int
    def __init__(self, bundle: _Optional[str] = ..., index: _Optional[int] = ...) -> None: ...

class Vector(_message.Message):
    __slots__ = ("name", "values")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    name: str
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, name: _Optional[str] = ..., values: _Optional[_Iterable[float]] = ...) -> None: ...

class Probe(_message.Message):
    __slots__ = ("name", "weights", "bias")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    name: str
    weights: _containers.RepeatedScalarFieldContainer[float]
    bias: float
    def __init__(self, name: _Optional[str] = ..., weights: _Optional[_Iterable[float]] = ..., bias: _Optional[float] = ...) -> None: ...

class Edit(_message.Message):
    __slots__ = ("row", "add", "set", "ablate", "scale", "cap", "floor", "clamp", "unit", "when_above", "phase")
    ROW_FIELD_NUMBER: _ClassVar[int]
    ADD_FIELD_NUMBER: _ClassVar[int]
    SET_FIELD_NUMBER: _ClassVar[int]
    ABLATE_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    CAP_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    CLAMP_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    WHEN_ABOVE_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    row: Row
    add: float
    set: float
    ablate: bool
    scale: float
    cap: float
    floor: float
    clamp: float
    unit: Unit
    when_above: float
    phase: Phase
    def __init__(self, row: _Optional[_Union[Row, _Mapping]] = ..., add: _Optional[float] = ..., set: _Optional[float] = ..., ablate: _Optional[bool] = ..., scale: _Optional[float] = ..., cap: _Optional[float] = ..., floor: _Optional[float] = ..., clamp: _Optional[float] = ..., unit: _Optional[_Union[Unit, str]] = ..., when_above: _Optional[float] = ..., phase: _Optional[_Union[Phase, str]] = ...) -> None: ...

class Blend(_message.Message):
    __slots__ = ("bundle", "vector", "weight", "phase")
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    bundle: str
    vector: Vector
    weight: float
    phase: Phase
    def __init__(self, bundle: _Optional[str] = ..., vector: _Optional[_Union[Vector, _Mapping]] = ..., weight: _Optional[float] = ..., phase: _Optional[_Union[Phase, str]] = ...) -> None: ...

class Gate(_message.Message):
    __slots__ = ("site", "any_of", "sequence")
    SITE_FIELD_NUMBER: _ClassVar[int]
    ANY_OF_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    site: str
    any_of: _containers.RepeatedCompositeFieldContainer[Trigger]
    sequence: SequenceCondition
    def __init__(self, site: _Optional[str] = ..., any_of: _Optional[_Iterable[_Union[Trigger, _Mapping]]] = ..., sequence: _Optional[_Union[SequenceCondition, _Mapping]] = ...) -> None: ...

class Trigger(_message.Message):
    __slots__ = ("row", "above")
    ROW_FIELD_NUMBER: _ClassVar[int]
    ABOVE_FIELD_NUMBER: _ClassVar[int]
    row: Row
    above: float
    def __init__(self, row: _Optional[_Union[Row, _Mapping]] = ..., above: _Optional[float] = ...) -> None: ...

class SequenceCondition(_message.Message):
    __slots__ = ("score", "share", "moving_average", "window", "cusum", "level", "latch", "min_tokens")
    SCORE_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    MOVING_AVERAGE_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    CUSUM_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    LATCH_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    score: Row
    share: Share
    moving_average: MovingAverage
    window: Window
    cusum: Cusum
    level: float
    latch: bool
    min_tokens: int
    def __init__(self, score: _Optional[_Union[Row, _Mapping]] = ..., share: _Optional[_Union[Share, _Mapping]] = ..., moving_average: _Optional[_Union[MovingAverage, _Mapping]] = ..., window: _Optional[_Union[Window, _Mapping]] = ..., cusum: _Optional[_Union[Cusum, _Mapping]] = ..., level: _Optional[float] = ..., latch: _Optional[bool] = ..., min_tokens: _Optional[int] = ...) -> None: ...

class Share(_message.Message):
    __slots__ = ("above",)
    ABOVE_FIELD_NUMBER: _ClassVar[int]
    above: float
    def __init__(self, above: _Optional[float] = ...) -> None: ...

class MovingAverage(_message.Message):
    __slots__ = ("decay",)
    DECAY_FIELD_NUMBER: _ClassVar[int]
    decay: float
    def __init__(self, decay: _Optional[float] = ...) -> None: ...

class Window(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    def __init__(self, tokens: _Optional[int] = ...) -> None: ...

class Cusum(_message.Message):
    __slots__ = ("drift",)
    DRIFT_FIELD_NUMBER: _ClassVar[int]
    drift: float
    def __init__(self, drift: _Optional[float] = ...) -> None: ...
