"""Matryoshka BatchTopK (arXiv 2503.17547): every prefix of the dictionary must reconstruct by itself."""

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
    """shares of the latents that each prefix adds; the loss is the mean over prefixes."""

    shares: tuple[float, ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)


class Matryoshka(BatchTopK):
    """BatchTopK of the whole dictionary, decoded prefix by prefix."""

    config_type = Config
    config: Config
    SHARED = BatchTopK.SHARED | {"ends"}
    ends: Tensor

    def __init__(self, d: int, config: Common, generator: torch.Generator) -> None:
        super().__init__(d, config, generator)
        shares = list(accumulate(self.config.shares))
        if abs(shares[-1] - 1) > 1e-6 or min(self.config.shares) <= 0:
            raise UserError(f"shares: {self.config.shares} do not add up to 1, each above 0")
        self.register_buffer("ends", torch.tensor([round(share * config.latents) for share in shares]))

    def loss(self, x: Tensor, state: State, target: Tensor | None = None) -> Loss:
        """Mean FVU of x [n, d] over prefixes and the auxiliary loss of the whole."""
        del target
        centred = x - self.centre
        z, active = self.read(centred)
        assert isinstance(active, Pairs)
        error = x[:, None] - self.prefixes(z, active)
        fvu = error.square().sum(2).mean(0) / self.variance
        whole = error[:, -1]
        auxiliary = self.config.auxiliary_weight * self.auxiliary(centred, whole, state.dead)
        parts = {f"fvu_{end}": part for end, part in zip(self.ends.tolist(), fvu.detach(), strict=True)}
        return Loss(
            fvu.mean() + auxiliary, parts | {"auxiliary": auxiliary.detach()}, fvu[-1].detach(), z.detach(), active
        )

    def prefixes(self, z: Tensor, active: Pairs) -> Tensor:
        """Reconstructions [n, prefixes, d] by each prefix of the latents."""
        groups = len(self.ends)
        latent = active.latent + self.mesh.latent_part * active.latents
        bag = active.token * groups + torch.bucketize(latent, self.ends, right=True)
        order = bag.argsort(stable=True)
        pairs = Pairs(bag[order], active.latent[order], active.tokens * groups, active.latents)
        parts = pairs.decode(z[order], self.decoder, self.unit).view(active.tokens, groups, -1)
        return self.mesh.total(parts.cumsum(1)) + self.decoder_bias
