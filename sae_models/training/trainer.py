"""Training step of one SAE on one batch. To train several SAEs on one stream, step each on every batch."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rudder.sae_models.activations import norms
from rudder.sae_models.architectures.architecture import Architecture, State
from rudder.sae_models.architectures.schedule import trapezoid
from rudder.sae_models.sae import SAE


@dataclass(frozen=True)
class Config:
    """tokens: of the run, with repetition. warm_up and decay: fractions of the run. dead_after: a latent is dead if it
    has not fired for more than this many tokens (arXiv 2406.04093: 10 million).
    """

    tokens: int
    warm_up: float = 0.02
    decay: float = 0.2
    dead_after: int = 10_000_000


class Metrics(NamedTuple):
    """Metrics of one step: loss and its terms, FVU, mean number of active latents per token (L0), share of dead
    latents, learning rate, and the share of tokens on which each latent of this rank's shard is active [F].
    """

    loss: Tensor
    parts: dict[str, Tensor]
    fvu: Tensor
    l0: Tensor
    dead: Tensor
    learning_rate: float
    frequency: Tensor


class Trainer:
    """An architecture, its optimiser and their progress. Training is deterministic given the initial architecture."""

    def __init__(self, architecture: Architecture, config: Config) -> None:
        """Create the optimiser. If the architecture's mesh has several parts of the batch, each rank steps on its own
        part.
        """
        self.architecture, self.config = architecture, config
        settings = architecture.config
        self.optimiser = torch.optim.Adam(
            architecture.parameters(), settings.rate, (settings.beta1, settings.beta2), settings.epsilon, fused=True
        )
        self.tokens_since_fired = torch.zeros(len(architecture.bias), device=architecture.bias.device)
        self.scale = 1.0
        self.tokens = self.steps = 0

    def initialise(self, sample: Tensor, target: Tensor | None = None) -> None:
        """Set scale, offset and variance from raw inputs [n, d] or [n, L, d]; `target`: outputs of a transcoder, or
        complexities.
        """
        # The median, not the mean square, which a few attention sinks would decide.
        self.scale = sample.shape[-1] ** 0.5 / float(norms.median_norm(sample))
        self.architecture.initialise(sample * self.scale, target)

    def step(self, x: Tensor, target: Tensor | None = None) -> Metrics:
        """Take one step on raw inputs [n, d] or [n, L, d]; x is not modified."""
        # Progress at the middle of the step, so that neither the first nor the last step has a learning rate of 0.
        progress = (self.tokens + len(x) * self.architecture.mesh.batch_parts / 2) / self.config.tokens
        state = State(self.steps, progress, self.tokens_since_fired > self.config.dead_after)
        loss = self.architecture.loss(x * self.scale, state, target)
        self.optimiser.zero_grad(set_to_none=True)
        loss.total.backward()
        rate = self._update(progress)
        frequency = self._count_firings(loss.active.sum_over_tokens((loss.values > 0).float()), len(x))
        l0 = self.architecture.mesh.latent_all_reduce_sum(frequency.sum())
        dead = self.architecture.mesh.latent_all_reduce_sum(state.dead.sum()) / self.architecture.config.latents
        return Metrics(loss.total.detach(), loss.parts, loss.fvu, l0, dead, rate, frequency)

    def _update(self, progress: float) -> float:
        settings = self.architecture.config
        parameters = [p for p in self.architecture.parameters() if p.grad is not None]
        self.architecture.mesh.batch_all_reduce_mean_([p.grad for p in parameters if p.grad is not None])
        if settings.gradient_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, settings.gradient_norm, gradient_norm(self.architecture))
        rate = settings.rate * trapezoid(progress, self.config.warm_up, self.config.decay)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.architecture.constrain()
        return rate

    def _count_firings(self, fired: Tensor, tokens: int) -> Tensor:
        """Return the share of tokens on which each latent fired, from the number of these tokens [F]; update the token
        count and tokens_since_fired.
        """
        mesh = self.architecture.mesh
        mesh.batch_all_reduce_mean_([fired])
        self.tokens_since_fired += tokens * mesh.batch_parts
        self.tokens_since_fired[fired > 0] = 0
        self.tokens += tokens * mesh.batch_parts
        self.steps += 1
        return fired / tokens

    def canonical(self, sample: Tensor) -> SAE:
        """Return the inference form; raw inputs [n, d] set data-dependent thresholds."""
        return self.architecture.canonical(self.scale, sample * self.scale)

    def state_dict(self) -> dict[str, Any]:
        """Return everything needed to resume exactly, as tensors and numbers only."""
        return {
            "architecture": self.architecture.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "tokens_since_fired": self.tokens_since_fired,
            "scale": self.scale,
            "tokens": self.tokens,
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict` of a trainer whose architecture has the same config."""
        self.architecture.load_state_dict(state["architecture"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.tokens_since_fired.copy_(state["tokens_since_fired"])
        self.scale, self.tokens, self.steps = state["scale"], state["tokens"], state["steps"]


def gradient_norm(architecture: Architecture) -> Tensor:
    """Return the norm of the gradient over all latents, of which this rank may hold a shard."""
    squares = {n: p.grad.square().sum() for n, p in architecture.named_parameters() if p.grad is not None}
    latents_square = torch.stack(
        [square for name, square in squares.items() if name not in architecture.REPLICATED]
    ).sum()
    replicated_square = sum(square for name, square in squares.items() if name in architecture.REPLICATED)
    return (architecture.mesh.latent_all_reduce_sum(latents_square) + replicated_square).sqrt()
