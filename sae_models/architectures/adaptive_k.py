"""AdaptiveK (arXiv 2508.17320): the number of active latents of a token depends on its complexity, read by a linear
probe.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rudder.sae_models import sae
from rudder.sae_models.architectures.architecture import Common, Loss, State
from rudder.sae_models.architectures.topk import TopK
from rudder.sae_models.sae import SAE
from rudder.sae_models.sparse import operations as sparse
from rudder.sae_models.sparse.operations import Preactivations

PENALTIES = tuple(10.0**power for power in range(-2, 4))
FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """complexity: regression target of the probe: `corpus`, the field `complexity` (0 to 10) of each record of the
    corpus (in the paper, ratings by a language model); or `loss`, our own substitute, the model's mean loss on a
    window.

    k_min, k_max, steepness, scale: parameters of k(c), see sae.AdaptiveK; k is not used. l1: weight of mean ||f||_1 /
    mean ||x||.

    From the fraction `joint` of the run on the probe is trained too, at weight `probe`, on its own regression and on an
    anchor to its initial weights, at weight `anchor`; k(c) is rounded, so the reconstruction loss has no gradient for
    it. The authors' code starts that phase with a new probe and varies the weight of the anchor between 0.01 and 0.5;
    this one does neither.
    """

    complexity: Literal["corpus", "loss"] = "corpus"
    k_min: int = 20
    k_max: int = 320
    steepness: float = 6.0
    scale: float = 10.0
    l1: float = 0.005
    joint: float = 0.9
    probe: float = 0.05
    anchor: float = 0.2
    learning_rate: float | None = 1e-3
    gradient_norm: float | None = 1.0


class AdaptiveK(TopK):
    """TopK with k(c) of c = x . probe + probe_offset. `target`: complexities [n] in [0, scale]."""

    config_type = Config
    config: Config
    REPLICATED = TopK.REPLICATED | {"probe", "probe_offset", "probe_start", "probe_offset_start"}
    probe_start: Tensor
    probe_offset_start: Tensor

    def __init__(self, d: int, config: Common, generator: torch.Generator) -> None:
        super().__init__(d, config, generator)
        self.probe = nn.Parameter(torch.zeros(d))
        self.probe_offset = nn.Parameter(torch.full((), self.config.scale / 2))
        self.register_buffer("probe_start", self.probe.detach().clone())
        self.register_buffer("probe_offset_start", self.probe_offset.detach().clone())

    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor | None = None) -> None:
        """Initialise from scaled inputs [n, d], and fit the probe to complexities [n]; without these every token has
        k(scale / 2).
        """
        super().initialise(sample)
        if target is not None:
            weight, offset = ridge(sample, target)
            for parameter in (self.probe, self.probe_start):
                parameter.copy_(weight)
            for parameter in (self.probe_offset, self.probe_offset_start):
                parameter.copy_(offset)

    def loss(self, x: Tensor, state: State, target: Tensor | None = None) -> Loss:
        """Return FVU of x [n, d], L1 and AuxK loss; after `joint`, given complexities, also that of the probe."""
        centred = x - self.centre
        z, active = self.top_k_by_count(centred, self.selection().count(x.detach()))
        f = z.relu()
        norm = self.mesh.batch_all_reduce_mean(torch.linalg.vector_norm(x, dim=1).mean())
        terms = {"l1": self.config.l1 * self.mesh.latent_all_reduce_sum(f.sum()) / (len(x) * norm)}
        if target is not None and state.progress >= self.config.joint:
            terms["probe"] = self.config.probe * self.regression(x, target)
        return self.reconstruction_loss(centred, x, f, active, state, **terms)

    def selection(self, scale: float = 1.0) -> sae.AdaptiveK:
        """Return the canonical selection, for inputs that are still to be multiplied by `scale`."""
        settings = self.config
        k_max = min(settings.k_max, settings.latents)
        probe, offset = self.probe.detach() * scale, self.probe_offset.detach().clone()
        return sae.AdaptiveK(probe, offset, settings.k_min, k_max, settings.steepness, settings.scale)

    def top_k_by_count(self, centred: Tensor, counts: Tensor) -> Preactivations:
        """Return the largest pre-activations of each token, as many as its count [n], over all shards."""
        local_top = sparse.top_k(centred, self.weights, min(int(counts.max()), len(self.bias)))
        z = local_top.z.detach().view(len(centred), -1)
        largest = self.mesh.latent_all_gather_columns(z).sort(dim=1, descending=True).values
        kth = largest.gather(1, (counts.long() - 1).clamp(0, largest.shape[1] - 1)[:, None])
        return local_top.where((z >= kth).flatten())

    def regression(self, x: Tensor, complexity: Tensor) -> Tensor:
        """Return the probe's mean squared error on x [n, d] plus the weighted distance from its initial weights."""
        error: Tensor = (x @ self.probe + self.probe_offset - complexity).square().mean()
        moved = torch.cat([self.probe - self.probe_start, (self.probe_offset - self.probe_offset_start)[None]])
        anchor: Tensor = self.config.anchor * torch.linalg.vector_norm(moved + 1e-12)
        return error + anchor

    def canonical(self, scale: float, sample: Tensor) -> SAE:
        """Return an SAE with the selection AdaptiveK."""
        del sample
        return self.fold(scale, torch.zeros(()), selection=self.selection(scale))


def ridge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Fit weight [d] and offset [] of y [n] on x [n, d] by ridge regression; the penalty in 0.01..1000 is chosen by
    cross-validation.
    """
    folds = torch.arange(len(x)) % FOLDS
    errors = [sum(_held_out(x, y, folds == fold, penalty) for fold in range(FOLDS)) for penalty in PENALTIES]
    return _ridge(x, y, PENALTIES[errors.index(min(errors))])


def _held_out(x: Tensor, y: Tensor, mask: Tensor, penalty: float) -> float:
    weight, offset = _ridge(x[~mask], y[~mask], penalty)
    return float((x[mask] @ weight + offset - y[mask]).square().sum())


def _ridge(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    mean, target_mean = x.mean(0), y.mean()
    centred = (x - mean).double()
    gram = centred.T @ centred + penalty * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, centred.T @ (y - target_mean).double()).float()
    return weight, target_mean - mean @ weight
