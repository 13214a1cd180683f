"""The canonical inference form of every SAE: a threshold on an affine encoder, and a decoder that keeps what is missed.

Formats and trainable variants are converted to this form once, with input normalisation and pre-encoder bias folded in:

    z = x . encoder + bias        f = z where z > threshold, else 0        x = f . decoder + decoder_bias + error
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Some latents of an SAE, as a bank holds them: encoder [n, d], bias [n], threshold [n], decoder [n, d]."""

    encoder: Tensor
    bias: Tensor
    threshold: Tensor
    decoder: Tensor


@dataclass(frozen=True)
class SAE:
    """float32 tensors: encoder [F, d], bias [F], threshold [F], decoder [F, d], decoder_bias [d].

    ReLU is threshold 0, JumpReLU (arXiv 2407.14435) a threshold per latent, and BatchTopK (arXiv 2412.06410) at
    inference one threshold for all.
    """

    encoder: Tensor
    bias: Tensor
    threshold: Tensor
    decoder: Tensor
    decoder_bias: Tensor

    @property
    def latents(self) -> int:
        """F."""
        return self.encoder.shape[0]

    @property
    def width(self) -> int:
        """d."""
        return self.encoder.shape[1]

    def encode(self, x: Tensor) -> Tensor:
        """Activations [..., F] of residuals x [..., d], in float32."""
        return activations(x, self.all_rows())

    def decode(self, latents: Tensor) -> Tensor:
        """Reconstruction [..., d] of activations [..., F]."""
        return latents @ self.decoder + self.decoder_bias

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The reconstruction of x [..., d] and the error x - reconstruction."""
        reconstruction = self.decode(self.encode(x))
        return reconstruction, x.float() - reconstruction

    def rows(self, latents: Tensor) -> Rows:
        """The rows of the latents with indices [n]."""
        return Rows(*(tensor[latents] for tensor in self.all_rows()))

    def all_rows(self) -> Rows:
        """Every latent."""
        return Rows(self.encoder, self.bias, self.threshold, self.decoder)


def activations(x: Tensor, rows: Rows) -> Tensor:
    """Activations [..., n] of rows on residuals x [..., d]; the test is strict, as in every published format."""
    z = x.float() @ rows.encoder.T + rows.bias
    return torch.where(z > rows.threshold, z, 0.0)


def fvu(x: Tensor, reconstruction: Tensor) -> float:
    """Fraction of variance unexplained over tokens [n, d]: squared error over squared distance from the mean of x."""
    x = x.double()
    return float((x - reconstruction).square().sum() / (x - x.mean(0)).square().sum())


def l0(latents: Tensor) -> float:
    """Mean number of active latents a token, of activations [..., F]."""
    return float((latents != 0).sum(-1).double().mean())
