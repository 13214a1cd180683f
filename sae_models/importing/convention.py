"""Which convention an SAE was trained with, told by what fits real text.

A checkpoint seldom says whether its encoder wants the decoder bias subtracted, whether activations have a threshold,
how inputs are normalised, and from which side of a layer it reads and writes. A wrong guess gives plausible numbers.
Each variant here differs from the declared SAE in one such point, or where none of them fits, in two; the one that
explains the text with as many latents as claimed is right.
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
from rudder.sae_models.bundle.bundle import near
from rudder.sae_models.fidelity import Fidelity
from rudder.sae_models.sae import SAE, Normalisation, TopK

DECLARED = "as declared"
THRESHOLD_TOKENS = 128
# Inputs whose norm is within a tenth of sqrt(d) are as good as scaled.
SCALED = 0.1
# Without figures to compare with, the declared convention stands unless another leaves so much less unexplained.
MARGIN = 1.25
# Of how many of the best single ones pairs are tried, where none fits, and on how many tokens: there are many pairs.
PAIRED, PAIR_TOKENS = 3, 512
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
    """One reading of an SAE: it sees `scale` times the input at `sites`, and explains `output`, which is among them but
    for a transcoder. `cure` says how to get from the declared one to it; `kind` is the point in which they differ.
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
        """Whether it explains another site than it reads."""
        return self.output not in self.sites


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


def verdict(sae: SAE, sites: tuple[str, ...], output: str, residuals: Mapping[str, Tensor], claims: Claims) -> Verdict:
    """Compares an SAE with its variants, on the vectors [n, d] of each site; those where the SAE may belong are among
    the sites.

    The declared one stands if its figures are those claimed and, where no FVU is claimed, no other explains much more.
    """
    plain = Variant(DECLARED, "", sae, sites, output)
    tried = [plain, *variants(plain, residuals, claims)]
    found = figures(tried, residuals)
    usual = found[0].l0
    fits = [fit_of(*one, claims, usual) for one in zip(tried, found, strict=True)]
    if not any(fitting(fit, claims) for fit in fits):
        some = {site: x[:PAIR_TOKENS] for site, x in residuals.items()}
        more = list(pairs(tried, fits, some, claims))
        fits += [fit_of(*one, claims, usual) for one in zip(more, figures(more, some), strict=True)]
    declared, *others = fits
    others.sort(key=lambda fit: fit.misfit)
    rivalled = claims.fvu is None and declared.misfit > others[0].misfit + log(MARGIN)
    if fitting(declared, claims) and not rivalled:
        return Verdict((declared, *others), True)
    return Verdict(tuple(sorted(fits, key=lambda fit: fit.misfit)), False)


def figures(tried: Sequence[Variant], residuals: Mapping[str, Tensor]) -> list[Fidelity]:
    """How sparse and how faithful each variant is."""
    seen = tqdm(tried, unit="reading", desc="conventions")
    return [fidelity.measured(variant.sae, *inputs(variant, residuals)) for variant in seen]


def fit_of(variant: Variant, found: Fidelity, claims: Claims, usual: float) -> Fit:
    """What a variant's figures say of it; see `misfit` for `usual`."""
    return Fit(variant.name, variant.cure, found.l0, found.fvu, misfit(found.l0, found.fvu, claims, usual))


def inputs(variant: Variant, residuals: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """What a variant reads, [n, d] or with a router [n, L, d], and of a transcoder what it explains.

    Error and variance scale alike, so the input's scale does not change the FVU of what explains its input.
    """
    at = [residuals[site] for site in variant.sites]
    x = torch.stack(at, dim=-2) if variant.sae.router else at[0]
    return x * variant.scale, residuals[variant.output] if variant.transcodes else None


def fitting(fit: Fit, claims: Claims) -> bool:
    """Whether figures are those claimed."""
    return near(fit.l0, claims.l0) and near(fit.fvu, claims.fvu) and fit.fvu < 1


def pairs(tried: list[Variant], fits: list[Fit], residuals: Mapping[str, Tensor], claims: Claims) -> Iterator[Variant]:
    """Those that differ in two points, one of them that of one of the best single ones."""
    ranked = sorted(zip(fits[1:], tried[1:], strict=True), key=lambda one: one[0].misfit)
    seen = set()
    for _, first in ranked[:PAIRED]:
        for second in variants(first, residuals, claims):
            both = frozenset((first.name, second.name))
            if second.kind != first.kind and both not in seen:
                seen.add(both)
                names = f"{first.name}, {second.name}", f"{first.cure}; {second.cure}"
                yield replace(second, name=names[0], cure=names[1])


def misfit(l0: float, fvu: float, claims: Claims, usual: float) -> float:
    """Distance from the claims in logarithms.

    Where no FVU is claimed, the less is unexplained the better; where no L0 is, more latents than `usual` cost, since
    they alone explain more.
    """
    denser = log(max(l0, 1e-3) / max(usual if claims.l0 is None else claims.l0, 1e-3))
    sparse = max(0.0, denser) if claims.l0 is None else abs(denser)
    unexplained = log(min(max(fvu, 1e-6), 1e6))
    return sparse + (unexplained if claims.fvu is None else abs(unexplained - log(max(claims.fvu, 1e-6))))


def variants(of: Variant, residuals: Mapping[str, Tensor], claims: Claims) -> Iterator[Variant]:
    """All that differ from one reading in one point."""
    x, _ = inputs(of, residuals)
    for make in (_pre_bias, _selected, _normalised, _skipped, _routed):
        for name, cure, sae in make(of.sae, x, claims.l0):
            yield replace(of, name=name, cure=cure, sae=sae, kind=make.__name__)
    yield from _moved(of, residuals)
    yield from _scaled(of, x)


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


def _skipped(sae: SAE, _: Tensor, __: float | None) -> Changed:
    if sae.skip is not None:
        yield "no skip", "leave the skip connection out", replace(sae, skip=None)
        yield "skip transposed", "transpose the skip connection", replace(sae, skip=sae.skip.T)


def _routed(sae: SAE, _: Tensor, __: float | None) -> Changed:
    if sae.router is not None:
        other = "sum" if sae.router.mean else "mean"
        router = replace(sae.router, mean=not sae.router.mean)
        yield f"router of the {other}", f"route by the {other} over the sites", replace(sae, router=router)


def _moved(of: Variant, residuals: Mapping[str, Tensor]) -> Iterator[Variant]:
    """One layer down or up: where it reads, where it writes, both."""
    for by in (-1, 1):
        sites, output = tuple(neighbour(site, by) for site in of.sites), neighbour(of.output, by)
        told, was = ", ".join(sites), ", ".join(of.sites)
        at = replace(of, name=f"at {told}", cure=f"read {told} instead of {was}", sites=sites, kind="_moved")
        if of.transcodes:
            explaining = replace(of, output=output, kind="_moved", name=f"explaining {output}")
            both = replace(at, output=output, name=f"from {told} to {output}")
            found = [
                at,
                replace(explaining, cure=f"it explains {output} instead of {of.output}"),
                replace(both, cure=f"{at.cure}, and it explains {output} instead of {of.output}"),
            ]
        else:
            found = [replace(at, output=output)]
        yield from (one for one in found if residuals.keys() >= {*one.sites, one.output})


def neighbour(site: str, by: int) -> str:
    """The same point so many layers on; of the embedding, and before the first layer, no site's name."""
    layer = re.fullmatch(r"layers\.(\d+)\.(\w+)", site)
    return f"layers.{int(layer[1]) + by}.{layer[2]}" if layer else ""


def _scaled(of: Variant, x: Tensor) -> Iterator[Variant]:
    """A dataset scalar that brings inputs to norm sqrt(d): not folded in, or folded in where it must not be."""
    if of.transcodes or of.sae.router or of.scale != 1 or of.sae.normalisation is not Normalisation.NONE:
        return
    scale = sqrt(x.shape[1]) / float(x.norm(dim=1).mean())
    if abs(log(scale)) < SCALED:
        return
    cures = f"multiply the input by {scale:.4g} (norm sqrt(d)): fold it in", "take a folded input scale out again"
    yield replace(of, name="input scaled", cure=cures[0], scale=scale, kind="_scaled")
    back = replace(of, name="input not scaled", scale=1 / scale, kind="_scaled")
    yield replace(back, cure=f"{cures[1]}: multiply it by {1 / scale:.4g}")
