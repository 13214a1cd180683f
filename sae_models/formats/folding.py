"""Fold scales, biases and gates that formats store beside an SAE's weights into the weights, exactly.

Matrices that change are copied in float32; all others are kept as they are.
"""

from dataclasses import replace

import torch
from torch import Tensor

from rudder.sae_models.sae import SAE, AdaptiveK, Normalisation, blocks


def fold_pre_bias(sae: SAE, pre_bias: Tensor) -> SAE:
    """Convert an SAE that reads h - pre_bias [d] to one that reads h. The encoder does not change."""
    pre_bias = pre_bias.float()
    shift = torch.cat([encoder @ pre_bias for _, encoder in blocks(sae.encoder)])
    return replace(sae, bias=sae.bias - shift)


def fold_input_scale(sae: SAE, scale: float) -> SAE:
    """Convert an SAE that reads scale * x and whose output is divided by scale to one that reads x."""
    return fold_scales(sae, scale, scale)


def fold_scales(sae: SAE, input_scale: float, output_scale: float) -> SAE:
    """Convert an SAE that reads input_scale * x and whose output is divided by output_scale to one that reads x.

    Activations do not change.
    """
    decoder, decoder_bias = scaled(sae.decoder, 1 / output_scale), sae.decoder_bias / output_scale
    return replace(sae, encoder=scaled(sae.encoder, input_scale), decoder=decoder, decoder_bias=decoder_bias)


def fold_decoder_norm(sae: SAE) -> SAE:
    """Normalise decoder rows to norm 1 and multiply activations by their former norms.

    A selection then compares the new activations.
    """
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
    """Convert a Gated SAE (arXiv 2404.16014) to JumpReLU.

    z = exp(r_mag) * (h . encoder) + bias is active where the gate h . encoder + gate_bias > 0, that is, where
    z > bias - exp(r_mag) * gate_bias.
    """
    ratio = r_mag.float().exp()
    threshold = (sae.bias - ratio * gate_bias.float()).clamp(min=0.0)
    return replace(sae, encoder=scaled(sae.encoder, ratio[:, None]), threshold=threshold)


def fold_whitening(sae: SAE, mean: Tensor, matrix: Tensor, inverse: Tensor) -> SAE:
    """Convert an SAE that reads (x - mean) . matrix, and whose output `inverse` maps back, to one that reads x
    (arXiv 2511.13981); mean [d], matrix and inverse [d, d].
    """
    encoder = sae.encoder.float() @ matrix.T
    decoder, decoder_bias = sae.decoder.float() @ inverse, sae.decoder_bias @ inverse + mean
    return replace(sae, encoder=encoder, bias=sae.bias - encoder @ mean, decoder=decoder, decoder_bias=decoder_bias)


def fold_centring(sae: SAE) -> SAE:
    """Convert an SAE that reads x - mean(x), the mean being over the width of each vector, to one that reads x.

    Centring is linear, x - mean(x) = P x with P = 1 - ones / d, so z = encoder . P x: the encoder becomes encoder P.
    The output reconstructs P x, to which the skip connection ones / d adds the mean again. ValueError: the
    normalisation or selection depends on x in another way than through z.
    """
    if sae.normalisation is Normalisation.LAYER_NORM:
        # It subtracts the mean itself, and gives it back.
        return sae
    linear = sae.normalisation is Normalisation.NONE and sae.skip is None and sae.router is None
    if not linear or isinstance(sae.selection, AdaptiveK) or sae.decoder.shape[1] != sae.width:
        raise ValueError(f"an SAE with normalisation {sae.normalisation} cannot be centred by its weights alone")
    encoder = torch.cat([block - block.mean(1, keepdim=True) for _, block in blocks(sae.encoder)])
    return replace(sae, encoder=encoder, skip=torch.full((sae.width, sae.width), 1 / sae.width))


def is_centred(sae: SAE) -> bool:
    """Return whether the SAE is the result of `fold_centring`."""
    return sae.skip is not None and bool((sae.skip == torch.tensor(1 / sae.width, dtype=sae.skip.dtype)).all())


def fold_signs(sae: SAE) -> SAE:
    """Convert an SAE with negative activations to one with twice as many latents: F + i is the negative part of i.

    The k largest activations then are those with the k largest magnitudes before.
    """
    encoder, decoder = torch.cat([sae.encoder, -sae.encoder]), torch.cat([sae.decoder, -sae.decoder])
    bias, threshold = torch.cat([sae.bias, -sae.bias]), sae.threshold.repeat(2)
    return replace(sae, encoder=encoder, bias=bias, threshold=threshold, decoder=decoder)


def scaled(matrix: Tensor, by: Tensor | float) -> Tensor:
    """Multiply a matrix by a number, or by numbers [n, 1], in float32."""
    return (matrix * (by if isinstance(by, Tensor) else torch.tensor([[by]]))).float()
