"""TopK (arXiv 2406.04093): of each token the k largest pre-activations survive."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sae_models import sae
from sae_models.architectures.architecture import Architecture, Common, Loss, State
from sae_models.sae import SAE
from sae_models.training import sparse
from sae_models.training.sparse import Read


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """As published."""


class TopK(Architecture):
    """Exactly k latents a token, all of one z = encoder . x + bias."""

    config_type: ClassVar[type[Common]] = Config

    def loss(self, x: Tensor, state: State, target: Tensor | None = None) -> Loss:
        """FVU of x [n, d] and the auxiliary loss."""
        del target
        centred = x - self.centre
        read = self.read(centred)
        return self.loss_of(centred, x, read.z.relu(), read.active, state)

    def read(self, centred: Tensor) -> Read:
        """The k largest of each token, over all shards."""
        return among_all(sparse.strongest(centred, self.weights, self.config.k), self.config.k, self)

    def canonical(self, scale: float, sample: Tensor) -> SAE:
        """With the selection TopK."""
        del sample
        return self.folded(scale, torch.zeros(()), selection=sae.TopK(self.config.k))


def among_all(read: Read, k: int, module: Architecture) -> Read:
    """Of each shard's k strongest a token, those that are among the k strongest of all shards."""
    mine = read.z.detach().view(-1, k)
    everyone = module.shards.gather(mine)
    if everyone is mine:
        return read
    kept = (mine >= everyone.topk(k, dim=1).values[:, -1:]).flatten()
    assert isinstance(read.active, sparse.Pairs)
    return Read(read.z[kept], read.active.where(kept))
