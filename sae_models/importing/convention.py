"""Determine from real text which convention an SAE was trained with.

A checkpoint seldom says whether its encoder expects the decoder bias subtracted, whether activations have a threshold,
how inputs are normalised, and from which side of a layer it reads and writes. A wrong guess gives plausible numbers.
Each variant here differs from the declared SAE in one such point or, where none of them fits, in two. The right one
reconstructs the text with the claimed L0 and FVU.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import log, sqrt
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from rudder.sae_models import fidelity
from rudder.sae_models.bundle.bundle import confirms
from rudder.sae_models.fidelity import Fidelity
from rudder.sae_models.sae import SAE, Normalisation, TopK

DECLARED = "as declared"
THRESHOLD_TOKENS = 128
# Inputs whose mean norm is within a tenth of sqrt(d), in logarithms, count as scaled.
SCALED = 0.1
# Without claimed figures, the declared convention stands unless another has an FVU lower by this factor.
MARGIN = 1.25
# Pairs of changes start from this many of the best single changes, and use fewer tokens, because pairs are many.
PAIRED, PAIR_TOKENS = 3, 512
NORMALISATIONS = {
    Normalisation.NONE: "do not normalise the input",
    Normalisation.CONSTANT_NORM: "normalise each token to norm sqrt(d)",
    Normalisation.LAYER_NORM: "normalise each token to mean 0 and variance 1",
}


# Name, cure and SAE of each variant.
Changes = Iterator[tuple[str, str, SAE]]


class Claims(NamedTuple):
    """Figures that the author of the SAE claims; None where not given."""

    l0: float | None
    fvu: float | None


@dataclass(frozen=True)
class Variant:
    """One way to read an SAE: it reads `scale` times the input at `sites` and reconstructs `output`, which is one of
    them unless the SAE is a transcoder.

    `cure`: how to convert the declared SAE to this variant; `kind`: the point in which the two differ.
    """

    name: str
    cure: str
    sae: SAE
    sites: tuple[str, ...]
    output: str
    scale: float = 1.0
    kind: str = ""

    @property
    def transcodes(self) -> bool:
        """Whether the SAE reconstructs another site than it reads."""
        return self.output not in self.sites


@dataclass(frozen=True)
class VariantFit:
    """Figures of a variant on text, and its misfit: their distance from the claims, 0 for a perfect match."""

    name: str
    cure: str
    l0: float
    fvu: float
    misfit: float


@dataclass(frozen=True)
class Comparison:
    """The fits of all variants, best first, and whether the declared convention stands; it is then the first."""

    fits: tuple[VariantFit, ...]
    stands: bool

    @property
    def declared(self) -> VariantFit:
        """The fit of the SAE as declared."""
        return next(fit for fit in self.fits if fit.name == DECLARED)


def compare(
    sae: SAE, sites: tuple[str, ...], output: str, residuals: Mapping[str, Tensor], claims: Claims
) -> Comparison:
    """Compare an SAE with its variants on the vectors [n, d] of each site.

    `residuals` also holds the neighbouring sites at which the SAE may belong. The declared convention stands if it
    confirms the claims and, where no FVU is claimed, no other variant has a much lower FVU.
    """
    plain = Variant(DECLARED, "", sae, sites, output)
    candidates = [plain, *variants(plain, residuals, claims)]
    measured = measure_variants(candidates, residuals)
    declared_l0 = measured[0].l0
    fits = [fit_of(*pair, claims, declared_l0) for pair in zip(candidates, measured, strict=True)]
    if not any(confirms_claims(fit, claims) for fit in fits):
        fewer = {site: x[:PAIR_TOKENS] for site, x in residuals.items()}
        doubles = list(pairs(candidates, fits, fewer, claims))
        measured = measure_variants(doubles, fewer)
        fits += [fit_of(*pair, claims, declared_l0) for pair in zip(doubles, measured, strict=True)]
    declared, *others = fits
    others.sort(key=lambda fit: fit.misfit)
    rivalled = claims.fvu is None and declared.misfit > others[0].misfit + log(MARGIN)
    if confirms_claims(declared, claims) and not rivalled:
        return Comparison((declared, *others), True)
    return Comparison(tuple(sorted(fits, key=lambda fit: fit.misfit)), False)


def measure_variants(candidates: Sequence[Variant], residuals: Mapping[str, Tensor]) -> list[Fidelity]:
    """Measure L0 and FVU of each variant."""
    progress = tqdm(candidates, unit="reading", desc="conventions")
    return [fidelity.measure(variant.sae, *inputs(variant, residuals)) for variant in progress]


def fit_of(variant: Variant, measured: Fidelity, claims: Claims, declared_l0: float) -> VariantFit:
    """Return the fit of a variant; see `misfit` for `declared_l0`."""
    l0, fvu = measured.l0, measured.fvu
    return VariantFit(variant.name, variant.cure, l0, fvu, misfit(l0, fvu, claims, declared_l0))


def inputs(variant: Variant, residuals: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return a variant's inputs [n, d], with a router [n, L, d], and the target [n, d_out] of a transcoder.

    The input's scale does not change the FVU of an SAE that reconstructs its input: error and variance scale alike.
    """
    at = [residuals[site] for site in variant.sites]
    x = torch.stack(at, dim=-2) if variant.sae.router else at[0]
    return x * variant.scale, residuals[variant.output] if variant.transcodes else None


def confirms_claims(fit: VariantFit, claims: Claims) -> bool:
    """Return whether the figures agree with the claims."""
    return confirms(fit.l0, claims.l0) and confirms(fit.fvu, claims.fvu) and fit.fvu < 1


def pairs(
    candidates: list[Variant], fits: list[VariantFit], residuals: Mapping[str, Tensor], claims: Claims
) -> Iterator[Variant]:
    """Yield variants that differ in two points, the first of which is one of the best single changes."""
    ranked = sorted(zip(fits[1:], candidates[1:], strict=True), key=lambda pair: pair[0].misfit)
    seen = set()
    for _, first in ranked[:PAIRED]:
        for second in variants(first, residuals, claims):
            both = frozenset((first.name, second.name))
            if second.kind != first.kind and both not in seen:
                seen.add(both)
                names = f"{first.name}, {second.name}", f"{first.cure}; {second.cure}"
                yield replace(second, name=names[0], cure=names[1])


def misfit(l0: float, fvu: float, claims: Claims, declared_l0: float) -> float:
    """Return the distance of figures from the claims in logarithms.

    Without a claimed FVU, a lower FVU is better. Without a claimed L0, more latents than `declared_l0`, the L0 of the
    SAE as declared, cost: more latents reduce the FVU under any convention.
    """
    denser = log(max(l0, 1e-3) / max(declared_l0 if claims.l0 is None else claims.l0, 1e-3))
    sparse = max(0.0, denser) if claims.l0 is None else abs(denser)
    unexplained = log(min(max(fvu, 1e-6), 1e6))
    return sparse + (unexplained if claims.fvu is None else abs(unexplained - log(max(claims.fvu, 1e-6))))


def variants(of: Variant, residuals: Mapping[str, Tensor], claims: Claims) -> Iterator[Variant]:
    """Yield all variants that differ from one in one point."""
    x, _ = inputs(of, residuals)
    for change in (_pre_bias, _selection, _normalisation, _skip, _router):
        for name, cure, sae in change(of.sae, x, claims.l0):
            yield replace(of, name=name, cure=cure, sae=sae, kind=change.__name__)
    yield from _moved(of, residuals)
    yield from _scaled(of, x)


def _pre_bias(sae: SAE, _: Tensor, __: float | None) -> Changes:
    """Subtract the decoder bias before the encoder, bias - encoder . decoder_bias, or undo that."""
    shift = sae.preactivations(sae.decoder_bias[None])[0] - sae.bias
    if float(shift.abs().max()) == 0:
        return
    subtracted, added = replace(sae, bias=sae.bias - shift), replace(sae, bias=sae.bias + shift)
    yield "pre-bias", "subtract the decoder bias before the encoder (fold it into the bias)", subtracted
    yield "no pre-bias", "do not subtract the decoder bias before the encoder (it is folded in and must not be)", added


def _selection(sae: SAE, x: Tensor, l0: float | None) -> Changes:
    """Drop selection or thresholds; fit one threshold to the claimed L0; select the top k for it."""
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
    """Return the one threshold for all latents that gives this L0 on inputs [n, d]; 0 if ReLU gives less."""
    z = torch.cat([sae.preactivations(sae.encoder_input(part)[1]) for part, _ in fidelity.chunks(sae, x)]).flatten()
    return max(0.0, float(z.kthvalue(len(z) - min(round(l0 * len(x)), len(z) - 1)).values))


def _normalisation(sae: SAE, _: Tensor, __: float | None) -> Changes:
    for normalisation, cure in NORMALISATIONS.items():
        if normalisation != sae.normalisation:
            yield f"normalisation {normalisation}", cure, replace(sae, normalisation=normalisation)


def _skip(sae: SAE, _: Tensor, __: float | None) -> Changes:
    if sae.skip is not None:
        yield "no skip", "leave the skip connection out", replace(sae, skip=None)
        yield "skip transposed", "transpose the skip connection", replace(sae, skip=sae.skip.T)


def _router(sae: SAE, _: Tensor, __: float | None) -> Changes:
    if sae.router is not None:
        other = "sum" if sae.router.mean else "mean"
        router = replace(sae.router, mean=not sae.router.mean)
        yield f"router of the {other}", f"route by the {other} over the sites", replace(sae, router=router)


def _moved(of: Variant, residuals: Mapping[str, Tensor]) -> Iterator[Variant]:
    """Shift the sites that the SAE reads, the site that it reconstructs, or both, by one layer."""
    for by in (-1, 1):
        sites, output = tuple(shift_layer(site, by) for site in of.sites), shift_layer(of.output, by)
        names, declared = ", ".join(sites), ", ".join(of.sites)
        at = replace(of, name=f"at {names}", cure=f"read {names} instead of {declared}", sites=sites, kind="_moved")
        if of.transcodes:
            explaining = replace(of, output=output, kind="_moved", name=f"explaining {output}")
            both = replace(at, output=output, name=f"from {names} to {output}")
            shifted = [
                at,
                replace(explaining, cure=f"it explains {output} instead of {of.output}"),
                replace(both, cure=f"{at.cure}, and it explains {output} instead of {of.output}"),
            ]
        else:
            shifted = [replace(at, output=output)]
        yield from (variant for variant in shifted if residuals.keys() >= {*variant.sites, variant.output})


def shift_layer(site: str, by: int) -> str:
    """Return the same hook point `by` layers later; for the embedding, or before layer 0, a name that no site has."""
    layer = re.fullmatch(r"layers\.(\d+)\.(\w+)", site)
    return f"layers.{int(layer[1]) + by}.{layer[2]}" if layer else ""


def _scaled(of: Variant, x: Tensor) -> Iterator[Variant]:
    """Fold in the constant that scales inputs to mean norm sqrt(d), or take a folded one out."""
    if of.transcodes or of.sae.router or of.scale != 1 or of.sae.normalisation is not Normalisation.NONE:
        return
    scale = sqrt(x.shape[1]) / float(x.norm(dim=1).mean())
    if abs(log(scale)) < SCALED:
        return
    cures = f"multiply the input by {scale:.4g} (norm sqrt(d)): fold it in", "take a folded input scale out again"
    yield replace(of, name="input scaled", cure=cures[0], scale=scale, kind="_scaled")
    back = replace(of, name="input not scaled", scale=1 / scale, kind="_scaled")
    yield replace(back, cure=f"{cures[1]}: multiply it by {1 / scale:.4g}")
