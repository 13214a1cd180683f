"""RouteSAE (arXiv 2503.08200): one dictionary for several layers, of which a router reads one for each token."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rudder.sae_models import sae
from rudder.sae_models.architectures.architecture import Common, Loss, State
from rudder.sae_models.architectures.topk import TopK
from rudder.sae_models.sae import SAE, Normalisation, Router


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """sites: how many layers are read. mean: whether the router sees their mean, not their sum.

    policy: weight of a term of our own (0: as published). The published loss does not change with the factor p, so it
    hardly teaches the router; this one lowers log p where the error is above the batch's mean, and raises it below.
    """

    sites: int = 9
    mean: bool = False
    policy: float = 0.1
    k: int = 64
    learning_rate: float | None = 5e-4


class Route(TopK):
    """TopK on p_max * x of the most likely layer, each layer's x standardised; it reconstructs what it read."""

    config_type = Config
    config: Config
    SHARED = TopK.SHARED | {"router"}

    def __init__(self, d: int, config: Common, generator: torch.Generator) -> None:
        super().__init__(d, config, generator)
        self.router = nn.Parameter(torch.randn(self.config.sites, d, generator=generator) / d**0.5 / self.config.sites)

    def initialise(self, sample: Tensor, target: Tensor | None = None) -> None:
        """Of [n, L, d] nothing is taken: standardised vectors need no scale, and the factor p no offset."""
        del target
        if sample.ndim != 3 or sample.shape[1] != self.config.sites:
            raise ValueError(f"route: a sample of {self.config.sites} sites is [n, {self.config.sites}, d]")

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is read [n, d] of inputs [n, L, d], from which site [n], and how likely that was [n]."""
        h = sae.normalise(x, Normalisation.LAYER_NORM)
        site, p = Router(self.router, self.config.mean).route(h)
        return p[:, None] * h[torch.arange(len(h)), site], site, p

    def loss(self, x: Tensor, state: State, target: Tensor | None = None) -> Loss:
        """||y - h||^2 / ||h||^2 of the routed h, and the auxiliary loss; parts tell the share of the commonest site."""
        del target
        h, site, p = self.routed(x)
        z, active = self.read(h)
        error = h - self.reconstruct(z.relu(), active)
        relative = error.square().sum(1) / h.square().sum(1)
        level = self.mesh.mean(relative.detach().mean())
        policy = self.config.policy * ((relative.detach() - level) * p.log()).mean()
        auxiliary = self.config.auxiliary_weight * self.auxiliary(h, error, state.dead)
        commonest = self.mesh.mean(torch.bincount(site, minlength=self.config.sites) / len(site)).amax()
        fvu = self.share_of_variance(error.detach(), h.detach())
        loss = relative.mean()
        parts = {"relative": loss.detach(), "auxiliary": auxiliary.detach(), "commonest_site": commonest}
        return Loss(loss + policy + auxiliary, parts, fvu, z.detach(), active)

    def share_of_variance(self, error: Tensor, h: Tensor) -> Tensor:
        """The FVU of an error of h [n, d], over the whole batch: what is routed has no variance known beforehand."""
        mean = self.mesh.mean(h.mean(0))
        sums = self.mesh.mean(torch.stack([error.square().sum(), (h - mean).square().sum()]))
        return sums[0] / sums[1]

    def canonical(self, scale: float, sample: Tensor) -> SAE:
        """With router and layer norm; the scale is lost in the latter."""
        del scale, sample
        router = Router(self.router.detach().clone(), self.config.mean)
        rest = {"normalisation": Normalisation.LAYER_NORM, "router": router, "selection": sae.TopK(self.config.k)}
        return self.folded(1.0, torch.zeros(()), **rest)
