"""BatchTopK (arXiv 2412.06410): of a batch, the k * n largest activations survive; a token has k on average."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rudder.sae_models.architectures import topk
from rudder.sae_models.architectures.architecture import Architecture, Common, Loss, State
from rudder.sae_models.sae import SAE
from rudder.sae_models.sparse import operations as sparse
from rudder.sae_models.sparse.collectives import ALONE, Mesh
from rudder.sae_models.sparse.operations import Read

# Candidates are sought above this share of the last batch's cut, and where they are too few, among ROOM * k a token.
MARGIN = 0.9
ROOM = 4
# Positive floats have 31 bits of worth.
DIGIT_BITS, DIGITS = 11, 3
VALUES = 1 << DIGIT_BITS
# Of the sample that the threshold is estimated on.
BATCH = 2048


@dataclass(frozen=True, kw_only=True)
class Config(topk.Config):
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
        self.cut.copy_(batch_cut(read.z.detach(), self.most(centred), self.mesh))
        return read.where(read.z.detach() > self.cut)

    def most(self, centred: Tensor) -> int:
        """How many are kept of the batch, all ranks' parts of it."""
        return self.config.k * len(centred) * self.mesh.batch_parts

    def candidates(self, centred: Tensor) -> Read:
        """Pairs that hold the k * n largest."""
        if float(self.cut) > 0:
            found = sparse.above(centred, self.weights, MARGIN * self.cut)
            # All ranks decide alike, and each takes part in each exchange.
            told = [len(found.z), 0] if found else [0, 1]
            held, missing = self.mesh.sum(torch.tensor(told, device=self.cut.device)).tolist()
            if found and not missing and held > self.most(centred):
                return found
        return self.strongest(centred, min(ROOM * self.config.k, self.config.latents))

    @torch.no_grad()
    def canonical(self, scale: float, sample: Tensor) -> SAE:
        """With the mean cut of batches of the sample [n, d] as threshold."""
        cuts = []
        for part in sample.split(BATCH):
            self.read(part - self.centre)
            cuts.append(self.cut.clone())
        return self.folded(scale, torch.stack(cuts).mean())


def batch_cut(z: Tensor, most: int, mesh: Mesh = ALONE) -> Tensor:
    """A value [], at least 0, above which the `most` largest of all ranks' z [m] are: midway to the next."""
    dropped = nth_largest(z, most + 1, mesh)
    kept = mesh.least(torch.where(z > dropped, z, torch.inf).amin() if len(z) else z.new_tensor(torch.inf))
    return torch.where(dropped == 0, 0.0, (dropped + torch.where(kept.isinf(), dropped, kept)) / 2)


def nth_largest(z: Tensor, n: int, mesh: Mesh) -> Tensor:
    """The nth largest [], counted from 1, of all ranks' z [m]; 0 where fewer are above 0.

    Positive floats are in the order of their bits. These are found a digit at a time, the highest first, by counting
    over all ranks how many values have which: so ranks exchange some thousand counts, however many values they have.
    """
    bits = z.clamp(min=0).view(torch.int32)
    among, left = bits > 0, torch.tensor(n, device=z.device)
    found, most = torch.zeros((), dtype=torch.long, device=z.device), torch.zeros_like(left)
    for shift in range(DIGIT_BITS * (DIGITS - 1), -1, -DIGIT_BITS):
        digit = (bits >> shift) & (VALUES - 1)
        count = torch.zeros(VALUES, dtype=torch.long, device=z.device).index_add_(0, digit, among.long())
        # How many have at least the digit VALUES - 1 - i.
        reached = mesh.sum(count).flip(0).cumsum(0)
        place = (reached < left).sum().clamp(max=VALUES - 1)
        most = torch.maximum(most, reached[-1])
        left = left - torch.where(place > 0, reached[place - 1], 0)
        among &= digit == VALUES - 1 - place
        found = found | (VALUES - 1 - place) << shift
    return torch.where(most >= n, found.int().view(torch.float32), 0.0)
