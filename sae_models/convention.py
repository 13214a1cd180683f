"""Which convention an SAE was trained with, told by what fits real text.

A checkpoint seldom says whether its encoder wants the decoder bias subtracted, whether activations have a threshold,
how inputs are normalised, and from which side of a layer it reads. A wrong guess gives plausible numbers. Each variant
here differs from the declared SAE in one such point; the one that explains the text with as many latents as claimed is
right.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import log, sqrt
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from sae_models import fidelity
from sae_models.bundle import near
from sae_models.sae import SAE, Normalisation, TopK

DECLARED = "as declared"
THRESHOLD_TOKENS = 128
# Inputs whose norm is within a tenth of sqrt(d) are as good as scaled.
SCALED = 0.1
# Without figures to compare with, the declared convention stands unless another leaves so much less unexplained.
MARGIN = 1.25
NORMALISATIONS = {
    Normalisation.NONE: "do not normalise the input",
    Normalisation.CONSTANT_NORM: "normalise each token to norm sqrt(d)",
    Normalisation.LAYER_NORM: "normalise each token to mean 0 and variance 1",
}


# Name and cure of a variant, and what the SAE is in it.
Changed = Iterator[tuple[str, str, SAE]]


class Claims(NamedTuple):
    """What the SAE's maker says of it; None where nothing."""

    l0: float | None
    fvu: float | None


@dataclass(frozen=True)
class Variant:
    """One reading of an SAE: it sees `scale` times the input, at `site`. `cure` says how to get from the declared one
    to it."""

    name: str
    cure: str
    sae: SAE
    site: str
    scale: float = 1.0


@dataclass(frozen=True)
class Fit:
    """How a variant does on text, and how far that is from the claims; 0 is perfect."""

    name: str
    cure: str
    l0: float
    fvu: float
    misfit: float


@dataclass(frozen=True)
class Verdict:
    """All variants, best first, and whether the declared one stands; it is then the first."""

    fits: tuple[Fit, ...]
    stands: bool

    @property
    def declared(self) -> Fit:
        """The SAE as it is declared."""
        return next(fit for fit in self.fits if fit.name == DECLARED)


def verdict(sae: SAE, site: str, residuals: Mapping[str, Tensor], claims: Claims) -> Verdict:
    """Compares an SAE that explains what it reads, at `site`, with its variants, on the inputs [n, d] of each site.

    The declared one stands if its figures are those claimed and, where no FVU is claimed, no other explains much more.
    """
    tried = tqdm(list(variants(sae, site, residuals, claims)), unit="reading", desc="conventions")
    # Error and variance scale alike, so the input's scale does not change the FVU.
    found = [fidelity.measured(variant.sae, residuals[variant.site] * variant.scale) for variant in tried]
    usual = found[0].l0
    fits = [
        Fit(variant.name, variant.cure, sums.l0, sums.fvu, misfit(sums.l0, sums.fvu, claims, usual))
        for variant, sums in zip(tried, found, strict=True)
    ]
    declared, *others = fits
    others.sort(key=lambda fit: fit.misfit)
    as_claimed = near(declared.l0, claims.l0) and near(declared.fvu, claims.fvu)
    rivalled = claims.fvu is None and declared.misfit > others[0].misfit + log(MARGIN)
    if as_claimed and not rivalled and declared.fvu < 1:
        return Verdict((declared, *others), True)
    return Verdict(tuple(sorted(fits, key=lambda fit: fit.misfit)), False)


def misfit(l0: float, fvu: float, claims: Claims, usual: float) -> float:
    """Distance from the claims in logarithms.

    Where no FVU is claimed, the less is unexplained the better; where no L0 is, more latents than `usual` cost, since
    they alone explain more.
    """
    denser = log(max(l0, 1e-3) / max(usual if claims.l0 is None else claims.l0, 1e-3))
    sparse = max(0.0, denser) if claims.l0 is None else abs(denser)
    unexplained = log(min(max(fvu, 1e-6), 1e6))
    return sparse + (unexplained if claims.fvu is None else abs(unexplained - log(max(claims.fvu, 1e-6))))


def variants(sae: SAE, site: str, residuals: Mapping[str, Tensor], claims: Claims) -> Iterator[Variant]:
    """The declared reading first, then all that differ from it in one point."""
    yield Variant(DECLARED, "", sae, site)
    for make in (_pre_bias, _selected, _normalised):
        for name, cure, changed in make(sae, residuals[site], claims.l0):
            yield Variant(name, cure, changed, site)
    for other in residuals:
        if other != site:
            yield Variant(f"at {other}", f"read {other} instead of {site}", sae, other)
    yield from _scaled(sae, site, residuals[site])


def _pre_bias(sae: SAE, _: Tensor, __: float | None) -> Changed:
    """The decoder bias subtracted before the encoder, or not: bias - encoder . decoder_bias, or the reverse."""
    shift = sae.preactivations(sae.decoder_bias[None])[0] - sae.bias
    if float(shift.abs().max()) == 0:
        return
    subtracted, added = replace(sae, bias=sae.bias - shift), replace(sae, bias=sae.bias + shift)
    yield "pre-bias", "subtract the decoder bias before the encoder (fold it into the bias)", subtracted
    yield "no pre-bias", "do not subtract the decoder bias before the encoder (it is folded in and must not be)", added


def _selected(sae: SAE, x: Tensor, l0: float | None) -> Changed:
    """Thresholds dropped, one found for the claimed L0, or a top-k of it."""
    none = torch.zeros_like(sae.threshold)
    if sae.selection is not None:
        yield "no selection", "activations are ReLU: keep all above 0", replace(sae, selection=None)
    elif bool(sae.threshold.any()):
        yield "no threshold", "activations are ReLU: drop the threshold", replace(sae, threshold=none)
    if l0 is None or not 1 <= l0 < sae.latents:
        return
    level = threshold_for(sae, x[:THRESHOLD_TOKENS], l0)
    if level > 0:
        cut = replace(sae, selection=None, threshold=none + level)
        yield "threshold", f"give the latents their thresholds: one of {level:.4g} for all gives the claimed L0", cut
    k = round(l0)
    if sae.selection != TopK(k):
        yield f"top {k}", f"keep the {k} largest latents of each token", replace(sae, threshold=none, selection=TopK(k))


def threshold_for(sae: SAE, x: Tensor, l0: float) -> float:
    """The one threshold that leaves so many latents active on inputs [n, d]; 0 where ReLU leaves fewer."""
    z = torch.cat([sae.preactivations(sae.prepared(part)[1]) for part, _ in fidelity.chunks(sae, x, None)]).flatten()
    return max(0.0, float(z.kthvalue(len(z) - min(round(l0 * len(x)), len(z) - 1)).values))


def _normalised(sae: SAE, _: Tensor, __: float | None) -> Changed:
    for normalisation, cure in NORMALISATIONS.items():
        if normalisation != sae.normalisation:
            yield f"normalisation {normalisation}", cure, replace(sae, normalisation=normalisation)


def _scaled(sae: SAE, site: str, x: Tensor) -> Iterator[Variant]:
    """A dataset scalar that brings inputs to norm sqrt(d): not folded in, or folded in where it must not be."""
    scale = sqrt(x.shape[1]) / float(x.norm(dim=1).mean())
    if sae.normalisation is not Normalisation.NONE or abs(log(scale)) < SCALED:
        return
    yield Variant("input scaled", f"multiply the input by {scale:.4g} (norm sqrt(d)): fold it in", sae, site, scale)
    back = 1 / scale
    yield Variant(
        "input not scaled", f"take a folded input scale out again: multiply it by {back:.4g}", sae, site, back
    )
