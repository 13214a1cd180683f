"""ReLU with an L1 penalty (Bricken et al. 2023; constants from Anthropic's update of April 2024)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rudder.sae_models.architectures import penalty
from rudder.sae_models.architectures.architecture import Loss, State
from rudder.sae_models.architectures.penalty import Penalised
from rudder.sae_models.sae import SAE
from rudder.sae_models.sparse import operations as sparse


@dataclass(frozen=True, kw_only=True)
class Config(penalty.Config):
    """l1: weight of the sum of a token's activations, for inputs of mean squared norm d."""

    l1: float = 5.0
    learning_rate: float | None = 5e-5
    beta1: float = 0.9
    gradient_norm: float | None = 1.0


class ReLU(Penalised):
    """f = relu(z)."""

    config_type = Config
    config: Config

    def loss(self, x: Tensor, state: State, target: Tensor | None = None) -> Loss:
        """Return FVU of x [n, d], L1 penalty and AuxK loss."""
        del target
        centred = x - self.centre
        z, active = sparse.active_preactivations(centred, self.weights)
        f = z.relu()
        weight = self.config.l1 * self.update_penalty(f, len(x), state)
        l1 = weight * self.mesh.latent_all_reduce_sum(f.sum()) / (len(x) * self.variance)
        return self.reconstruction_loss(centred, x, f, active, state, l1=l1)

    def canonical(self, scale: float, sample: Tensor) -> SAE:
        """Return the equivalent SAE."""
        del sample
        return self.fold(scale, torch.zeros(()))
