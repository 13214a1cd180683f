"""AdaptiveK (arXiv 2508.17320): how many latents a token gets follows from its complexity, read by a linear probe."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rudder.sae_models import sae
from rudder.sae_models.architectures.architecture import Common, Loss, State
from rudder.sae_models.architectures.topk import TopK
from rudder.sae_models.sae import SAE
from rudder.sae_models.sparse import operations as sparse
from rudder.sae_models.sparse.operations import Read

PENALTIES = tuple(10.0**power for power in range(-2, 4))
FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """complexity: what the probe is taught: `corpus`, the `complexity` from 0 to 10 of each row of the corpus (the
    paper's are ratings by a language model); or `loss`, our own substitute, the model's own mean loss on a window.

    k_min, k_max, steepness, scale of k(c) (sae.AdaptiveK); k is not used. l1: weight of mean ||f||_1 / mean ||x||.

    From a share `joint` of the run on the probe is trained too, at weight `probe`, by its own regression and an anchor
    to where it was, at weight `anchor`; k(c) is rounded, so reconstruction does not reach it. The authors' code begins
    that phase with a new probe and moves the weight of the anchor between 0.01 and 0.5; here neither.
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
    SHARED = TopK.SHARED | {"probe", "probe_offset", "probe_start", "probe_offset_start"}
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
        """From scaled inputs [n, d]; the probe from complexities [n], without which every token gets k(scale / 2)."""
        super().initialise(sample)
        if target is not None:
            weight, offset = ridge(sample, target)
            for parameter in (self.probe, self.probe_start):
                parameter.copy_(weight)
            for parameter in (self.probe_offset, self.probe_offset_start):
                parameter.copy_(offset)

    def loss(self, x: Tensor, state: State, target: Tensor | None = None) -> Loss:
        """FVU of x [n, d], L1, auxiliary loss; late in the run, and with complexities, the probe's."""
        centred = x - self.centre
        z, active = self.among(centred, self.selection().count(x.detach()))
        f = z.relu()
        norm = self.mesh.mean(torch.linalg.vector_norm(x, dim=1).mean())
        terms = {"l1": self.config.l1 * self.mesh.total(f.sum()) / (len(x) * norm)}
        if target is not None and state.progress >= self.config.joint:
            terms["probe"] = self.config.probe * self.regression(x, target)
        return self.loss_of(centred, x, f, active, state, **terms)

    def selection(self, scale: float = 1.0) -> sae.AdaptiveK:
        """The canonical selection, for inputs that are to be multiplied by a scale."""
        settings = self.config
        k_max = min(settings.k_max, settings.latents)
        probe, offset = self.probe.detach() * scale, self.probe_offset.detach().clone()
        return sae.AdaptiveK(probe, offset, settings.k_min, k_max, settings.steepness, settings.scale)

    def among(self, centred: Tensor, counts: Tensor) -> Read:
        """The strongest of each token, as many as its count [n] says, over all shards."""
        read = sparse.strongest(centred, self.weights, min(int(counts.max()), len(self.bias)))
        mine = read.z.detach().view(len(centred), -1)
        largest = self.mesh.gather(mine).sort(dim=1, descending=True).values
        least = largest.gather(1, (counts.long() - 1).clamp(0, largest.shape[1] - 1)[:, None])
        return read.where((mine >= least).flatten())

    def regression(self, x: Tensor, complexity: Tensor) -> Tensor:
        """Mean squared error of the probe on x [n, d], and its distance from where it was."""
        error: Tensor = (x @ self.probe + self.probe_offset - complexity).square().mean()
        moved = torch.cat([self.probe - self.probe_start, (self.probe_offset - self.probe_offset_start)[None]])
        anchor: Tensor = self.config.anchor * torch.linalg.vector_norm(moved + 1e-12)
        return error + anchor

    def canonical(self, scale: float, sample: Tensor) -> SAE:
        """With the selection AdaptiveK."""
        del sample
        return self.folded(scale, torch.zeros(()), selection=self.selection(scale))


def ridge(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [d] and offset [] of y [n] on x [n, d], with the penalty in 0.01..1000 that cross-validation prefers."""
    fold = torch.arange(len(x)) % FOLDS
    losses = [sum(_held_out(x, y, fold == held, penalty) for held in range(FOLDS)) for penalty in PENALTIES]
    return _ridge(x, y, PENALTIES[losses.index(min(losses))])


def _held_out(x: Tensor, y: Tensor, held: Tensor, penalty: float) -> float:
    weight, offset = _ridge(x[~held], y[~held], penalty)
    return float((x[held] @ weight + offset - y[held]).square().sum())


def _ridge(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    mean, level = x.mean(0), y.mean()
    centred = (x - mean).double()
    gram = centred.T @ centred + penalty * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, centred.T @ (y - level).double()).float()
    return weight, level - mean @ weight
