"""JumpReLU (arXiv 2407.14435): a threshold per latent, learned with straight-through estimators."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rudder.sae_models.architectures.architecture import Architecture, Common, Loss, State
from rudder.sae_models.architectures.penalty import latent_quantiles
from rudder.sae_models.architectures.schedule import ramp
from rudder.sae_models.sae import SAE
from rudder.sae_models.sparse import operations as sparse


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """bandwidth: of the estimator; the paper's 0.001 for inputs of unit norm is about 0.03 for norm sqrt(768).
    sparsity: weight of (L0 / k - 1)^2, the paper's penalty towards a target L0; it ramps up over a fraction warm_up of
    the run.
    aim: step of all log thresholds towards L0 = k, per unit of L0 / k - 1 (0: as published); it makes the final L0
    independent of the learning rate (our own).
    threshold: initial thresholds; None: such that start * k latents per token are active, each equally often (our own).
    """

    bandwidth: float = 0.03
    sparsity: float = 1.0
    warm_up: float = 0.05
    aim: float = 0.02
    threshold: float | None = None
    start: float = 4.0
    learning_rate: float | None = 7e-5
    epsilon: float = 1e-8


class JumpReLU(Architecture):
    """f = z where z > exp(log_threshold)."""

    config_type = Config
    config: Config

    def __init__(self, d: int, config: Common, generator: torch.Generator) -> None:
        super().__init__(d, config, generator)
        self.log_threshold = nn.Parameter(torch.zeros(config.latents))
        self.threshold_step = torch.zeros(())

    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor | None = None) -> None:
        """Initialise as every architecture, then set the thresholds."""
        super().initialise(sample, target)
        share = self.config.start * self.config.k / self.config.latents
        fixed = self.config.threshold
        threshold = latent_quantiles(self, sample, share) if fixed is None else torch.full_like(self.bias, fixed)
        self.log_threshold.copy_(threshold.clamp(min=self.config.bandwidth).log())

    def loss(self, x: Tensor, state: State, target: Tensor | None = None) -> Loss:
        """Return FVU of x [n, d], L0 penalty and AuxK loss."""
        del target
        centred, threshold = x - self.centre, self.log_threshold.exp()
        # Pairs just below their threshold are inactive but lie in the kernel, so they have gradients.
        z, active = sparse.active_preactivations(centred, self.weights, threshold - self.config.bandwidth / 2)
        f, gate = jump(z, active.expand(threshold), self.config.bandwidth)
        l0 = self.mesh.batch_all_reduce_mean(self.mesh.latent_all_reduce_sum(gate.sum() / len(x)))
        excess, ramped = l0 / self.config.k - 1, ramp(state.progress, self.config.warm_up)
        self.threshold_step = ramped * self.config.aim * excess.detach().clamp(-1, 1)
        penalty = ramped * self.config.sparsity * excess.square()
        return self.reconstruction_loss(centred, x, f, active, state, l0=penalty)

    @torch.no_grad()
    def constrain(self) -> None:
        """Normalise decoder vectors and move the thresholds towards L0 = k."""
        super().constrain()
        self.log_threshold.add_(self.threshold_step)

    @torch.no_grad()
    def canonical(self, scale: float, sample: Tensor) -> SAE:
        """Return the equivalent SAE."""
        del sample
        return self.fold(scale, self.log_threshold.exp())


class _Jump(torch.autograd.Function):
    """z above the threshold, and the gate z > threshold. Gradients of the threshold are estimated with a rectangular
    kernel of width `bandwidth` (arXiv 2407.14435): -threshold / bandwidth for the value, -1 / bandwidth
    for the gate.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        gate = (z > threshold).to(z.dtype)
        return z * gate, gate

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor, grad_gate: Tensor) -> Any:
        z, threshold = ctx.saved_tensors
        near = (z - threshold).abs() < ctx.bandwidth / 2
        grad_threshold = near * (threshold * grad_value + grad_gate) / -ctx.bandwidth
        return grad_value * (z > threshold), grad_threshold.sum_to_size(threshold.shape), None


def jump(z: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """Return activations and gates (0 or 1) of pre-activations z, for thresholds of the same or a
    broadcastable shape.
    """
    f, gate = _Jump.apply(z, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return f, gate
