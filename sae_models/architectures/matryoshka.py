"""Matryoshka BatchTopK (arXiv 2503.17547): every prefix of the dictionary reconstructs the input by itself."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from rudder.sae_models.architectures.architecture import Common, Loss, State
from rudder.sae_models.architectures.batch_topk import BatchTopK
from rudder.sae_models.errors import UserError
from rudder.sae_models.sparse.operations import Pairs


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """shares: fraction of the latents that each prefix adds to the previous one; the loss is the mean over prefixes."""

    shares: tuple[float, ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)


class Matryoshka(BatchTopK):
    """BatchTopK over the whole dictionary, decoded prefix by prefix."""

    config_type = Config
    config: Config
    REPLICATED = BatchTopK.REPLICATED | {"ends"}
    ends: Tensor

    def __init__(self, d: int, config: Common, generator: torch.Generator) -> None:
        super().__init__(d, config, generator)
        shares = list(accumulate(self.config.shares))
        if abs(shares[-1] - 1) > 1e-6 or min(self.config.shares) <= 0:
            raise UserError(f"shares: {self.config.shares} do not add up to 1, each above 0")
        self.register_buffer("ends", torch.tensor([round(share * config.latents) for share in shares]))

    def loss(self, x: Tensor, state: State, target: Tensor | None = None) -> Loss:
        """Return the mean FVU of x [n, d] over prefixes, and the AuxK loss of the whole dictionary."""
        del target
        centred = x - self.centre
        z, active = self.read(centred)
        assert isinstance(active, Pairs)
        error = x[:, None] - self.prefixes(z, active)
        fvu = error.square().sum(2).mean(0) / self.variance
        full_error = error[:, -1]
        auxiliary = self.config.auxiliary_weight * self.auxiliary(centred, full_error, state.dead)
        parts = {f"fvu_{end}": part for end, part in zip(self.ends.tolist(), fvu.detach(), strict=True)}
        loss, parts["auxiliary"] = fvu.mean() + auxiliary, auxiliary.detach()
        if self.config.density_weight:
            density = self.config.density_weight * self.density(z, active)
            loss, parts["density"] = loss + density, density.detach()
        return Loss(loss, parts, fvu[-1].detach(), z.detach(), active)

    def prefixes(self, z: Tensor, active: Pairs) -> Tensor:
        """Return the reconstructions [n, prefixes, d] from each prefix of the latents."""
        groups = len(self.ends)
        latent = active.latent + self.mesh.latent_part * active.latents
        # One bag per (token, group of latents); a cumulative sum over groups then gives all prefixes with one decode.
        bag = active.token * groups + torch.bucketize(latent, self.ends, right=True)
        order = bag.argsort(stable=True)
        pairs = Pairs(bag[order], active.latent[order], active.tokens * groups, active.latents)
        parts = pairs.decode(z[order], self.decoder, self.unit).view(active.tokens, groups, -1)
        return self.mesh.latent_all_reduce_sum(parts.cumsum(1)) + self.decoder_bias
