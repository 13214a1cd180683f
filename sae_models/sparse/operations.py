"""Sparse activations of a training batch: only the active (token, latent) pairs are kept.

A training step computes one dense product, [n, d] x [d, F], optionally in bfloat16, and selects m << n * F active
pairs. Everything else touches active pairs only: the decoder sums its vectors per token; the gradients of encoder and
decoder sum vectors of the batch per latent. Both are the same operation, `kernels.row_sums`.

With many active latents (the first steps of an L1 run) dense products are faster: `Dense` has the same interface over
[n, F].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rudder.sae_models.sparse.kernels import row_dots, row_sums

# Bytes of pre-activations per chunk on a CPU: a chunk stays in cache between the product and the selection.
CHUNK_BYTES = 1 << 24
# Above this share of active pairs, dense products are faster than sparse sums (measured on two AVX-512 cores).
DENSE_SHARE = 1 / 64
# Latents per block in `block_top_k` and `positive_entries`.
BLOCK_LATENTS = 32


class Groups(NamedTuple):
    """Pairs sorted by latent: a permutation [m], and the offset of the first pair of each latent [F]."""

    order: Tensor
    start: Tensor


@dataclass(frozen=True)
class Pairs:
    """m active pairs sorted by token: token [m], latent [m], among `tokens` tokens and `latents` latents."""

    token: Tensor
    latent: Tensor
    tokens: int
    latents: int

    @cached_property
    def start(self) -> Tensor:
        """Offset of the first pair of each token [n]."""
        return group_starts(self.token, self.tokens)

    @cached_property
    def by_latent(self) -> Groups:
        """The same pairs sorted by latent."""
        return Groups(self.latent.argsort(), group_starts(self.latent, self.latents))

    def where(self, mask: Tensor) -> "Pairs":
        """Select the pairs of a mask [m]."""
        return Pairs(self.token[mask], self.latent[mask], self.tokens, self.latents)

    def expand(self, parameter: Tensor) -> Tensor:
        """Expand a per-latent parameter [F] to the pairs [m]."""
        return parameter.index_select(0, self.latent)

    def decode(self, values: Tensor, decoder: Tensor, unit: bool = False) -> Tensor:
        """Return sums of decoder vectors [n, d] weighted by activations [m]. With `unit`, project the decoder gradient
        onto the tangent space of the unit sphere.
        """
        out: Tensor = _Decode.apply(values, decoder, self, unit)  # type: ignore[no-untyped-call]
        return out

    def sum_over_tokens(self, values: Tensor) -> Tensor:
        """Return sums over tokens [F] of values [m]."""
        return torch.bincount(self.latent, weights=values.detach(), minlength=self.latents)


@dataclass(frozen=True)
class Dense:
    """All (token, latent) pairs: values are [n, F]."""

    tokens: int
    latents: int
    precision: torch.dtype

    def expand(self, parameter: Tensor) -> Tensor:
        """Return a per-latent parameter [F], which broadcasts."""
        return parameter

    def decode(self, values: Tensor, decoder: Tensor, unit: bool = False) -> Tensor:
        """Return values @ decoder, [n, d]; `unit` as in `Pairs.decode`."""
        if unit:
            decoder = _Tangent.apply(decoder)  # type: ignore[no-untyped-call]
        return (values.to(self.precision) @ decoder.to(self.precision)).float()

    def sum_over_tokens(self, values: Tensor) -> Tensor:
        """Return sums over tokens [F] of values [n, F]."""
        return values.detach().sum(0)


Active = Pairs | Dense


class Preactivations(NamedTuple):
    """Pre-activations z at the active pairs, [m] or [n, F]; differentiable in encoder, bias and input."""

    z: Tensor
    active: Active

    def where(self, mask: Tensor) -> "Preactivations":
        """Select the pairs of a mask [m]."""
        assert isinstance(self.active, Pairs)
        return Preactivations(self.z[mask], self.active.where(mask))


class EncoderWeights(NamedTuple):
    """Encoder [F, d], bias [F], and the dtype of the product."""

    encoder: Tensor
    bias: Tensor
    precision: torch.dtype = torch.bfloat16


def top_k(x: Tensor, weights: EncoderWeights, k: int) -> Preactivations:
    """Return the k largest pre-activations of each token of x [n, d], as k pairs per token. Exact among positive
    values.
    """
    with torch.no_grad():
        tops = [block_top_k(z, k) for z in preactivation_chunks(x, weights.encoder, weights.bias, weights.precision)]
    z, latent = (torch.cat(parts).flatten() for parts in zip(*tops, strict=True))
    token = torch.arange(len(x), device=x.device).repeat_interleave(k)
    return encode_pairs(x, weights, Pairs(token, latent, len(x), len(weights.bias)), z.float())


def above_floor(x: Tensor, weights: EncoderWeights, floor: Tensor) -> Preactivations | None:
    """Return the pairs of x [n, d] whose pre-activation exceeds the floor, [] or [F]; None if more than DENSE_SHARE of
    all pairs do.
    """
    tokens, latents, excesses, offset = [], [], [], 0
    for z in preactivation_chunks(x, weights.encoder, (weights.bias - floor).detach(), weights.precision):
        token, latent, excess = positive_entries(z)
        if len(excess) > DENSE_SHARE * z.numel():
            return None
        tokens.append(token + offset)
        latents.append(latent)
        excesses.append(excess)
        offset += len(z)
    pairs = Pairs(torch.cat(tokens), torch.cat(latents), len(x), len(weights.bias))
    z = torch.cat(excesses).float() + (pairs.expand(floor) if floor.ndim else floor)
    return encode_pairs(x, weights, pairs, z.detach())


def active_preactivations(x: Tensor, weights: EncoderWeights, floor: Tensor | None = None) -> Preactivations:
    """Return the pairs of x [n, d] whose pre-activation exceeds the floor [F] (default 0), or all pairs if more than
    DENSE_SHARE of them do.
    """
    sparse = above_floor(x, weights, weights.bias.new_zeros(()) if floor is None else floor)
    return dense_preactivations(x, weights) if sparse is None else sparse


def dense_preactivations(x: Tensor, weights: EncoderWeights) -> Preactivations:
    """Return all pre-activations [n, F]."""
    z = functional.linear(*(t.to(weights.precision) for t in (x, weights.encoder, weights.bias)))
    return Preactivations(z.float(), Dense(len(x), len(weights.bias), weights.precision))


def encode_pairs(x: Tensor, weights: EncoderWeights, pairs: Pairs, z: Tensor) -> Preactivations:
    """Make z [m], the pre-activations of pairs that a detached product returned, differentiable."""
    differentiable: Tensor = _Encode.apply(x, weights.encoder, weights.bias, pairs, z)  # type: ignore[no-untyped-call]
    return Preactivations(differentiable, pairs)


@torch.no_grad()
def preactivation_chunks(x: Tensor, encoder: Tensor, bias: Tensor, precision: torch.dtype) -> Iterator[Tensor]:
    """Yield pre-activations [c, F] of inputs [n, d], a chunk of tokens at a time."""
    encoder, bias = encoder.to(precision), bias.to(precision)
    size = len(x) if x.is_cuda else max(1, CHUNK_BYTES // (len(bias) * encoder.element_size()))
    for chunk in x.to(precision).split(size):
        yield functional.linear(chunk, encoder, bias)


def block_top_k(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest values of each token of z [c, F] and their latents; exact among positive values.

    They lie in the k blocks with the largest maxima, so only k * BLOCK_LATENTS values are sorted. The members of a
    block are F / BLOCK_LATENTS apart: the block maxima are then an elementwise maximum over contiguous memory.
    """
    latents = z.shape[1]
    blocks = latents // BLOCK_LATENTS
    if latents % BLOCK_LATENTS or k * BLOCK_LATENTS * 2 > latents:
        values, index = z.topk(k, dim=1, sorted=False)
        return values, index
    blocked = as_ordered_integers(z).unflatten(1, (BLOCK_LATENTS, blocks))
    block = blocked.amax(1).topk(k, dim=1, sorted=False).indices
    candidates = blocked.gather(2, block[:, None, :].expand(-1, BLOCK_LATENTS, -1)).flatten(1)
    bits, position = candidates.topk(k, dim=1, sorted=False)
    return bits.view(z.dtype), position // k * blocks + block.gather(1, position % k)


def positive_entries(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (token, latent, value) of the entries of z [c, F] above 0, sorted by token."""
    latents = z.shape[1]
    if latents % BLOCK_LATENTS:
        token, latent = (z > 0).nonzero(as_tuple=True)
        return token, latent, z[token, latent]
    blocked = z.unflatten(1, (BLOCK_LATENTS, -1))
    token, block = (as_ordered_integers(blocked).amax(1) > 0).nonzero(as_tuple=True)
    values = blocked[token, :, block]
    entry, offset = (values > 0).nonzero(as_tuple=True)
    return token[entry], offset * blocked.shape[2] + block[entry], values[entry, offset]


def as_ordered_integers(z: Tensor) -> Tensor:
    """View z as integers, which compare like the floats where these are positive.

    Positive IEEE floats have the order of their bit patterns, and a CPU compares integers several times faster than
    bfloat16.
    """
    return z.view(torch.int16 if z.element_size() == 2 else torch.int32)


def group_starts(group: Tensor, groups: int) -> Tensor:
    """Return the offset [groups] of the first member of each group, if the group numbers [m] were sorted."""
    count = torch.bincount(group, minlength=groups)
    return count.cumsum(0) - count


class _Encode(torch.autograd.Function):
    """z of pairs. Gradient of the encoder: vectors of x summed per latent; gradient of x: encoder vectors summed per
    token.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, encoder: Tensor, _: Tensor, pairs: Pairs, z: Tensor) -> Tensor:
        ctx.pairs = pairs
        ctx.save_for_backward(x, encoder)
        return z.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x, encoder), pairs = ctx.saved_tensors, ctx.pairs
        order, start = pairs.by_latent
        grad_x = row_sums(encoder, pairs.latent, pairs.start, g) if ctx.needs_input_grad[0] else None
        grad_encoder = row_sums(x, pairs.token[order], start, g[order])
        return grad_x, grad_encoder, pairs.sum_over_tokens(g).to(g.dtype), None, None


class _Decode(torch.autograd.Function):
    """Sums of decoder vectors. Gradient of the values: dot products; gradient of the decoder: output gradients summed
    per latent.

    The gradient of a decoder vector is sum_t f_t g_t, so its radial part is sum_t f_t (g_t . vector): the dot products
    of the value gradient already give it.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, decoder: Tensor, pairs: Pairs, unit: bool) -> Tensor:
        ctx.pairs, ctx.unit = pairs, unit
        ctx.save_for_backward(values, decoder)
        return row_sums(decoder, pairs.latent, pairs.start, values)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (values, decoder), pairs = ctx.saved_tensors, ctx.pairs
        grad_values = row_dots(g, decoder, pairs.token, pairs.latent, pairs.start)
        if not ctx.needs_input_grad[1]:
            return grad_values, None, None, None
        order, start = pairs.by_latent
        grad_decoder = row_sums(g, pairs.token[order], start, values[order])
        if ctx.unit:
            grad_decoder.addcmul_(pairs.sum_over_tokens(values * grad_values).to(g.dtype)[:, None], decoder, value=-1)
        return grad_values, grad_decoder, None, None


class _Tangent(torch.autograd.Function):
    """Identity on unit vectors; the backward removes the part of the gradient along each vector."""

    @staticmethod
    def forward(ctx: Any, decoder: Tensor) -> Tensor:
        ctx.save_for_backward(decoder)
        return decoder.view_as(decoder)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (decoder,) = ctx.saved_tensors
        return g - torch.einsum("fd,fd->f", g, decoder)[:, None] * decoder
