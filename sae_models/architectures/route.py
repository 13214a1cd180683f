"""RouteSAE (arXiv 2503.08200): one dictionary for several layers; a router selects the layer to read for each token."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rudder.sae_models import sae
from rudder.sae_models.architectures.architecture import Common, Loss, State
from rudder.sae_models.architectures.topk import TopK
from rudder.sae_models.sae import SAE, Normalisation, Router


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """sites: number of layers. mean: whether the router reads their mean instead of their sum.

    policy: weight of a policy-gradient term of our own (0: as published). The published loss is invariant to the factor
    p, so it hardly trains the router; this term lowers log p where the error is above the batch mean, and raises it
    below.
    """

    sites: int = 9
    mean: bool = False
    policy: float = 0.1
    k: int = 64
    learning_rate: float | None = 5e-4


class Route(TopK):
    """TopK on p_max * x of the most likely layer, where x of each layer is standardised; it reconstructs its input."""

    config_type = Config
    config: Config
    REPLICATED = TopK.REPLICATED | {"router"}

    def __init__(self, d: int, config: Common, generator: torch.Generator) -> None:
        super().__init__(d, config, generator)
        self.router = nn.Parameter(torch.randn(self.config.sites, d, generator=generator) / d**0.5 / self.config.sites)

    def initialise(self, sample: Tensor, target: Tensor | None = None) -> None:
        """Check the shape of the sample; standardised inputs need neither scale nor offset."""
        del target
        if sample.ndim != 3 or sample.shape[1] != self.config.sites:
            raise ValueError(f"route: a sample of {self.config.sites} sites is [n, {self.config.sites}, d]")

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the routed inputs [n, d] of inputs [n, L, d], the site index of each [n], and its probability [n]."""
        h = sae.normalise(x, Normalisation.LAYER_NORM)
        site, p = Router(self.router, self.config.mean).route(h)
        return p[:, None] * h[torch.arange(len(h)), site], site, p

    def loss(self, x: Tensor, state: State, target: Tensor | None = None) -> Loss:
        """Return ||y - h||^2 / ||h||^2 of the routed h, policy term and AuxK loss; `commonest_site` is the share of the
        most frequent site.
        """
        del target
        h, site, p = self.routed(x)
        z, active = self.read(h)
        error = h - self.reconstruct(z.relu(), active)
        relative = error.square().sum(1) / h.square().sum(1)
        baseline = self.mesh.batch_all_reduce_mean(relative.detach().mean())
        policy = self.config.policy * ((relative.detach() - baseline) * p.log()).mean()
        auxiliary = self.config.auxiliary_weight * self.auxiliary(h, error, state.dead)
        commonest = self.mesh.batch_all_reduce_mean(
            torch.bincount(site, minlength=self.config.sites) / len(site)
        ).amax()
        fvu = self.batch_fvu(error.detach(), h.detach())
        loss = relative.mean()
        parts = {"relative": loss.detach(), "auxiliary": auxiliary.detach(), "commonest_site": commonest}
        return Loss(loss + policy + auxiliary, parts, fvu, z.detach(), active)

    def batch_fvu(self, error: Tensor, h: Tensor) -> Tensor:
        """Return the FVU of an error of h [n, d] over the whole batch: the variance of routed inputs depends on the
        router, so it is not known beforehand.
        """
        mean = self.mesh.batch_all_reduce_mean(h.mean(0))
        sums = self.mesh.batch_all_reduce_mean(torch.stack([error.square().sum(), (h - mean).square().sum()]))
        return sums[0] / sums[1]

    def canonical(self, scale: float, sample: Tensor) -> SAE:
        """Return an SAE with router and layer norm; layer norm makes the scale irrelevant."""
        del scale, sample
        router = Router(self.router.detach().clone(), self.config.mean)
        rest = {"normalisation": Normalisation.LAYER_NORM, "router": router, "selection": sae.TopK(self.config.k)}
        return self.fold(1.0, torch.zeros(()), **rest)
