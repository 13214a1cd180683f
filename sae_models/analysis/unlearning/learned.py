"""Rows that are trained through the frozen model to make it as ignorant as its twin, and rows in closed form.

Trained rows minimise KL(model behind the rows || twin) on text of the topic and KL(model behind the rows || plain
model) on all other text, with the gate open everywhere: so they cost little also where a gate opens by mistake.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, normalize

from rudder.sae_models.analysis.unlearning.gate import texts_of
from rudder.sae_models.analysis.unlearning.material import Material
from rudder.sae_models.analysis.unlearning.rig import Texts, head
from rudder.sae_models.sae import Rows

RATE = 0.02
# Texts of the topic, of the neighbours and of the far books in a step: windows, cut to LENGTH, and as many definitions.
BATCH = (4, 1, 1)
LENGTH = 128
# Weight of the divergence on all other text: rows act where a gate is open, which is on the topic for the most part.
KEEP = 0.3
POSITIONS = 64


@dataclass(frozen=True)
class Lesson:
    """Texts with the last hidden states [n, length, d] of the model to be like."""

    texts: Texts
    hidden: Tensor
    model: Any
    weight: float


class LearnedRows(nn.Module):
    """displacement = relu((x - mean) / scale . encoder + bias) . decoder * scale; encoder [R, d], decoder [R, d]."""

    def __init__(self, encoder: Tensor, mean: Tensor, scale: float) -> None:
        super().__init__()
        self.encoder = nn.Parameter(encoder)
        self.bias = nn.Parameter(torch.zeros(len(encoder)))
        # At zero: training begins with the model as it is.
        self.decoder = nn.Parameter(torch.zeros_like(encoder))
        self.mean = mean
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Return the displacement of x [..., d]."""
        z = (x - self.mean) @ self.encoder.T / self.scale + self.bias
        return z.relu() @ self.decoder * self.scale

    def rows(self) -> Rows:
        """Return the same rows as a bank holds them, with unit decoders."""
        norm = self.decoder.detach().norm(dim=1).clamp_min(1e-6) * self.scale
        encoder = self.encoder.detach() / self.scale * norm[:, None]
        bias = self.bias.detach() * norm - encoder @ self.mean
        return Rows(encoder, bias, torch.zeros(len(bias)), normalize(self.decoder.detach(), dim=1))


class LearnedBlend(nn.Module):
    """displacement = weight * (target - x)."""

    def __init__(self, mean: Tensor, weight: float = 0.2) -> None:
        super().__init__()
        self.target = nn.Parameter(torch.zeros_like(mean))
        self.logit = nn.Parameter(torch.tensor(weight).logit())
        self.mean = mean
        self.scale = float(mean.norm())

    def forward(self, x: Tensor) -> Tensor:
        """Return the displacement of x [..., d]."""
        return self.logit.sigmoid() * (self.vector() - x)

    def vector(self) -> Tensor:
        """Return the target [d]."""
        return self.mean + self.target * self.scale


def fit(material: Material, folds: Collection[int], module: nn.Module, steps: int, seed: int = 0) -> list[float]:
    """Train a module in place, and return its loss at each step. The models stay as they are."""
    rig, generator = material.rig, torch.Generator().manual_seed(seed)
    groups = [lessons(material, folds, books, twin) for books, twin in _curriculum(material)]
    optimiser = torch.optim.Adam(module.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for parameter in rig.upper.parameters():
        parameter.requires_grad_(False)
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        total = 0.0
        for group, count in zip(groups, BATCH, strict=True):
            for lesson in group:
                loss = lesson.weight * divergence(rig.upper, module, lesson, count, generator)
                loss.backward()
                total += float(loss.detach())
        optimiser.step()
        schedule.step()
        losses.append(total)
    return losses


def _curriculum(material: Material) -> list[tuple[Sequence[str], bool]]:
    topic = material.split.topic
    return [(topic.books, True), (topic.neighbours, False), (material.split.far, False)]


@torch.no_grad()
def lessons(material: Material, folds: Collection[int], books: Collection[str], twin: bool) -> list[Lesson]:
    """Return what to be like on windows and on definitions of some books: the twin, or the model itself."""
    model = material.rig.twin if twin else material.rig.model
    taught = []
    for texts in texts_of(material, folds, books):
        if len(texts):
            hidden = [
                model.base_model(part, use_cache=False).last_hidden_state for part in texts.windows.tokens.split(16)
            ]
            taught.append(Lesson(texts, torch.cat(hidden), model, (1.0 if twin else KEEP) / 2))
    return taught


def divergence(upper: Any, module: nn.Module, lesson: Lesson, count: int, generator: torch.Generator) -> Tensor:
    """Return KL(student || teacher) in nats a token, on POSITIONS random positions of `count` random texts each."""
    index = torch.randint(len(lesson.texts), (count,), generator=generator)
    part = lesson.texts.context(index, LENGTH)
    x = part.x + module(part.x) * part.counted[..., None]
    hidden = upper.base_model(inputs_embeds=x, use_cache=False).last_hidden_state
    position = part.counted.nonzero()
    chosen = position[torch.randperm(len(position), generator=generator)[: POSITIONS * count]]
    row, column = chosen.unbind(1)
    student = head(upper, hidden[row, column]).log_softmax(-1)
    with torch.no_grad():
        teacher = head(lesson.model, lesson.hidden[index][row, column]).log_softmax(-1)
    return kl_div(teacher, student, reduction="batchmean", log_target=True)


def initial_encoder(latents: Tensor, direction: Tensor, count: int, seed: int) -> Tensor:
    """Return encoders [count, d] of unit norm: of latents [n, d] for one half, around a detector's direction [d] for
    the other.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = normalize(torch.randn(count, latents.shape[1], generator=generator), dim=1)
    around = normalize(normalize(direction, dim=0) + noise, dim=1)
    own = normalize(latents[: count // 2], dim=1)
    return torch.cat([own, around[: count - len(own)]])


def null_space_rows(benign: Tensor, topic: Tensor, target: Tensor, rank: int, share: float = 0.5) -> Rows:
    """Return linear rows that move the topic's residuals [n, d] by about `target` [n, d] and benign ones [m, d] little.

    The encoders lie in the span of the `share` of eigenvectors of the benign covariance with the least variance
    (AlphaSteer, arXiv 2506.07022): D = R H^T P (P H H^T P + a P)^+, and of D P the `rank` largest singular vectors.
    Decoders have unit norm. Benign displacement is zero where benign residuals do not leave the others' span.
    """
    mean = benign.mean(0)
    values, vectors = torch.linalg.eigh((benign - mean).T @ (benign - mean) / len(benign))
    basis = vectors[:, : int(share * len(values))]
    h = (topic - mean) @ basis
    gram = h.T @ h
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram))
    linear = torch.linalg.solve(gram + ridge, h.T @ target).T @ basis.T
    u, s, v = torch.linalg.svd(linear)
    encoder = s[:rank, None] * v[:rank]
    return Rows(encoder, -encoder @ mean, torch.full((rank,), -torch.inf), u[:, :rank].T)
