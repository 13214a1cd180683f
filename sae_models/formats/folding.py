"""What formats keep around an SAE's weights, folded into them exactly.

Matrices are copied, in float32, only where they change.
"""

from dataclasses import replace

import torch
from torch import Tensor

from rudder.sae_models.sae import SAE, blocks


def fold_pre_bias(sae: SAE, pre_bias: Tensor) -> SAE:
    """Of an SAE that reads h - pre_bias [d]: one that reads h. The encoder stays as it is, memory-mapped or not."""
    pre_bias = pre_bias.float()
    shift = torch.cat([encoder @ pre_bias for _, encoder in blocks(sae.encoder)])
    return replace(sae, bias=sae.bias - shift)


def fold_input_scale(sae: SAE, scale: float) -> SAE:
    """Of an SAE that reads scale * x and whose output is to be divided by it: one of x. Activations stay."""
    decoder, decoder_bias = scaled(sae.decoder, 1 / scale), sae.decoder_bias / scale
    return replace(sae, encoder=scaled(sae.encoder, scale), decoder=decoder, decoder_bias=decoder_bias)


def fold_decoder_norm(sae: SAE) -> SAE:
    """Decoder rows of norm 1, activations times the norm that they had. A selection must act on what comes out."""
    norm = torch.linalg.vector_norm(sae.decoder, dim=1, dtype=torch.float32)
    rows = norm[:, None]
    return replace(
        sae,
        encoder=scaled(sae.encoder, rows),
        bias=sae.bias * norm,
        threshold=sae.threshold * norm,
        decoder=scaled(sae.decoder, 1 / torch.where(rows > 0, rows, 1.0)),
    )


def fold_gate(sae: SAE, gate_bias: Tensor, r_mag: Tensor) -> SAE:
    """A Gated SAE (arXiv 2404.16014) as JumpReLU: z = exp(r_mag) * (h . encoder) + bias, kept where the gate's
    h . encoder + gate_bias > 0, which is z > bias - exp(r_mag) * gate_bias.
    """
    ratio = r_mag.float().exp()
    threshold = (sae.bias - ratio * gate_bias.float()).clamp(min=0.0)
    return replace(sae, encoder=scaled(sae.encoder, ratio[:, None]), threshold=threshold)


def fold_whitening(sae: SAE, mean: Tensor, matrix: Tensor, inverse: Tensor) -> SAE:
    """Of an SAE that reads (x - mean) . matrix and whose output is to be mapped back: one of x (arXiv 2511.13981)."""
    encoder = sae.encoder.float() @ matrix.T
    decoder, decoder_bias = sae.decoder.float() @ inverse, sae.decoder_bias @ inverse + mean
    return replace(sae, encoder=encoder, bias=sae.bias - encoder @ mean, decoder=decoder, decoder_bias=decoder_bias)


def fold_signs(sae: SAE) -> SAE:
    """Of an SAE whose latents may be negative: one with twice as many, latent F + i the negative part of latent i.

    The k largest of these are the k of largest magnitude of those.
    """
    encoder, decoder = torch.cat([sae.encoder, -sae.encoder]), torch.cat([sae.decoder, -sae.decoder])
    bias, threshold = torch.cat([sae.bias, -sae.bias]), sae.threshold.repeat(2)
    return replace(sae, encoder=encoder, bias=bias, threshold=threshold, decoder=decoder)


def scaled(matrix: Tensor, by: Tensor | float) -> Tensor:
    """A matrix times a number, or [n, 1] numbers, in float32."""
    return (matrix * (by if isinstance(by, Tensor) else torch.tensor([[by]]))).float()
