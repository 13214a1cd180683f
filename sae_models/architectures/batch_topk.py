"""BatchTopK (arXiv 2412.06410): keep the k * n largest activations of a batch of n tokens, k per token on average."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rudder.sae_models.architectures import topk
from rudder.sae_models.architectures.architecture import Architecture, Common, Loss, State
from rudder.sae_models.sae import SAE
from rudder.sae_models.sparse import operations as sparse
from rudder.sae_models.sparse.collectives import SINGLE_PROCESS, Mesh
from rudder.sae_models.sparse.operations import Preactivations

# Candidates are the pairs above this fraction of the last batch's cut or, if those are too few, ROOM * k per token.
MARGIN = 0.9
ROOM = 4
# A positive float32 has 31 significant bits.
DIGIT_BITS, DIGITS = 11, 3
VALUES = 1 << DIGIT_BITS
# Tokens per batch of the sample that the inference threshold is estimated on.
BATCH = 2048


@dataclass(frozen=True, kw_only=True)
class Config(topk.Config):
    """The defaults of TopK, as in the paper."""


class BatchTopK(Architecture):
    """Trained with a threshold per batch, `cut`; at inference the threshold is the mean of these."""

    config_type: ClassVar[type[Common]] = Config
    REPLICATED: ClassVar[frozenset[str]] = Architecture.REPLICATED | {"cut"}
    cut: Tensor

    def __init__(self, d: int, config: Common, generator: torch.Generator) -> None:
        super().__init__(d, config, generator)
        self.register_buffer("cut", torch.zeros(()))

    def loss(self, x: Tensor, state: State, target: Tensor | None = None) -> Loss:
        """Return FVU of x [n, d] and AuxK loss."""
        del target
        centred = x - self.centre
        read = self.read(centred)
        return self.reconstruction_loss(centred, x, read.z, read.active, state)

    def read(self, centred: Tensor) -> Preactivations:
        """Return the k * n largest pre-activations of the batch and store the value that separates them in `cut`."""
        read = self.candidates(centred)
        assert isinstance(read.active, sparse.Pairs)
        self.cut.copy_(batch_threshold(read.z.detach(), self.batch_k(centred), self.mesh))
        return read.where(read.z.detach() > self.cut)

    def batch_k(self, centred: Tensor) -> int:
        """Return how many activations are kept in the whole batch, over all ranks."""
        return self.config.k * len(centred) * self.mesh.batch_parts

    def candidates(self, centred: Tensor) -> Preactivations:
        """Return pairs that include the k * n largest of the batch."""
        if float(self.cut) > 0:
            pairs = sparse.above_floor(centred, self.weights, MARGIN * self.cut)
            # The all-reduce makes all ranks take the same branch: each must take part in the same collectives.
            vote = [len(pairs.z), 0] if pairs else [0, 1]
            count, failed = self.mesh.all_reduce_sum(torch.tensor(vote, device=self.cut.device)).tolist()
            # One more than k * n: the threshold lies between the last kept value and the next.
            if pairs and not failed and count > self.batch_k(centred):
                return pairs
        return self.top_k(centred, min(ROOM * self.config.k, self.config.latents))

    @torch.no_grad()
    def canonical(self, scale: float, sample: Tensor) -> SAE:
        """Return an SAE whose threshold is the mean cut of batches of the sample [n, d]."""
        cuts = []
        for part in sample.split(BATCH):
            self.read(part - self.centre)
            cuts.append(self.cut.clone())
        return self.fold(scale, torch.stack(cuts).mean())


def batch_threshold(z: Tensor, count: int, mesh: Mesh = SINGLE_PROCESS) -> Tensor:
    """Return a threshold [] >= 0 that exactly the `count` largest positive values of all ranks' z [m] exceed: the
    midpoint to the next value.
    """
    below = nth_largest(z, count + 1, mesh)
    above = mesh.all_reduce_min(torch.where(z > below, z, torch.inf).amin() if len(z) else z.new_tensor(torch.inf))
    return torch.where(below == 0, 0.0, (below + torch.where(above.isinf(), below, above)) / 2)


def nth_largest(z: Tensor, n: int, mesh: Mesh) -> Tensor:
    """Return the nth largest value [], counted from 1, of all ranks' z [m]; 0 if fewer are positive.

    Radix select: positive IEEE floats have the order of their bits, so each digit of the result, the highest first,
    follows from a histogram of that digit over all ranks. Ranks exchange DIGITS histograms of VALUES counts, however
    many values they hold.
    """
    bits = z.clamp(min=0).view(torch.int32)
    matches_prefix, remaining = bits > 0, torch.tensor(n, device=z.device)
    result_bits, positives = torch.zeros((), dtype=torch.long, device=z.device), torch.zeros_like(remaining)
    for shift in range(DIGIT_BITS * (DIGITS - 1), -1, -DIGIT_BITS):
        digit = (bits >> shift) & (VALUES - 1)
        count = torch.zeros(VALUES, dtype=torch.long, device=z.device).index_add_(0, digit, matches_prefix.long())
        # Index i: number of values whose digit is at least VALUES - 1 - i.
        at_least = mesh.all_reduce_sum(count).flip(0).cumsum(0)
        position = (at_least < remaining).sum().clamp(max=VALUES - 1)
        positives = torch.maximum(positives, at_least[-1])
        remaining = remaining - torch.where(position > 0, at_least[position - 1], 0)
        matches_prefix &= digit == VALUES - 1 - position
        result_bits = result_bits | (VALUES - 1 - position) << shift
    return torch.where(positives >= n, result_bits.int().view(torch.float32), 0.0)
