"""JumpReLU (arXiv 2407.14435): a threshold for each latent, learned through straight-through estimates."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rudder.sae_models.architectures.architecture import Architecture, Common, Loss, State
from rudder.sae_models.architectures.penalty import quantiles
from rudder.sae_models.architectures.schedule import ramp
from rudder.sae_models.sae import SAE
from rudder.sae_models.sparse import operations as sparse


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """bandwidth of the estimates: the paper's 0.001 for inputs of unit norm is about 0.03 for norm sqrt(768).
    sparsity: weight of (L0 / k - 1)^2, the paper's penalty for a wanted L0; it rises over a share warm_up of the run.
    aim: by how much the logarithm of all thresholds follows L0 / k - 1 at each step (0: as published): where L0 ends
    does not then depend on the learning rate (our own).
    threshold: where thresholds begin; None: so that start * k latents a token are active, each equally often (our own).
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
        self.rise = torch.zeros(())

    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor | None = None) -> None:
        """As every architecture; and the thresholds."""
        super().initialise(sample, target)
        share = self.config.start * self.config.k / self.config.latents
        given = self.config.threshold
        threshold = quantiles(self, sample, share) if given is None else torch.full_like(self.bias, given)
        self.log_threshold.copy_(threshold.clamp(min=self.config.bandwidth).log())

    def loss(self, x: Tensor, state: State, target: Tensor | None = None) -> Loss:
        """FVU of x [n, d], L0 penalty, auxiliary loss."""
        del target
        centred, threshold = x - self.centre, self.log_threshold.exp()
        z, active = sparse.positives(centred, self.weights, threshold - self.config.bandwidth / 2)
        f, gate = jump(z, active.of_latents(threshold), self.config.bandwidth)
        l0 = self.mesh.mean(self.mesh.total(gate.sum() / len(x)))
        excess, risen = l0 / self.config.k - 1, ramp(state.progress, self.config.warm_up)
        self.rise = risen * self.config.aim * excess.detach().clamp(-1, 1)
        return self.loss_of(centred, x, f, active, state, l0=risen * self.config.sparsity * excess.square())

    @torch.no_grad()
    def constrain(self) -> None:
        """Unit decoder rows, and thresholds towards L0 = k."""
        super().constrain()
        self.log_threshold.add_(self.rise)

    @torch.no_grad()
    def canonical(self, scale: float, sample: Tensor) -> SAE:
        """Exact."""
        del sample
        return self.folded(scale, self.log_threshold.exp())


class _Jump(torch.autograd.Function):
    """z above a threshold, and whether it is. The threshold's gradients are estimated by a rectangle of a bandwidth
    around it: -threshold / bandwidth of the value's, -1 / bandwidth of the gate's.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        gate = (z > threshold).to(z.dtype)
        return z * gate, gate

    @staticmethod
    def backward(ctx: Any, of_value: Tensor, of_gate: Tensor) -> Any:
        z, threshold = ctx.saved_tensors
        near = (z - threshold).abs() < ctx.bandwidth / 2
        of_threshold = near * (threshold * of_value + of_gate) / -ctx.bandwidth
        return of_value * (z > threshold), of_threshold.sum_to_size(threshold.shape), None


def jump(z: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """Activations and gates, 0 or 1, of pre-activations z; thresholds of the same or a broadcast shape."""
    f, gate = _Jump.apply(z, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return f, gate
