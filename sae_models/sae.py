"""The canonical inference form of every SAE and transcoder.

Formats and trainable variants are converted to this form once. Pre-encoder bias and constant input scales are folded
in; a normalisation that depends on the token stays, as `Normalisation`; a choice among latents stays, as `Selection`:

    h = (x - mean) * gain                         (without a normalisation: h = x)
    z = h . encoder + bias
    f = z where z > threshold, and the selection keeps it, else 0
    y = (f . decoder + decoder_bias) / gain + mean + x . skip
"""

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, replace
from enum import StrEnum
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

# Latents at a time whose weights are converted to float32: bounds the memory of their conversion.
BLOCK = 1024
LAYER_NORM_EPSILON = 1e-5


class Normalisation(StrEnum):
    """Of each token's input over its width d, undone on the output.

    CONSTANT_NORM gives it norm sqrt(d). LAYER_NORM takes off its mean and divides by (unbiased standard deviation +
    epsilon), as OpenAI's sparse_autoencoder and SAELens' `layer_norm` do, whose epsilon is 1e-5.
    """

    NONE = "none"
    CONSTANT_NORM = "constant_norm"
    LAYER_NORM = "layer_norm"


@dataclass(frozen=True)
class TopK:
    """Keeps the k largest z of a token (arXiv 2406.04093)."""

    k: int


@dataclass(frozen=True)
class GroupMax:
    """Keeps the largest z of each of k consecutive groups of F / k latents (EleutherAI sparsify)."""

    k: int


@dataclass(frozen=True)
class AdaptiveK:
    """Keeps the k(c) largest z of a token, c = x . probe + offset its complexity, cut to [0, scale] (arXiv 2508.17320).

    k(c) = round(k_min + sigmoid(steepness * (c / scale - 1/2)) * (k_max - k_min)); probe [d], offset [].
    """

    probe: Tensor
    offset: Tensor
    k_min: int
    k_max: int
    steepness: float = 6.0
    scale: float = 10.0

    def count(self, x: Tensor) -> Tensor:
        """k [...] of inputs x [..., d]."""
        c = (x.float() @ self.probe + self.offset).clamp(0.0, self.scale) / self.scale
        return (self.k_min + torch.sigmoid(self.steepness * (c - 0.5)) * (self.k_max - self.k_min)).round()


Selection = TopK | GroupMax | AdaptiveK


@dataclass(frozen=True)
class Router:
    """Chooses for each token one of L sites to read (RouteSAE, arXiv 2503.08200); weight [L, d].

    p = softmax(weight . sum over sites of the standardised x), or of their mean; the SAE reads p_max * x at the most
    likely site, standardised.
    """

    weight: Tensor
    mean: bool = False

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(site [...], p_max [...]) of inputs x [..., L, d], already standardised."""
        pooled = x.mean(-2) if self.mean else x.sum(-2)
        p, site = (pooled @ self.weight.T).softmax(-1).max(-1)
        return site, p


class Rows(NamedTuple):
    """Some latents, as a bank holds them, float32: encoder [n, d], bias [n], threshold [n], decoder [n, d_out].

    z = gain * (x . encoder) + bias: the encoder is centred where the normalisation takes off the mean. A row is exact
    by itself: f = z where z > threshold, else 0.
    """

    encoder: Tensor
    bias: Tensor
    threshold: Tensor
    decoder: Tensor


class Candidates(NamedTuple):
    """Rows of an SAE with a selection or a router: f needs all F latents, so what a row says alone is a candidate."""

    rows: Rows


@dataclass(frozen=True)
class SAE:
    """encoder [F, d], bias [F], threshold [F], decoder [F, d_out], decoder_bias [d_out], skip [d, d_out].

    ReLU is threshold 0, JumpReLU (arXiv 2407.14435) a threshold per latent, BatchTopK (arXiv 2412.06410) at inference
    one threshold for all; Gated (arXiv 2404.16014) folds to JumpReLU. Thresholds are not negative. encoder and decoder
    may be bfloat16 and memory-mapped; all arithmetic is in float32. A transcoder has d_out of its own, and `skip` where
    the output has a linear part. With `partial`, as in one layer of a cross-layer transcoder, the latents write to
    other layers too: the decoder is their part at one, which reconstructs nothing.
    """

    encoder: Tensor
    bias: Tensor
    threshold: Tensor
    decoder: Tensor
    decoder_bias: Tensor
    _: KW_ONLY
    normalisation: Normalisation = Normalisation.NONE
    selection: Selection | None = None
    skip: Tensor | None = None
    router: Router | None = None
    partial: bool = False
    epsilon: float = LAYER_NORM_EPSILON

    @property
    def latents(self) -> int:
        """F."""
        return self.encoder.shape[0]

    @property
    def width(self) -> int:
        """d."""
        return self.encoder.shape[1]

    @property
    def exact(self) -> bool:
        """Whether a latent's activation follows from its own row."""
        return self.selection is None and self.router is None

    def encode(self, x: Tensor) -> Tensor:
        """Activations [..., F] of inputs x [..., d], or [..., L, d] with a router, in float32."""
        x, h = self.prepared(x)
        f = above(self.preactivations(h), self.threshold)
        return f if self.selection is None else kept(self.selection, f, x)

    def prepared(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x as it is read [..., d], and the encoder's input h [..., d], both float32."""
        x = x.float()
        if self.router is None:
            return x, normalised(x, self.normalisation, self.epsilon)
        h = normalised(x, self.normalisation, self.epsilon)
        site, p = self.router.route(h)
        at = site[..., None, None].expand(*site.shape, 1, x.shape[-1])
        return x.gather(-2, at).squeeze(-2), p[..., None] * h.gather(-2, at).squeeze(-2)

    def preactivations(self, h: Tensor) -> Tensor:
        """z [..., F] of encoder inputs h [..., d]."""
        if self.encoder.dtype == torch.float32:
            return h @ self.encoder.T + self.bias
        z = h.new_empty(*h.shape[:-1], self.latents)
        for rows, encoder in blocks(self.encoder, h.requires_grad):
            z[..., rows] = h @ encoder.T
        z += self.bias
        return z

    def decode(self, latents: Tensor, x: Tensor | None = None) -> Tensor:
        """Output y [..., d_out] of activations [..., F]; x [..., d], the input, where a normalisation is to be undone
        or a skip connection adds to the output. ValueError: it is partial.
        """
        if self.partial:
            raise ValueError(
                "decode: the latents write to other layers too, what they write to one reconstructs nothing"
            )
        if self.decoder.dtype == torch.float32:
            y = latents @ self.decoder + self.decoder_bias
        else:
            y = self.decoder_bias + self.explained(latents)
        if x is None:
            if self.normalisation is not Normalisation.NONE or self.skip is not None:
                raise ValueError("decode: x is needed to undo the normalisation or for the skip connection")
            return y
        x = x.float()
        y = restored(y, x, self.normalisation)
        return y if self.skip is None else y + x @ self.skip.float()

    def explained(self, latents: Tensor) -> Tensor:
        """latents . decoder [..., d_out] of a decoder in half precision, of which only rows in use are converted."""
        everything = torch.arange(self.latents, device=latents.device)
        used = everything if latents.requires_grad else latents.flatten(0, -2).any(0).nonzero()[:, 0]
        parts = (latents[..., rows] @ self.decoder[rows].float() for rows in used.split(BLOCK))
        return sum(parts, torch.zeros_like(self.decoder_bias))

    def forward(self, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output y for x, and the error: target - y. The target is x itself but for a transcoder; with a router,
        x [..., L, d], it is x at the routed site.
        """
        if self.router is None:
            y = self.decode(self.encode(x), x)
            return y, (x if target is None else target).float() - y
        h = normalised(x.float(), self.normalisation, self.epsilon)
        read, _ = self.prepared(x)
        _, p = self.router.route(h)
        scaled = replace(self, router=None, normalisation=Normalisation.NONE).decode(self.encode(x)) / p[..., None]
        y = restored(scaled, read, self.normalisation)
        return y, read - y

    def rows(self, latents: Tensor) -> Rows | Candidates:
        """The rows of the latents with indices [n]."""
        encoder = self.encoder[latents].float()
        if self.normalisation is Normalisation.LAYER_NORM:
            encoder = encoder - encoder.mean(1, keepdim=True)
        rows = Rows(encoder, self.bias[latents], self.threshold[latents], self.decoder[latents].float())
        return rows if self.exact else Candidates(rows)

    def exact_rows(self, latents: Tensor) -> Rows:
        """`rows` of an SAE whose rows are exact; ValueError of any other."""
        rows = self.rows(latents)
        if isinstance(rows, Candidates):
            raise ValueError("rows: the selection makes every activation depend on all latents")
        return rows

    def to(self, device: torch.device) -> "SAE":
        """The same on a device."""
        return moved(self, lambda tensor: tensor.to(device))


def blocks(matrix: Tensor, kept: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a matrix some at a time, and those in float32, good until the next are asked for, or `kept`.

    They share one buffer, since fresh memory costs more than the conversion; a gradient needs each to stay.
    """
    buffer = torch.empty_like(matrix[:BLOCK], dtype=torch.float32)
    for start in range(0, len(matrix), BLOCK):
        block = matrix[start : start + BLOCK]
        room = torch.empty_like(buffer) if kept else buffer
        yield slice(start, start + len(block)), room[: len(block)].copy_(block)


def row_norms(matrix: Tensor) -> Tensor:
    """||row|| of a matrix, float32."""
    return torch.cat([block.norm(dim=1) for _, block in blocks(matrix)])


def moved(sae: SAE, move: Callable[[Tensor], Tensor]) -> SAE:
    """A copy with `move` applied to every tensor."""
    selection, router = sae.selection, sae.router
    if isinstance(selection, AdaptiveK):
        selection = replace(selection, probe=move(selection.probe), offset=move(selection.offset))
    return replace(
        sae,
        encoder=move(sae.encoder),
        bias=move(sae.bias),
        threshold=move(sae.threshold),
        decoder=move(sae.decoder),
        decoder_bias=move(sae.decoder_bias),
        selection=selection,
        skip=None if sae.skip is None else move(sae.skip),
        router=replace(router, weight=move(router.weight)) if router else None,
    )


def activations(
    x: Tensor, rows: Rows, gain: Tensor | None = None, product: Callable[[Tensor, Tensor], Tensor] = torch.matmul
) -> Tensor:
    """Activations [..., n] of rows on inputs x [..., d]; gain [..., n] of each row's normalisation, None: 1."""
    u = product(x.float(), rows.encoder.T)
    return above((u if gain is None else u * gain) + rows.bias, rows.threshold)


def above(z: Tensor, threshold: Tensor) -> Tensor:
    """z [..., n] where above its threshold [n], else 0. The test is strict, as in every published format."""
    return torch.where(z > threshold, z, 0.0)


def gain(x: Tensor, normalisation: Normalisation, epsilon: float = LAYER_NORM_EPSILON) -> Tensor:
    """What a normalisation multiplies inputs x [..., d] by, [..., 1]."""
    match normalisation:
        case Normalisation.NONE:
            return x.new_ones(())
        case Normalisation.CONSTANT_NORM:
            norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            return sqrt(x.shape[-1]) / norm
        case Normalisation.LAYER_NORM:
            return 1 / (x.std(dim=-1, keepdim=True) + epsilon)


def centre(x: Tensor, normalisation: Normalisation) -> Tensor:
    """What a normalisation takes off inputs x [..., d], [..., 1]."""
    return x.mean(-1, keepdim=True) if normalisation is Normalisation.LAYER_NORM else x.new_zeros(())


def normalised(x: Tensor, normalisation: Normalisation, epsilon: float = LAYER_NORM_EPSILON) -> Tensor:
    """The encoder's input of inputs x [..., d]."""
    if normalisation is Normalisation.NONE:
        return x
    h: Tensor = (x - centre(x, normalisation)) * gain(x, normalisation, epsilon)
    return h


def restored(y: Tensor, x: Tensor, normalisation: Normalisation) -> Tensor:
    """Outputs y [..., d_out] for normalised inputs, in the units of x [..., d]; LAYER_NORM's epsilon is not undone."""
    if normalisation is Normalisation.LAYER_NORM:
        return y * x.std(dim=-1, keepdim=True) + centre(x, normalisation)
    return y / gain(x, normalisation)


def kept(selection: Selection, f: Tensor, x: Tensor) -> Tensor:
    """f [..., F] where the selection keeps it, else 0; x [..., d] the inputs."""
    if isinstance(selection, GroupMax):
        groups = f.unflatten(-1, (selection.k, -1))
        values, index = groups.max(-1, keepdim=True)
        return torch.zeros_like(groups).scatter_(-1, index, values).flatten(-2)
    most = selection.k if isinstance(selection, TopK) else selection.k_max
    values, index = f.topk(min(most, f.shape[-1]), dim=-1)
    if isinstance(selection, AdaptiveK):
        rank = torch.arange(values.shape[-1], device=f.device)
        values = torch.where(rank < selection.count(x)[..., None], values, 0.0)
    return torch.zeros_like(f).scatter_(-1, index, values)


def fvu(target: Tensor, output: Tensor) -> float:
    """Fraction of variance unexplained over tokens [n, d]: squared error over squared distance from the mean."""
    target = target.double()
    return float((target - output).square().sum() / (target - target.mean(0)).square().sum())


def l0(latents: Tensor) -> float:
    """Mean number of active latents a token, of activations [..., F]."""
    return float((latents != 0).sum(-1).double().mean())
