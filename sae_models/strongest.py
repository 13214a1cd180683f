"""The strongest latents of a token out of a whole dictionary, exactly, at half the price of a full encode.

A product in bfloat16 screens the dictionary: its error has a bound, so no active latent is missed. Those that pass are
few, and are computed in float32.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from sae_models.sae import SAE, blocks, row_norms

# Rounding x and a unit direction to bfloat16 moves their product by less than 2^-8 ||x||, rounding the product itself
# by 2^-9 of it; a little more for the sum.
SCREEN_ERROR = 2**-8 + 2**-9 + 2**-11

Latents = NDArray[np.int32]
Values = NDArray[np.float32]


@dataclass(frozen=True)
class Screen:
    """An SAE with its encoder directions [F, d] in bfloat16 and what a unit direction must exceed, `cut` [F].

    An SAE with a selection has no screen: nearly every latent is a candidate, so it is encoded whole.
    """

    sae: SAE
    directions: Tensor | None = None
    cut: Tensor | None = None


def screen(sae: SAE) -> Screen:
    """Prepare an SAE; costs half its encoder's memory in float32."""
    if sae.selection is not None:
        return Screen(sae)
    norm = row_norms(sae.encoder).clamp_min(1e-30)
    directions = torch.empty_like(sae.encoder, dtype=torch.bfloat16)
    for rows, encoder in blocks(sae.encoder):
        directions[rows] = encoder / norm[rows, None]
    # No latent is active at or below 0: f is then 0 and says nothing.
    cut = (sae.threshold.clamp_min(0.0) - sae.bias) / norm
    return Screen(sae, directions, cut)


def strongest(screened: Screen, x: Tensor, k: int) -> tuple[Latents, Values]:
    """The k strongest latents of each token of x [n, d], with a router [n, L, d]; int32 and fp32 [n, k], 0 where fewer
    are active.
    """
    if screened.directions is None or screened.cut is None:
        values, latents = screened.sae.encode(x).topk(min(k, screened.sae.latents), dim=1)
        return padded(latents.int(), k).cpu().numpy(), padded(values, k).cpu().numpy()
    _, h = screened.sae.prepared(x)
    return screened_strongest(screened.sae, screened.directions, screened.cut, h, k)


def padded(columns: Tensor, k: int) -> Tensor:
    """[n, k] of fewer columns."""
    return functional.pad(columns, (0, k - columns.shape[1]))


def screened_strongest(sae: SAE, directions: Tensor, cut: Tensor, h: Tensor, k: int) -> tuple[Latents, Values]:
    """`strongest` of encoder inputs h [n, d]."""
    approximate = h.bfloat16() @ directions.T
    slack = SCREEN_ERROR * h.norm(dim=1, keepdim=True)
    token, latent = (approximate > cut - slack).nonzero(as_tuple=True)
    z = (h[token] * sae.encoder[latent].float()).sum(1) + sae.bias[latent]
    active = (z > sae.threshold[latent]) & (z > 0)
    token, latent, value = (t[active].cpu().numpy() for t in (token, latent, z))
    order = np.lexsort((-value, token))
    token, latent, value = token[order], latent[order], value[order]
    rank = np.arange(len(token)) - np.searchsorted(token, token)
    kept = rank < k
    latents, values = np.zeros((len(h), k), np.int32), np.zeros((len(h), k), np.float32)
    latents[token[kept], rank[kept]], values[token[kept], rank[kept]] = latent[kept], value[kept]
    return latents, values
