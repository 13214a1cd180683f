"""Base of architectures with a sparsity penalty: a penalty weight that steers L0 to k, and an
initialisation near it.
"""

from dataclasses import dataclass
from math import exp

import torch
from torch import Tensor

from rudder.sae_models.architectures.architecture import Architecture, Common, State
from rudder.sae_models.architectures.schedule import ramp
from rudder.sae_models.sparse import operations as sparse

# Tokens of the sample that sets biases and thresholds, and latents per block.
TOKENS = 4096
BLOCK = 2048


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """warm_up: fraction of the run over which the penalty ramps up. aim: step of the log weight of the penalty towards
    L0 = k, per unit of L0 / k - 1 (0: the weight stays as published). start: initial active latents per token, as a
    multiple of k, each latent equally often: the first steps are sparse and no latent is dead (None: as published,
    biases start at 0). aim and start are our own.
    """

    warm_up: float = 0.05
    aim: float = 0.02
    start: float | None = 4.0


class Penalised(Architecture):
    """`level` []: factor by which the weight of the penalty has been changed to reach L0 = k."""

    config: Config
    REPLICATED = Architecture.REPLICATED | {"level"}
    level: Tensor

    def __init__(self, d: int, config: Common, generator: torch.Generator) -> None:
        super().__init__(d, config, generator)
        self.register_buffer("level", torch.ones(()))

    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor | None = None) -> None:
        """Initialise as every architecture, then set biases such that start * k latents per token are active."""
        super().initialise(sample, target)
        if self.config.start is not None:
            self.bias.sub_(latent_quantiles(self, sample, self.config.start * self.config.k / self.config.latents))

    def update_penalty(self, f: Tensor, tokens: int, state: State) -> float:
        """Return the factor of the penalty at a step with activations f, and move `level` towards L0 = k."""
        l0 = float(self.mesh.batch_all_reduce_mean(self.mesh.latent_all_reduce_sum((f.detach() > 0).sum() / tokens)))
        self.level.mul_(exp(self.config.aim * max(-1.0, min(1.0, l0 / self.config.k - 1))))
        return float(self.level) * ramp(state.progress, self.config.warm_up)


def latent_quantiles(module: Architecture, sample: Tensor, share: float) -> Tensor:
    """Return values [F] that each latent's pre-activations of scaled inputs [n, d] exceed on a fraction `share` of the
    tokens.
    """
    x = sample[:: max(1, len(sample) // TOKENS)] - module.centre
    count = max(1, round(min(share, 0.5) * len(x)))
    parts = zip(module.encoder.split(BLOCK), module.bias.split(BLOCK), strict=True)
    blocks = (torch.cat(list(sparse.preactivation_chunks(x, encoder, bias, torch.float32))) for encoder, bias in parts)
    return torch.cat([z.topk(count, dim=0).values[-1] for z in blocks])
