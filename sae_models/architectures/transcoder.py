"""Transcoder (arXiv 2406.11944): reads one site and writes another, here with TopK and an optional linear part
(EleutherAI's skip transcoders, arXiv 2501.18823).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rudder.sae_models.architectures import initial
from rudder.sae_models.architectures.architecture import Common, Loss, State
from rudder.sae_models.architectures.topk import TopK
from rudder.sae_models.sae import SAE


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """width_out: d_out (None: d). skip: whether the output has a linear part."""

    width_out: int | None = None
    skip: bool = False


class Transcoder(TopK):
    """The decoder begins at 0 and its rows keep their norms: input and output are not of one space."""

    config_type = Config
    config: Config
    SHARED = TopK.SHARED | {"linear", "target_scale"}
    unit = False
    target_scale: Tensor

    def __init__(self, d: int, config: Common, generator: torch.Generator) -> None:
        super().__init__(d, config, generator)
        width = self.config.width_out or d
        self.decoder = nn.Parameter(torch.zeros(config.latents, width))
        self.decoder_bias = nn.Parameter(torch.zeros(width))
        self.linear = nn.Parameter(torch.zeros(d, width)) if self.config.skip else None
        self.register_buffer("target_scale", torch.ones(()))

    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor | None = None) -> None:
        """From scaled inputs [n, d] and raw outputs [n, d_out], which are scaled to mean squared norm d_out."""
        if target is None:
            raise ValueError("transcoder: a sample of outputs is needed beside the inputs")
        offset = initial.OFFSETS[self.config.offset]
        self.centre.copy_(offset(sample))
        self.target_scale.copy_((target.shape[1] / target.square().sum(1).mean()).sqrt())
        scaled = target * self.target_scale
        self.decoder_bias.copy_(offset(scaled))
        self.variance.copy_((scaled - scaled.mean(0)).square().sum(1).mean())

    def loss(self, x: Tensor, state: State, target: Tensor | None = None) -> Loss:
        """FVU of the outputs `target` [n, d_out] and the auxiliary loss."""
        if target is None:
            raise ValueError("transcoder: a step needs outputs beside the inputs")
        centred = x - self.centre
        z, active = self.read(centred)
        wanted = target * self.target_scale
        if self.linear is not None:
            wanted = wanted - centred @ self.linear
        return self.loss_of(centred, wanted, z.relu(), active, state)

    @torch.no_grad()
    def canonical(self, scale: float, sample: Tensor) -> SAE:
        """TopK, with the linear part as `skip`."""
        plain = super().canonical(scale, sample)
        gain = scale / self.target_scale
        bias = self.decoder_bias / self.target_scale
        if self.linear is None:
            return replace(plain, decoder=plain.decoder * gain, decoder_bias=bias)
        skip = self.linear * gain
        bias = bias - self.centre @ self.linear / self.target_scale
        return replace(plain, decoder=plain.decoder * gain, decoder_bias=bias, skip=skip)
