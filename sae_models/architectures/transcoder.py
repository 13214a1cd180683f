"""Transcoder (arXiv 2406.11944): reads one site and predicts another, with TopK and an optional linear skip connection
(EleutherAI's skip transcoders, arXiv 2501.18823).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rudder.sae_models.architectures import offsets
from rudder.sae_models.architectures.architecture import Common, Loss, State
from rudder.sae_models.architectures.topk import TopK
from rudder.sae_models.sae import SAE


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """width_out: d_out (None: d). skip: whether the output has a linear skip connection."""

    width_out: int | None = None
    skip: bool = False


class Transcoder(TopK):
    """The decoder starts at 0 and its vectors keep their norms: input and output are different spaces."""

    config_type = Config
    config: Config
    REPLICATED = TopK.REPLICATED | {"linear", "target_scale"}
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
        """Initialise from scaled inputs [n, d] and raw outputs [n, d_out], which are scaled to a mean squared norm of
        d_out.
        """
        if target is None:
            raise ValueError("transcoder: a sample of outputs is needed beside the inputs")
        offset = offsets.OFFSETS[self.config.offset]
        self.centre.copy_(offset(sample))
        self.target_scale.copy_((target.shape[1] / target.square().sum(1).mean()).sqrt())
        scaled = target * self.target_scale
        self.decoder_bias.copy_(offset(scaled))
        self.variance.copy_((scaled - scaled.mean(0)).square().sum(1).mean())

    def loss(self, x: Tensor, state: State, target: Tensor | None = None) -> Loss:
        """Return FVU of the outputs `target` [n, d_out] and AuxK loss."""
        if target is None:
            raise ValueError("transcoder: a step needs outputs beside the inputs")
        centred = x - self.centre
        z, active = self.read(centred)
        residual_target = target * self.target_scale
        if self.linear is not None:
            residual_target = residual_target - centred @ self.linear
        return self.reconstruction_loss(centred, residual_target, z.relu(), active, state)

    @torch.no_grad()
    def canonical(self, scale: float, sample: Tensor) -> SAE:
        """Return an SAE with TopK, and the linear part as `skip`."""
        base = super().canonical(scale, sample)
        gain = scale / self.target_scale
        bias = self.decoder_bias / self.target_scale
        if self.linear is None:
            return replace(base, decoder=base.decoder * gain, decoder_bias=bias)
        skip = self.linear * gain
        bias = bias - self.centre @ self.linear / self.target_scale
        return replace(base, decoder=base.decoder * gain, decoder_bias=bias, skip=skip)
