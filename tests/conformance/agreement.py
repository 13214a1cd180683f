"""What it means that an SAE read here agrees with the library that wrote it."""

import torch
from torch import Tensor, nn

from rudder.sae_models.sae import SAE, Selection, TopK

# D is the width of the shipped model, so that its residuals can be read.
TOKENS, D, F, D_OUT, K = 96, 192, 576, 80, 24
# Of the largest value, in float32.
TOLERANCE = 1e-5
# A latent this near to where it is cut off may fall on either side of it.
EDGE = 1e-4


def fill(module: nn.Module, seed: int = 0) -> None:
    """Random parameters, none of them trivial: biases, thresholds of both signs, decoder rows of many norms."""
    g = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        shape = tuple(parameter.shape)
        value = torch.randn(shape, generator=g)
        if "threshold" in name:
            value = 3 * torch.rand(shape, generator=g) - 0.3
        elif "r_mag" in name:
            value = 0.3 * value
        elif len(shape) == 2:
            spread = [n if n == F else 1 for n in shape]
            value = value / D**0.5 * (0.5 + torch.rand(spread, generator=g))
        parameter.data = value.to(parameter.dtype)


def assert_close(found: Tensor, expected: Tensor, but: Tensor | None = None) -> None:
    """Equal to TOLERANCE of the largest value, except where `but`, [n, F] or [n, 1], says so."""
    difference = (found - expected.float()).abs()
    if but is not None:
        assert float(but.float().mean()) < 0.1, "too little is compared"
        difference = difference * ~but
    assert float(difference.max()) <= TOLERANCE * max(1.0, float(expected.abs().max()))
    assert float(expected.abs().max()) > 0.1, "nothing is compared"


def on_edge(sae: SAE, x: Tensor) -> Tensor:
    """Which latents [n, F] of inputs x [n, d] are so near to where they are cut off that rounding may decide.

    At a threshold of 0 nothing jumps.
    """
    z = sae.preactivations(sae.prepared(x)[1])
    near = ((z - sae.threshold).abs() < EDGE) & (sae.threshold > 0)
    if isinstance(sae.selection, TopK):
        last = z.topk(sae.selection.k + 1).values[..., -2:]
        near |= ((z - last[..., :1]).abs() < EDGE) & (last[..., :1] - last[..., 1:] < EDGE)
    return near


def assert_agrees(sae: SAE, x: Tensor, latents: Tensor, output: Tensor) -> None:
    """`encode` gives the latents [n, F] that the library gives for x [n, d], and `decode` of those its output."""
    edge = on_edge(sae, x)
    assert_close(sae.encode(x), latents, edge)
    assert_close(sae.decode(latents, x), output)
    assert_close(sae.forward(x, output)[0], output, edge.any(1, keepdim=True))


def assert_same(one: SAE, other: SAE, x: Tensor) -> None:
    """Two SAEs encode x [n, d] and decode what they encode alike."""
    latents = one.encode(x)
    assert_agrees(other, x, latents, one.decode(latents, x))


def dense(values: Tensor, indices: Tensor) -> Tensor:
    """Latents [n, F] of those that were kept, [n, k]."""
    return torch.zeros(len(values), F).scatter(1, indices, values)


def random_sae(
    *, thresholds: bool = False, selection: Selection | None = None, d_out: int = D, skip: bool = False
) -> SAE:
    """An SAE or transcoder made here, to be written."""
    g = torch.Generator().manual_seed(3)
    encoder, decoder = torch.randn(F, D, generator=g) / D**0.5, torch.randn(F, d_out, generator=g) / D**0.5
    threshold = torch.rand(F, generator=g) if thresholds else torch.zeros(F)
    bias, decoder_bias = torch.randn(F, generator=g), torch.randn(d_out, generator=g)
    linear = torch.randn(D, d_out, generator=g) / D**0.5 if skip else None
    return SAE(encoder, bias, threshold, decoder, decoder_bias, selection=selection, skip=linear)
