"""Gated SAE (arXiv 2404.16014): separate paths, with tied weights, for whether a latent is active and for its
magnitude.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rudder.sae_models.architectures import penalty
from rudder.sae_models.architectures.architecture import Common, Loss, State
from rudder.sae_models.architectures.penalty import Penalised
from rudder.sae_models.sae import SAE
from rudder.sae_models.sparse import operations as sparse
from rudder.sae_models.sparse.operations import Active


@dataclass(frozen=True, kw_only=True)
class Config(penalty.Config):
    """l1: weight of the sum of positive gate pre-activations of a token."""

    l1: float = 2.0
    learning_rate: float | None = 5e-5


class Gated(Penalised):
    """u = encoder . x; pi = u + bias; f = relu(exp(log_gain) * u + magnitude_bias) where pi > 0."""

    config_type = Config
    config: Config

    def __init__(self, d: int, config: Common, generator: torch.Generator) -> None:
        super().__init__(d, config, generator)
        self.log_gain = nn.Parameter(torch.zeros(config.latents))
        self.magnitude_bias = nn.Parameter(torch.zeros(config.latents))

    def loss(self, x: Tensor, state: State, target: Tensor | None = None) -> Loss:
        """Return FVU of x [n, d], L1 of the gates, FVU of a reconstruction from the gates alone, and AuxK loss."""
        del target
        centred = x - self.centre
        pi, active = sparse.active_preactivations(centred, self.weights)
        f, gate = self.gated_activations(pi, active), pi.relu()
        weight = self.config.l1 * self.update_penalty(gate, len(x), state)
        l1 = weight * self.mesh.latent_all_reduce_sum(gate.sum()) / (len(x) * self.variance)
        return self.reconstruction_loss(centred, x, f, active, state, l1=l1, gate=self.gate_fvu(x, gate, active))

    def gated_activations(self, pi: Tensor, active: Active) -> Tensor:
        """Return activations for gate pre-activations at the active pairs."""
        gain, gate_bias, bias = map(active.expand, (self.log_gain.exp(), self.bias, self.magnitude_bias))
        return torch.where(pi > 0, (gain * (pi - gate_bias) + bias).relu(), 0.0)

    def gate_fvu(self, x: Tensor, gate: Tensor, active: Active) -> Tensor:
        """Return the FVU of x [n, d] reconstructed from relu(pi); decoder and decoder_bias get no gradient."""
        frozen = self.mesh.latent_all_reduce_sum(active.decode(gate, self.decoder.detach()))
        return self.fvu_of_error(x - frozen - self.decoder_bias.detach())

    @torch.no_grad()
    def canonical(self, scale: float, sample: Tensor) -> SAE:
        """Return an SAE with JumpReLU on p = gain * u + magnitude_bias: pi > 0 is p > magnitude_bias - gain * bias."""
        del sample
        gain = self.log_gain.exp()
        threshold = (self.magnitude_bias - gain * self.bias).clamp(min=0.0)
        encoder = self.encoder * gain[:, None]
        bias = self.magnitude_bias - encoder @ self.centre
        folded = self.fold(scale, threshold)
        return replace(folded, encoder=encoder, bias=bias / scale)
