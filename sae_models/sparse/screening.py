"""The strongest latents of a token out of a whole dictionary, exactly, at half the price of a full encode.

A product in bfloat16 screens the dictionary: its error has a bound, so no latent that counts is missed. Those that
pass are few, and are computed in float32.
"""

from dataclasses import dataclass
from math import inf

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from rudder.sae_models.sae import SAE, blocks, row_norms

# A product of bfloat16 numbers is summed in float32, to less than SUM of its factors' lengths, and then rounded itself,
# by up to 2^-8 of it; RESULT leaves room.
SUM, RESULT = 2**-11, 1.03 * 2**-8

Latents = NDArray[np.int32]
Values = NDArray[np.float32]


@dataclass(frozen=True)
class Screen:
    """An SAE without a selection, its encoder rows' `norm` [F], their directions [F, d] in bfloat16, how far rounding
    has moved any of these, and what a product with a direction must exceed, `cut` [F].
    """

    sae: SAE
    norm: Tensor
    directions: Tensor
    moved: Tensor
    cut: Tensor


def screen(sae: SAE) -> Screen | SAE:
    """Prepare an SAE; costs half its encoder's memory in float32. Under a selection nearly every latent is a candidate,
    so an SAE that has one is encoded whole.
    """
    if sae.selection is not None:
        return sae
    norm = row_norms(sae.encoder).clamp_min(1e-30)
    directions = torch.empty_like(sae.encoder, dtype=torch.bfloat16)
    moved = norm.new_zeros(())
    for rows, encoder in blocks(sae.encoder):
        exact = encoder / norm[rows, None]
        directions[rows] = exact
        moved = torch.maximum(moved, (exact - directions[rows].float()).norm(dim=1).max())
    cut = (least(sae) - sae.bias) / norm
    return Screen(sae, norm, directions, moved, cut - RESULT * cut.abs())


def least(sae: SAE) -> Tensor:
    """What pre-activations must exceed [F]: at or below 0 no latent is active, f is then 0 and says nothing."""
    return sae.threshold.clamp_min(0.0)


def strongest(screened: Screen | SAE, x: Tensor, k: int) -> tuple[Latents, Values]:
    """The k strongest latents of each token of x [n, d], with a router [n, L, d]; int32 and fp32 [n, k], 0 where fewer
    are active.
    """
    if isinstance(screened, SAE):
        strong, number = screened.encode(x).topk(min(k, screened.latents), dim=1)
        return padded(number.int(), k).cpu().numpy(), padded(strong, k).cpu().numpy()
    _, h = screened.sae.encoder_input(x)
    token, latent = candidates(screened, h, k)
    sae = screened.sae
    z = (h[token] * sae.encoder[latent].float()).sum(1) + sae.bias[latent]
    active = z > least(sae)[latent]
    token, latent, z = token[active], latent[active], z[active]
    order, rank = ranked(token, z)
    chosen, ranks = order[rank < k], rank[rank < k]
    rows = token[chosen]
    latents, values = x.new_zeros(len(h), k, dtype=torch.int32), x.new_zeros(len(h), k, dtype=torch.float32)
    latents[rows, ranks], values[rows, ranks] = latent[chosen].int(), z[chosen]
    return latents.cpu().numpy(), values.cpu().numpy()


def padded(columns: Tensor, k: int) -> Tensor:
    """[n, k] of fewer columns."""
    return functional.pad(columns, (0, k - columns.shape[1]))


def candidates(screened: Screen, h: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Tokens and latents [m] that may be among the k strongest of encoder inputs h [n, d]: those that no k others of
    the same token are stronger than for certain.
    """
    rounded = h.bfloat16()
    approximate = rounded @ screened.directions.T
    slack = slack_of(h, rounded.float(), screened.moved)
    token, latent = (approximate > screened.cut - slack).nonzero(as_tuple=True)
    norm, found = screened.norm[latent], approximate[token, latent].float()
    z, error = found * norm + screened.sae.bias[latent], (slack[token, 0] + RESULT * found.abs()) * norm
    surely = z - error > least(screened.sae)[latent]
    lower, among = (z - error)[surely], token[surely]
    order, rank = ranked(among, lower)
    enough = torch.full_like(slack[:, 0], -inf)
    enough[among[order][rank == k - 1]] = lower[order][rank == k - 1]
    kept = z + error >= enough[token]
    return token[kept], latent[kept]


def slack_of(h: Tensor, rounded: Tensor, moved: Tensor) -> Tensor:
    """[n, 1]: by how much the products of h [n, d] with unit directions differ from those of what both were rounded to,
    at most and before these are rounded.
    """
    lost, length = (h - rounded).norm(dim=1, keepdim=True), h.norm(dim=1, keepdim=True)
    slack: Tensor = (1 + RESULT) * (lost + (moved + SUM) * (length + lost))
    return slack


def ranked(token: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The order [m] by token and falling value, and in it each one's rank within its token."""
    order = value.argsort(descending=True)
    order = order[token[order].argsort(stable=True)]
    ordered = token[order]
    return order, torch.arange(len(ordered), device=token.device) - torch.searchsorted(ordered, ordered)
