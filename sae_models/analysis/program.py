"""The programs of this package's YAML files, and what they do to the residual stream, by the formula that serves.

The part of message Program (proto/rudder/v1) that the shipped programs use: edits of latents at one site, a blend, and
a gate read at that site. A file that asks for more is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import msgspec
import torch
import yaml
from torch import Tensor

from rudder.sae_models import edit as formula
from rudder.sae_models import operations
from rudder.sae_models.analysis.detector import cusum
from rudder.sae_models.bundle.bundle import Bundle
from rudder.sae_models.sae import Rows, activations

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
    site, flat = program.sites[0], x.reshape(-1, x.shape[-1])
    is_open = gate_open(program.gate, bundle, x).reshape(-1)
    parts = [row_of(edit.row, bundle) for edit in site.edits]
    if site.blend:
        mean = bundle.statistics.mean[None]
        parts.append(Rows(torch.zeros_like(mean), torch.zeros(1), torch.zeros(1), mean))
    rows = stacked(parts)
    columns = [edit_column(edit) for edit in site.edits] + [operations.IDENTITY_EDIT] * bool(site.blend)
    edits = torch.tensor(columns).T.expand(len(flat), -1, -1)
    blend = {"weight": site.blend.weight, "blend_row": len(site.edits)} if site.blend else {}
    move, moved = formula.edit(flat, activations(flat, rows), rows.decoder, edits, entries(len(flat), blend), is_open)
    return Effect((flat + move).reshape(x.shape), moved.any(-1).reshape(x.shape[:-1]))


def gate_open(gate: Gate | None, bundle: Bundle, x: Tensor) -> Tensor:
    """Where the gate is open [batch, length], for residuals x [batch, length, d] of whole texts without BOS."""
    is_open = torch.ones(x.shape[:-1], dtype=torch.bool)
    if gate and gate.any_of:
        f = activations(x, stacked([row_of(trigger.row, bundle) for trigger in gate.any_of]))
        is_open &= (f > torch.tensor([trigger.above for trigger in gate.any_of])).any(-1)
    if gate and gate.sequence:
        score = activations(x, row_of(gate.sequence.score, bundle))[..., 0]
        alarm = cusum(score, gate.sequence.cusum.drift) > gate.sequence.level
        is_open &= alarm.cummax(-1).values if gate.sequence.latch else alarm
    return is_open


def entries(tokens: int, parameters: dict[str, float]) -> Tensor:
    """The same entry parameters at every token, [tokens, len(ENTRY)]."""
    identity = dict(zip(operations.ENTRY, operations.IDENTITY_ENTRY, strict=True))
    return torch.tensor([*(identity | parameters).values()], dtype=torch.float64).expand(tokens, -1)


def edit_column(edit: Edit) -> tuple[float, ...]:
    """The formula's parameters of an edit, in the order of operations.EDIT."""
    operand = {"add": edit.add, "set": edit.set, "clamp": edit.clamp}
    operation, value = next(((name, value) for name, value in operand.items() if value is not None), ("", 0.0))
    if not operation:
        raise ValueError("edit: none of add, set and clamp")
    given = {"above": -inf, "relative": float(edit.unit == RESIDUAL_NORM)} | operations.OPERATIONS[operation](value)
    return tuple((dict(zip(operations.EDIT, operations.IDENTITY_EDIT, strict=True)) | given).values())


def row_of(row: Row, bundle: Bundle) -> Rows:
    """One row; a probe has no decoder."""
    if row.feature:
        return bundle.sae.exact_rows(torch.tensor([row.feature.index]))
    if row.probe is None:
        raise ValueError("row: neither a feature nor a probe")
    weights = torch.tensor([row.probe.weights])
    return Rows(weights, torch.tensor([row.probe.bias]), torch.tensor([-inf]), torch.zeros_like(weights))


def stacked(rows: Sequence[Rows]) -> Rows:
    """All of the rows as one."""
    return Rows(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
