"""The inner loop: one step of one SAE on one batch. Several SAEs are trained on one stream by stepping each on it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rudder.sae_models.architectures.architecture import Architecture, State
from rudder.sae_models.architectures.schedule import trapezoid
from rudder.sae_models.sae import SAE


@dataclass(frozen=True)
class Config:
    """tokens: those of the run, with repetition; warm_up and decay: shares of the run; a latent is dead that has not
    fired in dead_after tokens (arXiv 2406.04093: 10 million).
    """

    tokens: int
    warm_up: float = 0.02
    decay: float = 0.2
    dead_after: int = 10_000_000


class Metrics(NamedTuple):
    """Of one step: loss and its parts, FVU, mean active latents a token, share of dead latents, learning rate."""

    loss: Tensor
    parts: dict[str, Tensor]
    fvu: Tensor
    l0: Tensor
    dead: Tensor
    learning_rate: float


class Trainer:
    """An architecture, its optimiser and how far they are. Nothing here is random after the architecture was made."""

    def __init__(self, architecture: Architecture, config: Config) -> None:
        """Where the architecture's mesh has several parts of the batch, each rank steps on its own."""
        self.architecture, self.config = architecture, config
        settings = architecture.config
        self.optimiser = torch.optim.Adam(
            architecture.parameters(), settings.rate, (settings.beta1, settings.beta2), settings.epsilon, fused=True
        )
        self.silent = torch.zeros(len(architecture.bias), device=architecture.bias.device)
        self.scale = 1.0
        self.tokens = self.steps = 0

    def initialise(self, sample: Tensor, target: Tensor | None = None) -> None:
        """Takes scale, offset and variance from raw inputs [n, d] or [n, L, d] (and a transcoder's outputs)."""
        self.scale = float((sample.shape[-1] / sample.square().sum(-1).mean()).sqrt())
        self.architecture.initialise(sample * self.scale, target)

    def step(self, x: Tensor, target: Tensor | None = None) -> Metrics:
        """One step on raw inputs [n, d] (or [n, L, d]); x is left as it is."""
        # Of the step's middle: neither the first step nor the last is one of rate 0.
        progress = (self.tokens + len(x) * self.architecture.mesh.batch_parts / 2) / self.config.tokens
        state = State(self.steps, progress, self.silent > self.config.dead_after)
        loss = self.architecture.loss(x * self.scale, state, target)
        self.optimiser.zero_grad(set_to_none=True)
        loss.total.backward()
        rate = self._update(progress)
        count = self._count(loss.active.totals((loss.values > 0).float()), len(x))
        dead = self.architecture.mesh.total(state.dead.sum()) / self.architecture.config.latents
        return Metrics(loss.total.detach(), loss.parts, loss.fvu, count, dead, rate)

    def _update(self, progress: float) -> float:
        settings = self.architecture.config
        parameters = [p for p in self.architecture.parameters() if p.grad is not None]
        self.architecture.mesh.average([p.grad for p in parameters if p.grad is not None])
        if settings.gradient_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, settings.gradient_norm, gradient_norm(self.architecture))
        rate = settings.rate * trapezoid(progress, self.config.warm_up, self.config.decay)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.architecture.constrain()
        return rate

    def _count(self, fired: Tensor, tokens: int) -> Tensor:
        """L0 of how often each latent fired [F]; counts the tokens, and for how long each latent has been silent."""
        mesh = self.architecture.mesh
        mesh.average([fired])
        self.silent += tokens * mesh.batch_parts
        self.silent[fired > 0] = 0
        self.tokens += tokens * mesh.batch_parts
        self.steps += 1
        return mesh.total(fired.sum() / tokens)

    def canonical(self, sample: Tensor) -> SAE:
        """The inference form; raw inputs [n, d] set what it does by threshold."""
        return self.architecture.canonical(self.scale, sample * self.scale)

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to go on exactly; tensors and numbers alone."""
        return {
            "architecture": self.architecture.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "silent": self.silent,
            "scale": self.scale,
            "tokens": self.tokens,
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken; of an architecture made with the same config."""
        self.architecture.load_state_dict(state["architecture"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.silent.copy_(state["silent"])
        self.scale, self.tokens, self.steps = state["scale"], state["tokens"], state["steps"]


def gradient_norm(architecture: Architecture) -> Tensor:
    """Of the gradient of all latents, of which this rank may hold a part."""
    squares = {n: p.grad.square().sum() for n, p in architecture.named_parameters() if p.grad is not None}
    of_latents = torch.stack([square for name, square in squares.items() if name not in architecture.SHARED]).sum()
    of_all = sum(square for name, square in squares.items() if name in architecture.SHARED)
    return (architecture.mesh.total(of_latents) + of_all).sqrt()
