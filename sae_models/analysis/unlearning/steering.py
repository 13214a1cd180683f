"""Edits under gates, as an evaluation applies them: every one is the formula of edit.py with parameters of its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor

from rudder.sae_models.analysis import program as programs
from rudder.sae_models.analysis.detector import Detector, window_mean
from rudder.sae_models.analysis.program import Effect, Program, displace
from rudder.sae_models.analysis.unlearning.rig import Context
from rudder.sae_models.bundle.bundle import Bundle
from rudder.sae_models.operations import EDIT, IDENTITY_EDIT, OPERATIONS
from rudder.sae_models.sae import Rows, activations

# Returns where it is open [n, length].
Gate = Callable[[Context], Tensor]


@dataclass(frozen=True)
class Steering:
    """Edits of rows, columns [len(EDIT), rows], with parameters of the formula's ENTRY, where a gate is open."""

    rows: Rows
    columns: Tensor
    gate: Gate
    entry: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, text: Context) -> Effect:
        """Apply the edits."""
        return displace(text.x, self.rows, self.columns, self.entry, self.gate(text) & text.counted)


@dataclass(frozen=True)
class ProgramEdit:
    """A program as an edit."""

    program: Program
    bundle: Bundle

    def __call__(self, text: Context) -> Effect:
        """Apply the program."""
        return programs.apply(self.program, self.bundle, text.x, text.counted)


def untouched(text: Context) -> Effect:
    """Change nothing."""
    return Effect(text.x, torch.zeros_like(text.counted))


def always(text: Context) -> Tensor:
    """Return an open gate."""
    return text.counted


@dataclass(frozen=True)
class AlarmGate:
    """Open from the token on at which the mean score of the last `window` tokens exceeds a level, and if that is in the
    prompt, from the start of the text: the server runs such a prompt again (GUARD_ACTION_CLAMP_FROM_START).

    Closed before `min_tokens` tokens.
    """

    detector: Detector
    level: float
    window: int = 32
    min_tokens: int = 12

    def __call__(self, text: Context) -> Tensor:
        """Return where the gate is open."""
        alarm = self.statistic(text) > self.level
        return alarm.cummax(1).values | (alarm & in_prompt(text)).any(1, keepdim=True)

    def statistic(self, text: Context) -> Tensor:
        """Return the mean of the last scores [n, length], minus infinity where no alarm can be."""
        mean, count = window_mean(self.detector.score(text.x), text.counted, self.window)
        return torch.where(text.counted & (count >= self.min_tokens), mean, -inf)


@dataclass(frozen=True)
class TokenGate:
    """Open at tokens where any of the rows is active."""

    rows: Rows

    def __call__(self, text: Context) -> Tensor:
        """Return where the gate is open."""
        return (activations(text.x, self.rows) > 0).any(-1) & text.counted


@dataclass(frozen=True)
class ShareGate:
    """Open at tokens where any of the rows is active, in texts with a share of such tokens above a level.

    The share is of the prompt, as in Dynamic SAE Guardrails (arXiv 2504.08192): it is not causal within the prompt.
    """

    rows: Rows
    level: float

    def __call__(self, text: Context) -> Tensor:
        """Return where the gate is open."""
        active = TokenGate(self.rows)(text)
        return active & (self.share(text, active) > self.level)[:, None]

    def share(self, text: Context, active: Tensor) -> Tensor:
        """Return the share of the prompt's tokens that are active [n]."""
        judged = in_prompt(text) & text.counted
        return (active & judged).sum(1) / judged.sum(1).clamp(min=1)


def in_prompt(text: Context) -> Tensor:
    """Return the mask of prompt tokens [n, length]."""
    return torch.arange(text.x.shape[1]) < text.prompt[:, None]


def columns(operation: str, values: Sequence[float], **parameters: float) -> Tensor:
    """Return the columns [len(EDIT), rows] of one operation with a value for each row.

    `parameters`: of EDIT, such as relative=1 for values in norms of x.
    """
    identity = dict(zip(EDIT, IDENTITY_EDIT, strict=True)) | {"above": -inf}
    rows = [identity | OPERATIONS[operation](value) | parameters for value in values]
    return torch.tensor([[row[name] for name in EDIT] for row in rows]).view(-1, len(EDIT)).T


def above(column: Tensor, levels: Sequence[float] | Tensor) -> Tensor:
    """Return the columns with a level for each row, above which its activation is edited."""
    changed = column.clone()
    changed[EDIT.index("above")] = torch.as_tensor(levels)
    return changed


def vector_rows(directions: Tensor) -> Rows:
    """Return rows without an encoder, f = 0, that write along directions [n, d]."""
    return Rows(torch.zeros_like(directions), torch.zeros(len(directions)), torch.zeros(len(directions)), directions)


def linear_rows(encoder: Tensor, bias: Tensor, decoder: Tensor) -> Rows:
    """Return rows without a threshold: f = z."""
    return Rows(encoder, bias, torch.full_like(bias, -inf), decoder)


def blended(mean: Tensor, weight: float, gate: Gate) -> Steering:
    """Return the blend of weight `weight` towards mean [d]."""
    identity = torch.tensor(IDENTITY_EDIT)[:, None]
    return Steering(vector_rows(mean[None]), identity, gate, {"weight": weight, "blend_row": 0})
