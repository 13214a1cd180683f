"""Exact top-k latents per token over a whole dictionary, at about half the cost of a full encode.

Screening: a bfloat16 product with an error bound selects candidates, so that no latent of the exact top-k is missed.
The few candidates are computed in float32.
"""

from dataclasses import dataclass
from math import inf

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from rudder.sae_models.sae import SAE, blocks, row_norms

# A bfloat16 product accumulates in float32, with an error below ACCUMULATION_ERROR times the norms of its factors. The
# result is then rounded to bfloat16, with a relative error of up to 2^-8; ROUNDING_ERROR leaves a margin of 3 %.
ACCUMULATION_ERROR, ROUNDING_ERROR = 2**-11, 1.03 * 2**-8

Latents = NDArray[np.int32]
Values = NDArray[np.float32]


@dataclass(frozen=True)
class ScreeningDictionary:
    """An SAE without a selection, the norm [F] of its encoder vectors, their directions [F, d] in bfloat16, the largest
    norm `rounding` [] by which bfloat16 moved a direction, and the `cutoff` [F] that a product with a direction must
    exceed.
    """

    sae: SAE
    norm: Tensor
    directions: Tensor
    rounding: Tensor
    cutoff: Tensor


def prepare_screening(sae: SAE) -> ScreeningDictionary | SAE:
    """Prepare an SAE for `top_k_latents`; this takes half the memory of its encoder in float32. An SAE with a selection
    is returned as it is and encoded in full, because nearly all of its latents would be candidates.
    """
    if sae.selection is not None:
        return sae
    norm = row_norms(sae.encoder).clamp_min(1e-30)
    directions = torch.empty_like(sae.encoder, dtype=torch.bfloat16)
    rounding = norm.new_zeros(())
    for rows, encoder in blocks(sae.encoder):
        exact = encoder / norm[rows, None]
        directions[rows] = exact
        rounding = torch.maximum(rounding, (exact - directions[rows].float()).norm(dim=1).max())
    cutoff = (activation_floor(sae) - sae.bias) / norm
    return ScreeningDictionary(sae, norm, directions, rounding, cutoff - ROUNDING_ERROR * cutoff.abs())


def activation_floor(sae: SAE) -> Tensor:
    """Return the pre-activation [F] above which a latent is active: its threshold, or 0 if that is negative."""
    return sae.threshold.clamp_min(0.0)


def top_k_latents(dictionary: ScreeningDictionary | SAE, x: Tensor, k: int) -> tuple[Latents, Values]:
    """Return the k most active latents of each token of x [n, d], with a router [n, L, d]: indices int32 and
    activations float32, [n, k], sorted by activation; 0 beyond the active latents.
    """
    if isinstance(dictionary, SAE):
        values, latents = dictionary.encode(x).topk(min(k, dictionary.latents), dim=1)
        return pad_columns(latents.int(), k).cpu().numpy(), pad_columns(values, k).cpu().numpy()
    _, h = dictionary.sae.encoder_input(x)
    token, latent = candidates(dictionary, h, k)
    sae = dictionary.sae
    z = (h[token] * sae.encoder[latent].float()).sum(1) + sae.bias[latent]
    active = z > activation_floor(sae)[latent]
    token, latent, z = token[active], latent[active], z[active]
    order, rank = rank_within_tokens(token, z)
    selected, ranks = order[rank < k], rank[rank < k]
    tokens = token[selected]
    latents, values = x.new_zeros(len(h), k, dtype=torch.int32), x.new_zeros(len(h), k, dtype=torch.float32)
    latents[tokens, ranks], values[tokens, ranks] = latent[selected].int(), z[selected]
    return latents.cpu().numpy(), values.cpu().numpy()


def pad_columns(columns: Tensor, k: int) -> Tensor:
    """Pad columns [n, m] with zeros to [n, k]."""
    return functional.pad(columns, (0, k - columns.shape[1]))


def candidates(dictionary: ScreeningDictionary, h: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (token, latent) pairs [m] that may be among the top k of encoder inputs h [n, d].

    A latent is a candidate if the upper bound of its pre-activation reaches the kth largest lower bound among the
    latents of its token that are certainly active.
    """
    rounded = h.bfloat16()
    approximate = rounded @ dictionary.directions.T
    slack = product_error_bound(h, rounded.float(), dictionary.rounding)
    token, latent = (approximate > dictionary.cutoff - slack).nonzero(as_tuple=True)
    norm, product = dictionary.norm[latent], approximate[token, latent].float()
    z, error = product * norm + dictionary.sae.bias[latent], (slack[token, 0] + ROUNDING_ERROR * product.abs()) * norm
    certain = z - error > activation_floor(dictionary.sae)[latent]
    lower_bound, certain_token = (z - error)[certain], token[certain]
    order, rank = rank_within_tokens(certain_token, lower_bound)
    kth_lower_bound = torch.full_like(slack[:, 0], -inf)
    kth_lower_bound[certain_token[order][rank == k - 1]] = lower_bound[order][rank == k - 1]
    candidate = z + error >= kth_lower_bound[token]
    return token[candidate], latent[candidate]


def product_error_bound(h: Tensor, rounded: Tensor, rounding: Tensor) -> Tensor:
    """Return [n, 1]: an upper bound on |h . v - h' . v'| over all unit directions v, where h' and v' are rounded to
    bfloat16, including float32 accumulation but not the rounding of the result.

    By Cauchy-Schwarz: the rounding of h times |v| = 1, plus the rounding of v and the accumulation error times |h'|.
    """
    input_rounding, length = (h - rounded).norm(dim=1, keepdim=True), h.norm(dim=1, keepdim=True)
    slack: Tensor = (1 + ROUNDING_ERROR) * (
        input_rounding + (rounding + ACCUMULATION_ERROR) * (length + input_rounding)
    )
    return slack


def rank_within_tokens(token: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the permutation [m] that sorts by token and descending value, and the rank of each sorted entry within its
    token.
    """
    order = value.argsort(descending=True)
    order = order[token[order].argsort(stable=True)]
    ordered = token[order]
    return order, torch.arange(len(ordered), device=token.device) - torch.searchsorted(ordered, ordered)
