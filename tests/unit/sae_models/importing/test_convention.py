"""Figures on real residuals identify an SAE that is read with the wrong convention, and name the cure."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import sqrt

import pytest
import torch
from torch import Tensor

from rudder.sae_models import PRETRAINED
from rudder.sae_models.bundle import bundle as bundles
from rudder.sae_models.bundle.bundle import Bundle
from rudder.sae_models.importing import convention
from rudder.sae_models.importing.convention import DECLARED, Claims, Comparison
from rudder.sae_models.sae import SAE, Normalisation, TopK
from tests.unit import tiny

SITES = ("layers.1.resid_post", "layers.2.resid_post", "layers.3.resid_post")
SITE = SITES[1]
TOKENS = 512


@pytest.fixture(scope="module")
def shipped() -> Bundle:
    return bundles.load(PRETRAINED / "textbook-lm-layers.2")


@pytest.fixture(scope="module")
def residuals() -> dict[str, Tensor]:
    """Return vectors at the SAE's layer and its neighbours."""
    return tiny.real_vectors(SITES, TOKENS)


def claims_of(shipped: Bundle) -> Claims:
    """Return the claims of the shipped manifest."""
    return Claims(shipped.manifest.training.l0, shipped.manifest.training.fvu)


def norm(residuals: Mapping[str, Tensor]) -> float:
    """Return the mean norm at the SAE's site over sqrt(d)."""
    x = residuals[SITE]
    return float(x.norm(dim=1).mean()) / sqrt(x.shape[1])


def scaled(sae: SAE, by: float) -> SAE:
    """Return an SAE for inputs scaled by `by`, with unchanged thresholds and biases."""
    return replace(sae, encoder=sae.encoder / by, decoder=sae.decoder * by, decoder_bias=sae.decoder_bias * by)


def shifted(sae: SAE, sign: int) -> SAE:
    """Subtract the decoder bias before the encoder once more (-1) or once less (1)."""
    return replace(sae, bias=sae.bias + sign * (sae.encoder @ sae.decoder_bias))


BREAKS: dict[str, tuple[Callable[[SAE, float], SAE], str]] = {
    "subtracted twice": (lambda sae, _: shifted(sae, -1), "no pre-bias"),
    "not subtracted": (lambda sae, _: shifted(sae, 1), "pre-bias"),
    "threshold dropped": (lambda sae, _: replace(sae, threshold=torch.zeros_like(sae.threshold)), "threshold"),
    "constant norm": (
        lambda sae, _: replace(sae, normalisation=Normalisation.CONSTANT_NORM),
        "normalisation none",
    ),
    "layer norm": (lambda sae, _: replace(sae, normalisation=Normalisation.LAYER_NORM), "normalisation none"),
    "scale not folded": (lambda sae, norm: scaled(sae, 1 / norm), "input scaled"),
    "scale folded twice": (lambda sae, norm: scaled(sae, norm), "input not scaled"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_comparison_names_the_cure_of_a_broken_sae(shipped: Bundle, residuals: dict[str, Tensor], broken: str) -> None:
    breaking, cure = BREAKS[broken]
    result = convention.compare(breaking(shipped.sae, norm(residuals)), (SITE,), SITE, residuals, claims_of(shipped))
    assert not result.stands
    assert result.fits[0].name == cure, table(result)


@pytest.mark.parametrize("site", [SITES[0], SITES[2]])
def test_comparison_names_a_site_off_by_one_layer(shipped: Bundle, residuals: dict[str, Tensor], site: str) -> None:
    result = convention.compare(shipped.sae, (site,), site, residuals, claims_of(shipped))
    assert result.fits[0].name == f"at {SITE}", table(result)


@pytest.mark.parametrize(
    ("true", "declared", "cure"),
    [
        (lambda s: zeroed(s), lambda s: s, "no threshold"),
        (lambda s: replace(zeroed(s), selection=TopK(32)), lambda s: zeroed(s), "top 32"),
        (lambda s: zeroed(s), lambda s: replace(zeroed(s), selection=TopK(8)), "no selection"),
        (lambda s: replace(s, normalisation=Normalisation.CONSTANT_NORM), lambda s: s, "normalisation constant_norm"),
        (lambda s: replace(s, normalisation=Normalisation.LAYER_NORM), lambda s: s, "normalisation layer_norm"),
    ],
)
def test_comparison_names_selection_and_normalisation(
    shipped: Bundle,
    residuals: dict[str, Tensor],
    true: Callable[[SAE], SAE],
    declared: Callable[[SAE], SAE],
    cure: str,
) -> None:
    unit = scaled(shipped.sae, 1 / norm(residuals)) if "normalisation" in cure else shipped.sae
    honest = convention.compare(true(unit), (SITE,), SITE, residuals, Claims(None, None)).declared
    result = convention.compare(declared(unit), (SITE,), SITE, residuals, Claims(honest.l0, honest.fvu))
    assert not result.stands
    assert result.fits[0].name == cure, table(result)


def zeroed(sae: SAE) -> SAE:
    """Return the SAE with ReLU in place of its thresholds."""
    return replace(sae, threshold=torch.zeros_like(sae.threshold))


def test_shipped_sae_stands_as_declared(shipped: Bundle, residuals: dict[str, Tensor]) -> None:
    result = convention.compare(shipped.sae, (SITE,), SITE, residuals, claims_of(shipped))
    assert result.stands
    assert result.declared.name == DECLARED


@pytest.mark.parametrize("site", [SITES[0], SITES[2]])
def test_l0_alone_identifies_a_site_off_by_one_layer(shipped: Bundle, residuals: dict[str, Tensor], site: str) -> None:
    result = convention.compare(shipped.sae, (site,), site, residuals, Claims(shipped.manifest.training.l0, None))
    assert not result.stands
    assert result.fits[0].name == f"at {SITE}", table(result)


def test_without_claims_the_lowest_fvu_wins(shipped: Bundle, residuals: dict[str, Tensor]) -> None:
    unknown = Claims(None, None)
    assert convention.compare(shipped.sae, (SITE,), SITE, residuals, unknown).stands
    result = convention.compare(shifted(shipped.sae, 1), (SITE,), SITE, residuals, unknown)
    assert not result.stands
    assert result.fits[0].name == "pre-bias", table(result)


PAIRS: dict[str, tuple[Callable[[SAE, float], SAE], set[str]]] = {
    "scale not folded, bias not subtracted": (
        lambda sae, norm: shifted(scaled(sae, 1 / norm), 1),
        {"input scaled", "pre-bias"},
    ),
    "scale folded twice, threshold dropped": (
        lambda sae, norm: zeroed(scaled(sae, norm)),
        {"input not scaled", "threshold"},
    ),
    "bias subtracted twice, layer norm": (
        lambda sae, _: replace(shifted(sae, -1), normalisation=Normalisation.LAYER_NORM),
        {"no pre-bias", "normalisation none"},
    ),
}


@pytest.mark.parametrize("broken", PAIRS)
def test_comparison_names_two_faults(shipped: Bundle, residuals: dict[str, Tensor], broken: str) -> None:
    breaking, cures = PAIRS[broken]
    result = convention.compare(breaking(shipped.sae, norm(residuals)), (SITE,), SITE, residuals, claims_of(shipped))
    assert not result.stands
    assert set(result.fits[0].name.split(", ")) == cures, table(result)
    assert result.fits[0].cure.count("; ") == 1


def test_comparison_names_a_fault_and_the_wrong_layer(shipped: Bundle, residuals: dict[str, Tensor]) -> None:
    result = convention.compare(shifted(shipped.sae, 1), (SITES[2],), SITES[2], residuals, claims_of(shipped))
    assert set(result.fits[0].name.split(", ")) == {"pre-bias", f"at {SITE}"}, table(result)


def test_pairs_are_compared_only_where_no_single_fault_fits(shipped: Bundle, residuals: dict[str, Tensor]) -> None:
    single = convention.compare(shifted(shipped.sae, 1), (SITE,), SITE, residuals, claims_of(shipped))
    assert not any("; " in fit.cure for fit in single.fits)


def table(result: Comparison) -> str:
    """Format a comparison for a failure message."""
    return "\n".join(f"{fit.misfit:6.2f} {fit.l0:8.1f} {fit.fvu:8.4f} {fit.name}" for fit in result.fits)
