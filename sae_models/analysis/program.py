"""Read, write and apply programs offline, with the formula that the server uses (edit.py).

Supports the part of message Program (proto/rudder/v1) that the shipped programs use: edits of latents at one site, a
blend, and a gate read at that site. Other fields in a file are an error.
"""

from collections.abc import Mapping, Sequence
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
from rudder.sae_models.errors import UserError
from rudder.sae_models.sae import Normalisation, Rows, activations
from rudder.sae_models.sae import gain as input_gain

RESIDUAL_NORM = "UNIT_RESIDUAL_NORM"
ABSOLUTE = "UNIT_ABSOLUTE"


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A protobuf message in its JSON form."""


class Feature(Message, frozen=True):
    """A latent of a bundle."""

    index: int
    bundle: str = ""


class Probe(Message, frozen=True):
    """A linear probe: score = x . weights + bias."""

    name: str
    weights: tuple[float, ...]
    bias: float = 0.0


class Row(Message, frozen=True):
    """An SAE row: a latent or a probe."""

    feature: Feature | None = None
    probe: Probe | None = None


class Edit(Message, frozen=True):
    """An edit with one of add, set (both at every open token) and clamp (where the latent is active)."""

    row: Row
    add: float | None = None
    set: float | None = None
    clamp: float | None = None
    unit: str = ABSOLUTE


class Blend(Message, frozen=True):
    """A blend towards the bundle's mean residual."""

    bundle: str
    weight: float


class SiteEdits(Message, frozen=True):
    """The edits and the blend at one site."""

    site: str
    edits: tuple[Edit, ...] = ()
    blend: Blend | None = None


class Trigger(Message, frozen=True):
    """A token condition: true where the row's activation is above the value."""

    row: Row
    above: float = 0.0


class Cusum(Message, frozen=True):
    """The statistic that detector.cusum computes."""

    drift: float


class SequenceCondition(Message, frozen=True):
    """A condition on the sequence: CUSUM of a score above a level; with `latch` it stays true from then on."""

    score: Row
    cusum: Cusum
    level: float
    latch: bool = False


class Gate(Message, frozen=True):
    """A gate: open where both conditions hold; an absent condition always holds."""

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
    """Edited residuals [batch, length, d] and the mask of tokens that the program touched [batch, length]."""

    x: Tensor
    touched: Tensor


def read(path: Path) -> Program:
    """Read a program from a YAML file. ValueError: not a program that this module supports."""
    try:
        return msgspec.convert(yaml.safe_load(path.read_text(encoding="utf-8")), Program)
    except (msgspec.ValidationError, yaml.YAMLError) as error:
        raise UserError(f"program: {path}: {error}") from error


def write(path: Path, message: Message) -> None:
    """Write a program or a guard to a YAML file: lists of numbers on one line, equal probes once, with YAML anchors."""
    content = share_probes(msgspec.to_builtins(message))
    text = yaml.safe_dump(content, sort_keys=False, width=110, default_flow_style=None, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def share_probes(content: Any) -> Any:
    """Return a copy in which equal probes are the same object, which PyYAML writes once and refers to by alias."""
    return _share_probes(content, {})


def _share_probes(value: Any, probes: dict[str, Any]) -> Any:
    if isinstance(value, list | tuple):
        return [_share_probes(item, probes) for item in value]
    if not isinstance(value, dict):
        return value
    copied = {key: _share_probes(item, probes) for key, item in value.items()}
    return probes.setdefault(repr(copied), copied) if "weights" in copied else copied


def apply(program: Program, bundle: Bundle, x: Tensor, counted: Tensor | None = None) -> Effect:
    """Apply a program to residuals x [batch, length, d] of whole texts, as the server does.

    counted [batch, length]: False at BOS, excluded positions and padding, which are neither edited nor evaluated by
    gates; None: True everywhere.
    """
    site, flat = program.sites[0], x.reshape(-1, x.shape[-1])
    counted = torch.ones(x.shape[:-1], dtype=torch.bool) if counted is None else counted
    is_open = gate_open(program.gate, bundle, x, counted)
    parts = [row_of(edit.row, bundle) for edit in site.edits]
    if site.blend:
        mean = bundle.statistics.mean[None]
        parts.append(Rows(torch.zeros_like(mean), torch.zeros(1), torch.zeros(1), mean))
    rows = concatenate(parts)
    columns = [edit_column(edit) for edit in site.edits] + [operations.IDENTITY_EDIT] * bool(site.blend)
    blend = {"weight": site.blend.weight, "blend_row": len(site.edits)} if site.blend else {}
    gain = gain_of([edit.row for edit in site.edits], bundle, flat, blend=bool(site.blend))
    return displace(x, rows, torch.tensor(columns).T, blend, is_open, gain)


def displace(
    x: Tensor, rows: Rows, columns: Tensor, entry: Mapping[str, float], is_open: Tensor, gain: Tensor | None = None
) -> Effect:
    """Apply edits of rows to residuals x [batch, length, d] where is_open [batch, length].

    columns [len(EDIT), rows]: the parameters of each row's edit; `entry`: those of ENTRY that are not the identity;
    gain [batch * length, rows] as in `activations`.
    """
    flat = x.reshape(-1, x.shape[-1])
    f = activations(flat, rows, gain)
    edits = columns.expand(len(flat), -1, -1)
    move, moved = formula.edit(flat, f, rows.decoder, edits, entries(len(flat), entry), is_open.reshape(-1), gain)
    return Effect((flat + move).reshape(x.shape), moved.any(-1).reshape(x.shape[:-1]))


def gate_open(gate: Gate | None, bundle: Bundle, x: Tensor, counted: Tensor) -> Tensor:
    """Return where the gate is open [batch, length], for residuals x [batch, length, d] and `counted` as in `apply`."""
    is_open = counted.clone()
    if gate and gate.any_of:
        triggers = [trigger.row for trigger in gate.any_of]
        f = activations(x, concatenate([row_of(row, bundle) for row in triggers]), gain_of(triggers, bundle, x))
        is_open &= (f > torch.tensor([trigger.above for trigger in gate.any_of])).any(-1)
    if gate and gate.sequence:
        row, drift = gate.sequence.score, gate.sequence.cusum.drift
        score = activations(x, row_of(row, bundle), gain_of([row], bundle, x))[..., 0]
        # A score of `drift` passes the sum on as it is.
        alarm = (cusum(torch.where(counted, score, drift), drift) > gate.sequence.level) & counted
        is_open &= alarm.cummax(-1).values if gate.sequence.latch else alarm
    return is_open


def entries(tokens: int, parameters: Mapping[str, float]) -> Tensor:
    """Return the same entry parameters for every token, [tokens, len(ENTRY)]."""
    identity = dict(zip(operations.ENTRY, operations.IDENTITY_ENTRY, strict=True))
    return torch.tensor([*(identity | dict(parameters)).values()], dtype=torch.float64).expand(tokens, -1)


def edit_column(edit: Edit) -> tuple[float, ...]:
    """Return the formula's parameters of an edit, in the order of operations.EDIT."""
    operand = {"add": edit.add, "set": edit.set, "clamp": edit.clamp}
    operation, value = next(((name, value) for name, value in operand.items() if value is not None), ("", 0.0))
    if not operation:
        raise UserError("edit: none of add, set and clamp")
    relative = {"above": -inf, "relative": float(edit.unit == RESIDUAL_NORM)}
    parameters = relative | operations.OPERATIONS[operation](value)
    return tuple((dict(zip(operations.EDIT, operations.IDENTITY_EDIT, strict=True)) | parameters).values())


def row_of(row: Row, bundle: Bundle) -> Rows:
    """Return the SAE row of a latent, or of a probe with a zero decoder."""
    if row.feature:
        return bundle.sae.exact_rows(torch.tensor([row.feature.index]))
    if row.probe is None:
        raise UserError("row: neither a feature nor a probe")
    weights = torch.tensor([row.probe.weights])
    return Rows(weights, torch.tensor([row.probe.bias]), torch.tensor([-inf]), torch.zeros_like(weights))


def gain_of(rows: Sequence[Row], bundle: Bundle, x: Tensor, *, blend: bool = False) -> Tensor | None:
    """Return the factor on the input of each row [..., rows]: latents read x normalised, other rows do not.

    None where it is 1 for all rows. `blend`: one more row follows.
    """
    kind = bundle.sae.normalisation
    if kind is Normalisation.NONE:
        return None
    normalised, one = input_gain(x, kind), torch.ones_like(x[..., :1])
    return torch.cat([normalised if row.feature else one for row in rows] + [one] * blend, -1)


def concatenate(rows: Sequence[Rows]) -> Rows:
    """Concatenate rows."""
    return Rows(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
