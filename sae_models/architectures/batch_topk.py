"""BatchTopK (arXiv 2412.06410): of a batch, the k * n largest activations survive; a token has k on average."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sae_models.sae import SAE

# A token may keep at most ROOM * k latents, so that the batch's cut is sought among few values.
ROOM = 4


class Output(NamedTuple):
    """Of a batch [n, d]: sparse latents [n, F], reconstruction [n, d], and the smallest activation kept."""

    latents: Tensor
    reconstruction: Tensor
    threshold: Tensor


class BatchTopK(nn.Module):
    """A trainable SAE with unit decoder rows, on inputs scaled so that the mean of ||x||^2 is d."""

    def __init__(self, d: int, latents: int, k: int, generator: torch.Generator) -> None:
        super().__init__()
        directions = nn.functional.normalize(torch.randn(latents, d, generator=generator), dim=1)
        self.k = k
        self.decoder = nn.Parameter(directions)
        self.encoder = nn.Parameter(directions.clone())
        self.bias = nn.Parameter(torch.zeros(latents))
        self.decoder_bias = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Output:
        z = nn.functional.linear(x - self.decoder_bias, self.encoder, self.bias)
        top = z.topk(min(ROOM * self.k, z.shape[1]), dim=1, sorted=False)
        threshold = batch_threshold(top.values.detach(), self.k)
        kept = torch.where(top.values > threshold, top.values, 0.0)
        latents = torch.zeros_like(z).scatter(1, top.indices, kept)
        return Output(latents, latents @ self.decoder + self.decoder_bias, threshold)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Back to unit rows, as the size of an activation must not hide in its direction."""
        self.decoder.div_(self.decoder.norm(dim=1, keepdim=True))

    @torch.no_grad()
    def canonical(self, threshold: float, scale: float) -> SAE:
        """The inference form for raw residuals, of which the module saw `scale` times their value.

        The decoder stays of unit norm, so an activation is the length of the displacement it explains.
        """
        bias = (self.bias - self.encoder @ self.decoder_bias) / scale
        thresholds = torch.full_like(bias, threshold / scale)
        return SAE(self.encoder.clone(), bias, thresholds, self.decoder.clone(), self.decoder_bias / scale)


def batch_threshold(z: Tensor, k: int) -> Tensor:
    """The value [], at least 0, that exactly the k * n largest of z [n, m] are above."""
    dropped = z.numel() - k * z.shape[0]
    return z.flatten().kthvalue(dropped).values.clamp(min=0.0)
