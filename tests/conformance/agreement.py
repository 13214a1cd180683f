"""Assertions that an SAE agrees with the library that wrote it."""

import torch
from torch import Tensor, nn

from rudder.sae_models.sae import SAE, Selection, TopK

# D is the width of the shipped model, so that the SAEs can read its residuals.
TOKENS, D, F, D_OUT, K = 96, 192, 576, 80, 24
# Relative to the largest value, in float32.
TOLERANCE = 1e-5
# Within this distance of its threshold a latent may be active or not.
EDGE = 1e-4


def fill(module: nn.Module, seed: int = 0) -> None:
    """Set random, non-trivial parameters: biases, thresholds of both signs, decoder rows of different norms."""
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


def assert_close(actual: Tensor, expected: Tensor, ignore: Tensor | None = None) -> None:
    """Assert equality to TOLERANCE of the largest value, except where `ignore`, [n, F] or [n, 1], is true."""
    difference = (actual - expected.float()).abs()
    if ignore is not None:
        assert float(ignore.float().mean()) < 0.1, "too little is compared"
        difference = difference * ~ignore
    assert float(difference.max()) <= TOLERANCE * max(1.0, float(expected.abs().max()))
    assert float(expected.abs().max()) > 0.1, "nothing is compared"


def on_edge(sae: SAE, x: Tensor) -> Tensor:
    """Return the latents [n, F] of inputs x [n, d] so close to their threshold that rounding may decide.

    A threshold of 0 has no such edge: the activation is continuous there.
    """
    z = sae.preactivations(sae.encoder_input(x)[1])
    near = ((z - sae.threshold).abs() < EDGE) & (sae.threshold > 0)
    if isinstance(sae.selection, TopK):
        last = z.topk(sae.selection.k + 1).values[..., -2:]
        near |= ((z - last[..., :1]).abs() < EDGE) & (last[..., :1] - last[..., 1:] < EDGE)
    return near


def assert_agrees(sae: SAE, x: Tensor, latents: Tensor, output: Tensor) -> None:
    """Assert that `encode` of x [n, d] equals the library's latents [n, F], and `decode` of those its output."""
    edge = on_edge(sae, x)
    assert_close(sae.encode(x), latents, edge)
    assert_close(sae.decode(latents, x), output)
    assert_close(sae.forward(x, output)[0], output, edge.any(1, keepdim=True))


def assert_same(first: SAE, second: SAE, x: Tensor) -> None:
    """Assert that two SAEs encode x [n, d], and decode the latents, alike."""
    latents = first.encode(x)
    assert_agrees(second, x, latents, first.decode(latents, x))


def dense(values: Tensor, indices: Tensor) -> Tensor:
    """Return latents [n, F] from the values and indices [n, k] of a selection."""
    return torch.zeros(len(values), F).scatter(1, indices, values)


def random_sae(
    *, thresholds: bool = False, selection: Selection | None = None, d_out: int = D, skip: bool = False
) -> SAE:
    """Return an SAE or transcoder to be written."""
    g = torch.Generator().manual_seed(3)
    encoder, decoder = torch.randn(F, D, generator=g) / D**0.5, torch.randn(F, d_out, generator=g) / D**0.5
    threshold = torch.rand(F, generator=g) if thresholds else torch.zeros(F)
    bias, decoder_bias = torch.randn(F, generator=g), torch.randn(d_out, generator=g)
    linear = torch.randn(D, d_out, generator=g) / D**0.5 if skip else None
    return SAE(encoder, bias, threshold, decoder, decoder_bias, selection=selection, skip=linear)
