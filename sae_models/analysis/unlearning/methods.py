"""The methods of a study and its controls: each an edit under a gate, with a dose to be tuned.

What is fitted comes from the fold `select`, what is calibrated and the dose from the fold `tune`; a third one is
reported. A method with a gate of its own has it as published; all others share one calibrated gate, so that they differ
in the edit alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rudder.sae_models.analysis.detector import Detector
from rudder.sae_models.analysis.unlearning import latents as rank
from rudder.sae_models.analysis.unlearning import learned
from rudder.sae_models.analysis.unlearning.gate import fit_gate, share_gate
from rudder.sae_models.analysis.unlearning.latents import RANKERS, Activities, activities, best, tokens_of
from rudder.sae_models.analysis.unlearning.learned import LearnedBlend, LearnedRows, null_space_rows
from rudder.sae_models.analysis.unlearning.material import Material
from rudder.sae_models.analysis.unlearning.rig import Edit
from rudder.sae_models.analysis.unlearning.steering import (
    AlarmGate,
    Gate,
    Steering,
    above,
    always,
    blended,
    columns,
    linear_rows,
    untouched,
    vector_rows,
)
from rudder.sae_models.sae import Rows

LATENTS, DSG_LATENTS, ROWS, RANK = 32, 20, 32, 8


@dataclass(frozen=True)
class Fitted:
    """What the methods of one rotation share, computed when it is first asked for. Three folds: 0, 1 and 2."""

    material: Material
    select: int
    tune: int

    @property
    def report(self) -> int:
        """The fold that is reported."""
        return 3 - self.select - self.tune

    @cached_property
    def gate(self) -> AlarmGate:
        """The calibrated gate."""
        return fit_gate(self.material, [self.select], [self.tune])

    @cached_property
    def activities(self) -> Activities:
        """Activities of all latents."""
        return activities(self.material, [self.select])

    @cached_property
    def forget(self) -> Tensor:
        """Residuals of the topic's tokens [n, d]."""
        return tokens_of(self.material, [self.select], self.material.split.topic.books)

    @cached_property
    def retain(self) -> Tensor:
        """Residuals of all other tokens [n, d]."""
        split = self.material.split
        return tokens_of(self.material, [self.select], [*split.topic.neighbours, *split.far])

    @cached_property
    def direction(self) -> Tensor:
        """Unit vector from the mean of the retained tokens to that of the topic's [d]."""
        return normalize(self.forget.mean(0) - self.retain.mean(0), dim=0)

    @property
    def detector(self) -> Detector:
        """The detector of the gate."""
        return self.gate.detector

    def latents(self, ranker: str, count: int) -> list[int]:
        """Return the best latents by a ranker."""
        return best(RANKERS[ranker](self.activities), count)

    def rows(self, latents: list[int]) -> Rows:
        """Return the rows of latents."""
        return self.material.rig.bundle.sae.exact_rows(torch.tensor(latents))

    @cached_property
    def learned_rows(self) -> Rows:
        """Trained rows."""
        encoders = self.rows(self.latents("crisp", ROWS // 2)).encoder
        scale = float((self.retain - self.retain.mean(0)).square().mean().sqrt())
        start = learned.initial_encoder(encoders, self.detector.weights, ROWS, self.select)
        module = LearnedRows(start, self.retain.mean(0), scale)
        learned.fit(self.material, [self.select], module, self.material.size.steps, self.select)
        return module.rows()

    @cached_property
    def learned_blend(self) -> LearnedBlend:
        """A trained target and weight of a blend."""
        module = LearnedBlend(self.retain.mean(0))
        learned.fit(self.material, [self.select], module, self.material.size.steps // 3, self.select)
        return module


@dataclass(frozen=True)
class Method:
    """`edit` of a dose between `low` and `high`; equal bounds: it has no dose. `note`: what it is, in a line."""

    edit: Callable[[Fitted, float], Edit]
    low: float
    high: float
    note: str


def edit_latents(f: Fitted, latents: list[int], column: Tensor, gate: Gate, levels: Tensor | None = None) -> Edit:
    """Return edits of latents; nothing is edited where a ranker found none. `levels`: that activations must exceed."""
    if not latents:
        return untouched
    return Steering(f.rows(latents), column if levels is None else above(column, levels), gate)


def set_all(f: Fitted, latents: list[int], dose: float, gate: Gate) -> Edit:
    """Set all latents to -dose norms of x, active or not."""
    return edit_latents(f, latents, columns("set", [-dose] * len(latents), relative=1), gate)


def clamp_active(f: Fitted, dose: float) -> Edit:
    """Set each latent to -dose norms of x where it is active itself (arXiv 2410.19278)."""
    latents = f.latents("farrell", DSG_LATENTS)
    return edit_latents(f, latents, columns("clamp", [-dose] * len(latents), relative=1), always)


def conditional(f: Fitted, dose: float) -> Edit:
    """Clamp each latent where it exceeds half of its mean active value on the topic (arXiv 2503.11127)."""
    latents = f.latents("farrell", DSG_LATENTS)
    active = f.activities.forget.mean / f.activities.forget.frequency.clamp_min(rank.RARE)
    return edit_latents(f, latents, columns("clamp", [-dose] * len(latents), relative=1), always, active[latents] / 2)


def dsg(f: Fitted, ranker: str, dose: float) -> Edit:
    """Set all latents where any is active, in texts with many such tokens (arXiv 2504.08192)."""
    latents = f.latents(ranker, DSG_LATENTS)
    return set_all(f, latents, dose, share_gate(f.material, f.rows(latents), [f.tune])) if latents else untouched


def saeuron(f: Fitted, dose: float) -> Edit:
    """Multiply each latent by -dose times its mean on the topic where it exceeds its mean over all text
    (arXiv 2501.18052).
    """
    latents, a = f.latents("saeuron", LATENTS), f.activities
    n, m = a.forget.tokens, a.retain.tokens
    background = (n * a.forget.mean + m * a.retain.mean) / (n + m)
    column = columns("scale", [-dose * float(a.forget.mean[i]) for i in latents])
    return edit_latents(f, latents, column, always, background[latents])


def push(f: Fitted, dose: float, *, restore: bool) -> Steering:
    """Move x by -dose norms along the difference of means; `restore`: a rotation, x keeps its norm."""
    column = columns("add", [-dose], relative=1)
    return Steering(vector_rows(f.direction[None]), column, f.gate, {"restore": 1.0} if restore else {})


def projection(f: Fitted, dose: float) -> Steering:
    """Take `dose` times the component along the difference of means away, as measured from the retained mean."""
    u = f.direction[None]
    rows = linear_rows(u, -(u @ f.retain.mean(0)), u)
    return Steering(rows, columns("scale", [1 - dose]), f.gate)


def null_space(f: Fitted, dose: float) -> Steering:
    """Move x towards the retained mean along rows to which retained text is almost orthogonal."""
    rows = null_space_rows(f.retain, f.forget, f.retain.mean(0) - f.forget, RANK)
    return Steering(rows, columns("scale", [1 + dose] * RANK), always)


def learned_rows(f: Fitted, dose: float, gate: Gate) -> Steering:
    """Add `dose` times the displacement of the trained rows."""
    rows = f.learned_rows
    return Steering(rows, columns("scale", [1 + dose] * len(rows.bias)), gate)


def learned_blend(f: Fitted, dose: float) -> Steering:
    """Blend towards the trained vector with `dose` times the trained weight."""
    module = f.learned_blend
    weight = min(1.0, dose * float(module.logit.detach().sigmoid()))
    return blended(module.vector().detach(), weight, f.gate)


def random_latents(f: Fitted, dose: float) -> Edit:
    """Set random latents, as frequent on all text as the selected ones; the seed is the rotation."""
    generator = torch.Generator().manual_seed(f.select)
    frequency, taken = f.activities.retain.frequency, list[int]()
    for latent in f.latents("crisp", LATENTS):
        distance = (frequency - frequency[latent]).abs()
        distance[[latent, *taken]] = inf
        near = distance.argsort()[:50]
        taken.append(int(near[torch.randint(len(near), (1,), generator=generator)]))
    return set_all(f, taken, dose, f.gate)


METHODS: dict[str, Method] = {
    "farrell": Method(clamp_active, 0.02, 1.0, "clamp when active"),
    "conditional-clamp": Method(conditional, 0.02, 1.0, "clamp above a level"),
    "saeuron": Method(saeuron, 0.1, 50.0, "scale by the negative mean, above the background"),
    "dsg": Method(lambda f, v: dsg(f, "dsg", v), 0.02, 1.0, "as released: share of the text, all latents set"),
    "dsg-mean-square": Method(lambda f, v: dsg(f, "dsg-mean-square", v), 0.02, 1.0, "with the true mean square"),
    "null-space": Method(null_space, 0.1, 10.0, "AlphaSteer in closed form, no gate"),
    "zero": Method(
        lambda f, _: set_all(f, f.latents("crisp", LATENTS), 0.0, f.gate), 1.0, 1.0, "latents set to 0, gated"
    ),
    "set-crisp": Method(
        lambda f, v: set_all(f, f.latents("crisp", LATENTS), v, f.gate), 0.01, 0.5, "latents set, gated"
    ),
    "set-chi-square": Method(
        lambda f, v: set_all(f, f.latents("chi-square", LATENTS), v, f.gate), 0.01, 0.5, "latents set, gated"
    ),
    "projection": Method(projection, 0.5, 20.0, "component along the difference of means, gated"),
    "rotation": Method(lambda f, v: push(f, v, restore=True), 0.05, 3.0, "push and keep the norm, gated"),
    "learned-blend": Method(learned_blend, 0.25, 4.0, "blend towards a trained vector, gated"),
    "learned-rows": Method(lambda f, v: learned_rows(f, v, f.gate), 0.5, 6.0, "trained rows, gated"),
    "learned-rows-ungated": Method(lambda f, v: learned_rows(f, v, always), 0.5, 6.0, "trained rows, no gate"),
}
CONTROLS: dict[str, Method] = {
    "random-latents": Method(random_latents, 0.01, 0.5, "latents of equal frequency, set, gated"),
    "gated-blend": Method(
        lambda f, v: blended(f.retain.mean(0), v, f.gate), 0.05, 1.0, "blend towards the mean, gated, no SAE"
    ),
    "gated-blank": Method(
        lambda f, _: blended(f.retain.mean(0), 1.0, f.gate), 1.0, 1.0, "replaced by the mean, gated, no SAE"
    ),
    "difference-of-means": Method(lambda f, v: push(f, v, restore=False), 0.05, 3.0, "push, gated, no SAE"),
}


def always_open(edit: Edit) -> Edit:
    """Return an edit without its gate."""
    return replace(edit, gate=always) if isinstance(edit, Steering) else edit
