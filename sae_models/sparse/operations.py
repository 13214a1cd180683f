"""Activations of a training batch, kept as what they are: a few active latents a token.

A step of a sparse SAE is one product, [n, d] x [d, F], in bfloat16 where wanted, and a choice of m << n * F active
(token, latent) pairs. All the rest touches active pairs alone: the decoder sums its rows for each token, the gradients
of encoder and decoder sum rows of the batch for each latent. These are one operation, `kernels.row_sums`.

Where many latents are active (the first steps of an L1 run) dense products cost less: `Dense` is the same over [n, F].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rudder.sae_models.sparse.kernels import row_dots, row_sums

# Bytes of pre-activations at a time on a CPU: they stay in cache between the product and the choice.
CHUNK_BYTES = 1 << 24
# Above this share of active pairs dense products cost less than sums of rows (measured on two AVX-512 cores).
DENSE_SHARE = 1 / 64
# Latents in a block of the search for the largest.
SPAN = 32


class Groups(NamedTuple):
    """Pairs in the order of their latents: a permutation [m], and where each latent's begin [F]."""

    order: Tensor
    start: Tensor


@dataclass(frozen=True)
class Pairs:
    """m active pairs in the order of their tokens: token [m], latent [m]; of n tokens and F latents."""

    token: Tensor
    latent: Tensor
    tokens: int
    latents: int

    @cached_property
    def start(self) -> Tensor:
        """Where each token's pairs begin [n]."""
        return starts(self.token, self.tokens)

    @cached_property
    def by_latent(self) -> Groups:
        """The same pairs, latent by latent."""
        return Groups(self.latent.argsort(), starts(self.latent, self.latents))

    def where(self, kept: Tensor) -> "Pairs":
        """The pairs that a mask [m] keeps."""
        return Pairs(self.token[kept], self.latent[kept], self.tokens, self.latents)

    def of_latents(self, parameter: Tensor) -> Tensor:
        """A parameter [F] of the latents at the pairs [m]."""
        return parameter.index_select(0, self.latent)

    def decode(self, values: Tensor, decoder: Tensor, unit: bool = False) -> Tensor:
        """Sums of decoder rows [n, d] of activations [m]; `unit`: the rows' gradient is that on the sphere."""
        out: Tensor = _Decode.apply(values, decoder, self, unit)  # type: ignore[no-untyped-call]
        return out

    def totals(self, values: Tensor) -> Tensor:
        """Sums over tokens [F] of values [m]."""
        return torch.bincount(self.latent, weights=values.detach(), minlength=self.latents)


@dataclass(frozen=True)
class Dense:
    """All pairs: values are [n, F]."""

    tokens: int
    latents: int
    precision: torch.dtype

    def of_latents(self, parameter: Tensor) -> Tensor:
        """A parameter [F] of the latents, to broadcast."""
        return parameter

    def decode(self, values: Tensor, decoder: Tensor, unit: bool = False) -> Tensor:
        """values . decoder, [n, d]; `unit` as of pairs."""
        if unit:
            decoder = _Tangent.apply(decoder)  # type: ignore[no-untyped-call]
        return (values.to(self.precision) @ decoder.to(self.precision)).float()

    def totals(self, values: Tensor) -> Tensor:
        """Sums over tokens [F] of values [n, F]."""
        return values.detach().sum(0)


Active = Pairs | Dense


class Read(NamedTuple):
    """Pre-activations of the active pairs, [m] or [n, F]: differentiable in encoder, bias and input."""

    z: Tensor
    active: Active

    def where(self, kept: Tensor) -> "Read":
        """Of pairs, those that a mask [m] keeps."""
        assert isinstance(self.active, Pairs)
        return Read(self.z[kept], self.active.where(kept))


class Weights(NamedTuple):
    """What reads: encoder [F, d], bias [F], and the precision of the product."""

    encoder: Tensor
    bias: Tensor
    precision: torch.dtype = torch.bfloat16


def strongest(x: Tensor, weights: Weights, k: int) -> Read:
    """The k largest pre-activations of each token of x [n, d], as k pairs a token; exact among the positive ones."""
    with torch.no_grad():
        tops = [top(z, k) for z in products(x, weights.encoder, weights.bias, weights.precision)]
    z, latent = (torch.cat(parts).flatten() for parts in zip(*tops, strict=True))
    token = torch.arange(len(x), device=x.device).repeat_interleave(k)
    return read(x, weights, Pairs(token, latent, len(x), len(weights.bias)), z.float())


def above(x: Tensor, weights: Weights, floor: Tensor) -> Read | None:
    """The pairs of x [n, d] whose pre-activation is above the floor, [] or [F]; None where those are many."""
    tokens, latents, excesses, done = [], [], [], 0
    for z in products(x, weights.encoder, (weights.bias - floor).detach(), weights.precision):
        token, latent, excess = positive(z)
        if len(excess) > DENSE_SHARE * z.numel():
            return None
        tokens.append(token + done)
        latents.append(latent)
        excesses.append(excess)
        done += len(z)
    pairs = Pairs(torch.cat(tokens), torch.cat(latents), len(x), len(weights.bias))
    z = torch.cat(excesses).float() + (pairs.of_latents(floor) if floor.ndim else floor)
    return read(x, weights, pairs, z.detach())


def positives(x: Tensor, weights: Weights, floor: Tensor | None = None) -> Read:
    """The pairs of x [n, d] whose pre-activation is above the floor [F] (none: 0); all pairs where those are many."""
    found = above(x, weights, weights.bias.new_zeros(()) if floor is None else floor)
    return dense(x, weights) if found is None else found


def dense(x: Tensor, weights: Weights) -> Read:
    """All pre-activations [n, F]."""
    z = functional.linear(*(t.to(weights.precision) for t in (x, weights.encoder, weights.bias)))
    return Read(z.float(), Dense(len(x), len(weights.bias), weights.precision))


def read(x: Tensor, weights: Weights, pairs: Pairs, z: Tensor) -> Read:
    """z [m], the pre-activations of pairs as a product gave them, made differentiable."""
    taught: Tensor = _Encode.apply(x, weights.encoder, weights.bias, pairs, z)  # type: ignore[no-untyped-call]
    return Read(taught, pairs)


@torch.no_grad()
def products(x: Tensor, encoder: Tensor, bias: Tensor, precision: torch.dtype) -> Iterator[Tensor]:
    """Pre-activations [c, F] of inputs [n, d], some tokens at a time."""
    encoder, bias = encoder.to(precision), bias.to(precision)
    size = len(x) if x.is_cuda else max(1, CHUNK_BYTES // (len(bias) * encoder.element_size()))
    for part in x.to(precision).split(size):
        yield functional.linear(part, encoder, bias)


def top(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of z [c, F], and where; exact among the positive ones.

    They lie in the k blocks with the largest maxima, so only k * SPAN values are sorted.
    """
    latents = z.shape[1]
    blocks = latents // SPAN
    if latents % SPAN or k * SPAN * 2 > latents:
        values, index = z.topk(k, dim=1, sorted=False)
        return values, index
    members = ordered(z).unflatten(1, (SPAN, blocks))
    best = members.amax(1).topk(k, dim=1, sorted=False).indices
    bits, at = members.gather(2, best[:, None, :].expand(-1, SPAN, -1)).flatten(1).topk(k, dim=1, sorted=False)
    return bits.view(z.dtype), at // k * blocks + best.gather(1, at % k)


def positive(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and values of what is above 0 in z [c, F], row by row."""
    latents = z.shape[1]
    if latents % SPAN:
        row, column = (z > 0).nonzero(as_tuple=True)
        return row, column, z[row, column]
    members = z.unflatten(1, (SPAN, -1))
    row, block = (ordered(members).amax(1) > 0).nonzero(as_tuple=True)
    values = members[row, :, block]
    which, at = (values > 0).nonzero(as_tuple=True)
    return row[which], at * members.shape[2] + block[which], values[which, at]


def ordered(z: Tensor) -> Tensor:
    """z as integers, in the same order where above 0.

    Positive floats are ordered as their bits are, and a CPU compares integers several times faster than bfloat16.
    """
    return z.view(torch.int16 if z.element_size() == 2 else torch.int32)


def starts(group: Tensor, groups: int) -> Tensor:
    """Where the members of each group would begin [groups] if the group numbers [m] were sorted."""
    count = torch.bincount(group, minlength=groups)
    return count.cumsum(0) - count


class _Encode(torch.autograd.Function):
    """z of pairs. Gradients: of the encoder, rows of x summed for each latent; of x, rows of the encoder."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, encoder: Tensor, _: Tensor, pairs: Pairs, z: Tensor) -> Tensor:
        ctx.pairs = pairs
        ctx.save_for_backward(x, encoder)
        return z.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x, encoder), pairs = ctx.saved_tensors, ctx.pairs
        order, start = pairs.by_latent
        of_x = row_sums(encoder, pairs.latent, pairs.start, g) if ctx.needs_input_grad[0] else None
        of_encoder = row_sums(x, pairs.token[order], start, g[order])
        return of_x, of_encoder, pairs.totals(g).to(g.dtype), None, None


class _Decode(torch.autograd.Function):
    """Sums of decoder rows. Gradients: of values, dot products; of the decoder, rows of them summed for each latent.

    A row's gradient is sum_t f_t g_t, so its radial part is sum_t f_t (g_t . row): the dot products are there already.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, decoder: Tensor, pairs: Pairs, unit: bool) -> Tensor:
        ctx.pairs, ctx.unit = pairs, unit
        ctx.save_for_backward(values, decoder)
        return row_sums(decoder, pairs.latent, pairs.start, values)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (values, decoder), pairs = ctx.saved_tensors, ctx.pairs
        of_values = row_dots(g, decoder, pairs.token, pairs.latent, pairs.start)
        if not ctx.needs_input_grad[1]:
            return of_values, None, None, None
        order, start = pairs.by_latent
        of_decoder = row_sums(g, pairs.token[order], start, values[order])
        if ctx.unit:
            of_decoder.addcmul_(pairs.totals(values * of_values).to(g.dtype)[:, None], decoder, value=-1)
        return of_values, of_decoder, None, None


class _Tangent(torch.autograd.Function):
    """Unit rows as they are; of their gradient, what is not along them."""

    @staticmethod
    def forward(ctx: Any, decoder: Tensor) -> Tensor:
        ctx.save_for_backward(decoder)
        return decoder.view_as(decoder)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (decoder,) = ctx.saved_tensors
        return g - torch.einsum("fd,fd->f", g, decoder)[:, None] * decoder
