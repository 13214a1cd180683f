"""BatchTopK (arXiv 2412.06410): of a batch, the k * n largest activations survive; a token has k on average."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sae_models.architectures.architecture import Architecture, Common, Loss, State
from sae_models.sae import SAE
from sae_models.training import sparse
from sae_models.training.sparse import Read

# Candidates are sought above this share of the last batch's cut, and where they are too few, among ROOM * k a token.
MARGIN = 0.9
ROOM = 4
# Of the sample that the threshold is estimated on.
BATCH = 2048


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """As TopK's, which the paper takes over."""


class BatchTopK(Architecture):
    """Trained with a cut for each batch; at inference its mean is the threshold."""

    config_type: ClassVar[type[Common]] = Config
    SHARED: ClassVar[frozenset[str]] = Architecture.SHARED | {"cut"}
    cut: Tensor

    def __init__(self, d: int, config: Common, generator: torch.Generator) -> None:
        super().__init__(d, config, generator)
        self.register_buffer("cut", torch.zeros(()))

    def loss(self, x: Tensor, state: State, target: Tensor | None = None) -> Loss:
        """FVU of x [n, d] and the auxiliary loss."""
        del target
        centred = x - self.centre
        read = self.read(centred)
        return self.loss_of(centred, x, read.z, read.active, state)

    def read(self, centred: Tensor) -> Read:
        """The k * n largest of the batch; `cut` becomes the least of them."""
        read = self.candidates(centred)
        assert isinstance(read.active, sparse.Pairs)
        self.cut.copy_(batch_cut(self.everywhere(read.z.detach(), len(centred)), self.config.k * len(centred)))
        kept = read.z.detach() > self.cut
        return Read(read.z[kept], read.active.where(kept))

    def candidates(self, centred: Tensor) -> Read:
        """Pairs that hold the k * n largest."""
        if float(self.cut) > 0:
            found = sparse.above(centred, self.weights, MARGIN * self.cut)
            if found is not None and self.shards.total(torch.tensor(len(found.z))) > self.config.k * len(centred):
                return found
        return sparse.strongest(centred, self.weights, min(ROOM * self.config.k, len(self.bias)))

    def everywhere(self, z: Tensor, tokens: int) -> Tensor:
        """The k * n largest and one more of this shard's z [m], and those of all others."""
        most = self.config.k * tokens + 1
        largest = z.topk(min(most, len(z)), sorted=False).values
        mine = functional.pad(largest, (0, most - len(largest)))
        return self.shards.gather(mine[None]).flatten()

    @torch.no_grad()
    def canonical(self, scale: float, sample: Tensor) -> SAE:
        """With the mean cut of batches of the sample [n, d] as threshold."""
        cuts = []
        for part in sample.split(BATCH):
            self.read(part - self.centre)
            cuts.append(self.cut.clone())
        return self.folded(scale, torch.stack(cuts).mean())


def batch_cut(z: Tensor, most: int) -> Tensor:
    """A value [], at least 0, above which the `most` largest of z [m] are: midway to the next."""
    if len(z) <= most:
        return z.new_zeros(())
    largest = z.topk(most + 1, sorted=False).values
    dropped = largest.amin()
    kept = torch.where(largest > dropped, largest, torch.inf).amin()
    return ((dropped + torch.where(kept.isinf(), dropped, kept)) / 2).clamp(min=0.0)
