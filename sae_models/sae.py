"""The canonical inference form of every SAE and transcoder.

Readers of formats and trainable architectures convert to this form once. They fold the pre-encoder bias and constant
input scales into the weights; a normalisation that depends on the token remains as `Normalisation`, and a choice among
latents as `Selection`:

    h = (x - mean) * gain                         (without a normalisation: h = x)
    z = h . encoder + bias
    f = z where z > threshold and the selection includes the latent, else 0
    y = (f . decoder + decoder_bias) / gain + mean + x . skip
"""

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass, replace
from enum import StrEnum
from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

# Latents per block when half-precision weights are converted to float32: bounds the memory of the conversion.
BLOCK = 1024
LAYER_NORM_EPSILON = 1e-5


class Normalisation(StrEnum):
    """Normalisation of each token's input over its width d, inverted on the output.

    CONSTANT_NORM scales the input to norm sqrt(d). LAYER_NORM subtracts the mean and divides by (unbiased standard
    deviation + epsilon), as OpenAI's sparse_autoencoder and SAELens' `layer_norm` do with epsilon 1e-5.
    """

    NONE = "none"
    CONSTANT_NORM = "constant_norm"
    LAYER_NORM = "layer_norm"


@dataclass(frozen=True)
class TopK:
    """Select the k largest z of a token (arXiv 2406.04093)."""

    k: int


@dataclass(frozen=True)
class GroupMax:
    """Select the largest z of each of k consecutive groups of F / k latents (EleutherAI sparsify)."""

    k: int


@dataclass(frozen=True)
class AdaptiveK:
    """Select the k(c) largest z of a token, where c = x . probe + offset, clipped to [0, scale], is its complexity
    (arXiv 2508.17320).

    k(c) = round(k_min + sigmoid(steepness * (c / scale - 1/2)) * (k_max - k_min)); probe [d], offset [].
    """

    probe: Tensor
    offset: Tensor
    k_min: int
    k_max: int
    steepness: float = 6.0
    scale: float = 10.0

    def count(self, x: Tensor) -> Tensor:
        """Return k [...] for inputs x [..., d]."""
        c = (x.float() @ self.probe + self.offset).clamp(0.0, self.scale) / self.scale
        return (self.k_min + torch.sigmoid(self.steepness * (c - 0.5)) * (self.k_max - self.k_min)).round()


Selection = TopK | GroupMax | AdaptiveK


@dataclass(frozen=True)
class Router:
    """Choose one of L sites to read for each token (RouteSAE, arXiv 2503.08200); weight [L, d].

    p = softmax(weight . pooled), where `pooled` is the sum, or with `mean` the mean, of the standardised x over sites.
    The SAE reads p_max * x, standardised, at the most likely site.
    """

    weight: Tensor
    mean: bool = False

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (site [...], p_max [...]) for standardised inputs x [..., L, d]."""
        pooled = x.mean(-2) if self.mean else x.sum(-2)
        p, site = (pooled @ self.weight.T).softmax(-1).max(-1)
        return site, p


class Rows(NamedTuple):
    """Rows of n latents as a bank holds them, float32: encoder [n, d], bias [n], threshold [n], decoder [n, d_out].

    z = gain * (x . encoder) + bias, with the encoder centred where the normalisation subtracts the mean. Each row is
    exact by itself: f = z where z > threshold, else 0.
    """

    encoder: Tensor
    bias: Tensor
    threshold: Tensor
    decoder: Tensor


class Candidates(NamedTuple):
    """Rows of an SAE with a selection or a router: f depends on all F latents, so each row alone gives a candidate."""

    rows: Rows


@dataclass(frozen=True)
class SAE:
    """encoder [F, d], bias [F], threshold [F], decoder [F, d_out], decoder_bias [d_out], skip [d, d_out].

    ReLU has threshold 0, JumpReLU (arXiv 2407.14435) one threshold per latent, BatchTopK (arXiv 2412.06410) at
    inference one threshold for all latents; Gated (arXiv 2404.16014) folds to JumpReLU. Thresholds are not negative.
    encoder and decoder may be bfloat16 or float16 and memory-mapped; all arithmetic is float32. A transcoder has its
    own d_out, and `skip` where its output has a linear part. `partial` marks one layer of a cross-layer transcoder:
    its latents also write to other layers, so this decoder alone reconstructs nothing.
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
        """Number of latents, F."""
        return self.encoder.shape[0]

    @property
    def width(self) -> int:
        """Width of the inputs, d."""
        return self.encoder.shape[1]

    @property
    def exact(self) -> bool:
        """Whether a latent's activation depends on its own row alone."""
        return self.selection is None and self.router is None

    def encode(self, x: Tensor) -> Tensor:
        """Return activations [..., F] of inputs x [..., d], with a router [..., L, d], in float32."""
        x, h = self.encoder_input(x)
        f = jump_relu(self.preactivations(h), self.threshold)
        return f if self.selection is None else select(self.selection, f, x)

    def encoder_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x at the site that is read [..., d], and the encoder's input h [..., d], both float32."""
        x = x.float()
        if self.router is None:
            return x, normalise(x, self.normalisation, self.epsilon)
        h = normalise(x, self.normalisation, self.epsilon)
        site, p = self.router.route(h)
        at = site[..., None, None].expand(*site.shape, 1, x.shape[-1])
        return x.gather(-2, at).squeeze(-2), p[..., None] * h.gather(-2, at).squeeze(-2)

    def preactivations(self, h: Tensor) -> Tensor:
        """Return z [..., F] of encoder inputs h [..., d]."""
        if self.encoder.dtype == torch.float32:
            return h @ self.encoder.T + self.bias
        z = h.new_empty(*h.shape[:-1], self.latents)
        for rows, encoder in blocks(self.encoder, h.requires_grad):
            z[..., rows] = h @ encoder.T
        z += self.bias
        return z

    def decode(self, latents: Tensor, x: Tensor | None = None) -> Tensor:
        """Return the output y [..., d_out] of activations [..., F].

        A normalisation or a skip connection also needs the input x [..., d]. ValueError: x is missing, or the SAE is
        partial.
        """
        if self.partial:
            raise ValueError(
                "decode: the latents write to other layers too, what they write to one reconstructs nothing"
            )
        if self.decoder.dtype == torch.float32:
            y = latents @ self.decoder + self.decoder_bias
        else:
            y = self.decoder_bias + self._decode_rows(latents)
        if x is None:
            if self.normalisation is not Normalisation.NONE or self.skip is not None:
                raise ValueError("decode: x is needed to undo the normalisation or for the skip connection")
            return y
        x = x.float()
        y = denormalise(y, x, self.normalisation)
        return y if self.skip is None else y + x @ self.skip.float()

    def _decode_rows(self, latents: Tensor) -> Tensor:
        """Return latents . decoder [..., d_out] for a half-precision decoder; convert only the rows in use."""
        everything = torch.arange(self.latents, device=latents.device)
        used = everything if latents.requires_grad else latents.flatten(0, -2).any(0).nonzero()[:, 0]
        parts = (latents[..., rows] @ self.decoder[rows].float() for rows in used.split(BLOCK))
        return sum(parts, torch.zeros_like(self.decoder_bias))

    def forward(self, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the output y for x, and the error target - y.

        The target is x itself, or for a transcoder `target`; with a router, x [..., L, d], it is x at the routed site.
        """
        if self.router is None:
            y = self.decode(self.encode(x), x)
            return y, (x if target is None else target).float() - y
        h = normalise(x.float(), self.normalisation, self.epsilon)
        read, _ = self.encoder_input(x)
        _, p = self.router.route(h)
        scaled = replace(self, router=None, normalisation=Normalisation.NONE).decode(self.encode(x)) / p[..., None]
        y = denormalise(scaled, read, self.normalisation)
        return y, read - y

    def rows(self, latents: Tensor) -> Rows | Candidates:
        """Return the rows of the latents with indices [n]."""
        encoder = self.encoder[latents].float()
        if self.normalisation is Normalisation.LAYER_NORM:
            encoder = encoder - encoder.mean(1, keepdim=True)
        rows = Rows(encoder, self.bias[latents], self.threshold[latents], self.decoder[latents].float())
        return rows if self.exact else Candidates(rows)

    def exact_rows(self, latents: Tensor) -> Rows:
        """Return `rows`; ValueError unless the SAE is exact."""
        rows = self.rows(latents)
        if isinstance(rows, Candidates):
            raise ValueError("rows: the selection makes every activation depend on all latents")
        return rows

    def to(self, device: torch.device) -> "SAE":
        """Return a copy on a device."""
        return map_tensors(self, lambda tensor: tensor.to(device))


def blocks(matrix: Tensor, fresh: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, block) over a matrix: BLOCK rows at a time, converted to float32.

    A block is valid until the next one, because all share one buffer: allocating memory costs more than converting.
    With `fresh` each block has its own memory, as autograd needs.
    """
    buffer = torch.empty_like(matrix[:BLOCK], dtype=torch.float32)
    for start in range(0, len(matrix), BLOCK):
        block = matrix[start : start + BLOCK]
        memory = torch.empty_like(buffer) if fresh else buffer
        yield slice(start, start + len(block)), memory[: len(block)].copy_(block)


def row_norms(matrix: Tensor) -> Tensor:
    """Return the norm of each row of a matrix, float32."""
    return torch.cat([block.norm(dim=1) for _, block in blocks(matrix)])


def map_tensors(sae: SAE, function: Callable[[Tensor], Tensor]) -> SAE:
    """Return a copy with `function` applied to every tensor."""
    selection, router = sae.selection, sae.router
    if isinstance(selection, AdaptiveK):
        selection = replace(selection, probe=function(selection.probe), offset=function(selection.offset))
    return replace(
        sae,
        encoder=function(sae.encoder),
        bias=function(sae.bias),
        threshold=function(sae.threshold),
        decoder=function(sae.decoder),
        decoder_bias=function(sae.decoder_bias),
        selection=selection,
        skip=None if sae.skip is None else function(sae.skip),
        router=replace(router, weight=function(router.weight)) if router else None,
    )


def activations(
    x: Tensor, rows: Rows, gain: Tensor | None = None, product: Callable[[Tensor, Tensor], Tensor] = torch.matmul
) -> Tensor:
    """Return activations [..., n] of rows on inputs x [..., d]; gain [..., n] of each row's normalisation, None: 1."""
    u = product(x.float(), rows.encoder.T)
    return jump_relu((u if gain is None else u * gain) + rows.bias, rows.threshold)


def jump_relu(z: Tensor, threshold: Tensor) -> Tensor:
    """Return z [..., n] where it exceeds its threshold [n], else 0. Strictly, as in every published format.

    NaN stays NaN: whoever reads an activation must not take what cannot be read for a row that is not active.
    """
    return torch.where(z <= threshold, 0.0, z)


def gain(x: Tensor, normalisation: Normalisation, epsilon: float = LAYER_NORM_EPSILON) -> Tensor:
    """Return the factor [..., 1] by which a normalisation multiplies inputs x [..., d]."""
    match normalisation:
        case Normalisation.NONE:
            return x.new_ones(())
        case Normalisation.CONSTANT_NORM:
            norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            return sqrt(x.shape[-1]) / norm
        case Normalisation.LAYER_NORM:
            return 1 / (x.std(dim=-1, keepdim=True) + epsilon)


def centre(x: Tensor, normalisation: Normalisation) -> Tensor:
    """Return the offset [..., 1] that a normalisation subtracts from inputs x [..., d]."""
    return x.mean(-1, keepdim=True) if normalisation is Normalisation.LAYER_NORM else x.new_zeros(())


def normalise(x: Tensor, normalisation: Normalisation, epsilon: float = LAYER_NORM_EPSILON) -> Tensor:
    """Return the encoder's input h [..., d] for inputs x [..., d]."""
    if normalisation is Normalisation.NONE:
        return x
    h: Tensor = (x - centre(x, normalisation)) * gain(x, normalisation, epsilon)
    return h


def denormalise(y: Tensor, x: Tensor, normalisation: Normalisation) -> Tensor:
    """Return outputs y [..., d_out] in the units of the inputs x [..., d]; ignores the epsilon of LAYER_NORM."""
    if normalisation is Normalisation.LAYER_NORM:
        return y * x.std(dim=-1, keepdim=True) + centre(x, normalisation)
    return y / gain(x, normalisation)


def select(selection: Selection, f: Tensor, x: Tensor) -> Tensor:
    """Return f [..., F] where the selection includes the latent, else 0; x [..., d] are the inputs."""
    if isinstance(selection, GroupMax):
        groups = f.unflatten(-1, (selection.k, -1))
        values, index = groups.max(-1, keepdim=True)
        return torch.zeros_like(groups).scatter_(-1, index, values).flatten(-2)
    max_k = selection.k if isinstance(selection, TopK) else selection.k_max
    values, index = f.topk(min(max_k, f.shape[-1]), dim=-1)
    if isinstance(selection, AdaptiveK):
        rank = torch.arange(values.shape[-1], device=f.device)
        values = torch.where(rank < selection.count(x)[..., None], values, 0.0)
    return torch.zeros_like(f).scatter_(-1, index, values)
