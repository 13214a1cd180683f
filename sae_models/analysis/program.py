"""The programs of this package's YAML files, and what they do to the residual stream, in plain PyTorch.

The part of message Program (proto/rudder/v1) that the shipped programs use: edits of latents at one site, a blend, and
a gate read at that site. A file that asks for more is refused.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
import yaml
from torch import Tensor

from sae_models.analysis.detector import cusum
from sae_models.bundle import Bundle
from sae_models.sae import activations

RESIDUAL_NORM = "UNIT_RESIDUAL_NORM"
ABSOLUTE = "UNIT_ABSOLUTE"


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A message in its JSON form."""


class Feature(Message, frozen=True):
    """A latent."""

    index: int
    bundle: str = ""


class Probe(Message, frozen=True):
    """score = x . weights + bias."""

    name: str
    weights: tuple[float, ...]
    bias: float = 0.0


class Row(Message, frozen=True):
    """A latent or a probe."""

    feature: Feature | None = None
    probe: Probe | None = None


class Edit(Message, frozen=True):
    """One of add, set (at every open token) and clamp (where the latent is active)."""

    row: Row
    add: float | None = None
    set: float | None = None
    clamp: float | None = None
    unit: str = ABSOLUTE


class Blend(Message, frozen=True):
    """Towards the bundle's mean residual."""

    bundle: str
    weight: float


class SiteEdits(Message, frozen=True):
    """The edits at one site."""

    site: str
    edits: tuple[Edit, ...] = ()
    blend: Blend | None = None


class Trigger(Message, frozen=True):
    """Holds where the row is above the value."""

    row: Row
    above: float = 0.0


class Cusum(Message, frozen=True):
    """The statistic of detector.cusum."""

    drift: float


class SequenceCondition(Message, frozen=True):
    """CUSUM of a score above a level; once open, open for good if latched."""

    score: Row
    cusum: Cusum
    level: float
    latch: bool = False


class Gate(Message, frozen=True):
    """Both conditions must hold; an absent one does."""

    site: str
    any_of: tuple[Trigger, ...] = ()
    sequence: SequenceCondition | None = None


class Program(Message, frozen=True):
    """A named program."""

    name: str
    description: str
    sites: tuple[SiteEdits]
    gate: Gate | None = None


@dataclass(frozen=True)
class Effect:
    """Edited residuals [batch, length, d] and where the program touched them [batch, length]."""

    x: Tensor
    touched: Tensor


def read(path: Path) -> Program:
    """A program of a YAML file. ValueError: not such a program."""
    try:
        return msgspec.convert(yaml.safe_load(path.read_text(encoding="utf-8")), Program)
    except (msgspec.ValidationError, yaml.YAMLError) as error:
        raise ValueError(f"program: {path}: {error}") from error


def write(path: Path, program: Program) -> None:
    """The YAML file of a program: numbers in one line, equal rows spelled once."""
    content = _shared(msgspec.to_builtins(program), {})
    text = yaml.safe_dump(content, sort_keys=False, width=110, default_flow_style=None, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def _shared(value: Any, rows: dict[str, Any]) -> Any:
    """The same content, with equal probes the same object, which YAML writes once and then refers to."""
    if isinstance(value, list | tuple):
        return [_shared(item, rows) for item in value]
    if not isinstance(value, dict):
        return value
    copied = {key: _shared(item, rows) for key, item in value.items()}
    return rows.setdefault(repr(copied), copied) if "weights" in copied else copied


def apply(program: Program, bundle: Bundle, x: Tensor) -> Effect:
    """What the program makes of residuals x [batch, length, d] of whole texts without BOS."""
    site = program.sites[0]
    is_open = gate_open(program.gate, bundle, x)
    norm = x.norm(dim=-1, keepdim=True)
    edited = x + sum((_displacement(edit, bundle, x, norm) for edit in site.edits), torch.zeros(()))
    if site.blend:
        edited = edited + site.blend.weight * (bundle.statistics.mean - edited)
    changed = torch.where(is_open[..., None], edited, x)
    return Effect(changed, (changed != x).any(-1))


def gate_open(gate: Gate | None, bundle: Bundle, x: Tensor) -> Tensor:
    """Where the gate is open [batch, length], for residuals x [batch, length, d] of whole texts without BOS."""
    is_open = torch.ones(x.shape[:-1], dtype=torch.bool)
    if gate and gate.any_of:
        is_open &= torch.stack([_score(trigger.row, bundle, x) > trigger.above for trigger in gate.any_of]).any(0)
    if gate and gate.sequence:
        alarm = cusum(_score(gate.sequence.score, bundle, x), gate.sequence.cusum.drift) > gate.sequence.level
        is_open &= alarm.cummax(-1).values if gate.sequence.latch else alarm
    return is_open


def _score(row: Row, bundle: Bundle, x: Tensor) -> Tensor:
    if row.probe:
        return x @ torch.tensor(row.probe.weights) + row.probe.bias
    return _activation(row, bundle, x)


def _activation(row: Row, bundle: Bundle, x: Tensor) -> Tensor:
    return activations(x, bundle.sae.exact_rows(torch.tensor([_index(row)])))[..., 0]


def _index(row: Row) -> int:
    if row.feature is None:
        raise ValueError("row: only a feature can be edited")
    return row.feature.index


def _displacement(edit: Edit, bundle: Bundle, x: Tensor, norm: Tensor) -> Tensor:
    """[batch, length, d] along the latent's decoder, which has norm 1."""
    f = _activation(edit.row, bundle, x)[..., None]
    unit = norm if edit.unit == RESIDUAL_NORM else torch.ones(())
    decoder = bundle.sae.decoder[_index(edit.row)]
    if edit.add is not None:
        return edit.add * unit * decoder
    if edit.set is not None:
        return (edit.set * unit - f) * decoder
    if edit.clamp is not None:
        return torch.where(f > 0, edit.clamp * unit - f, 0.0) * decoder
    raise ValueError("edit: none of add, set and clamp")
