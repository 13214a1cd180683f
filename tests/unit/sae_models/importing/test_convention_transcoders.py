"""Figures identify transcoders and routed SAEs that are read with the wrong convention, and name the cure."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rudder.sae_models import fidelity
from rudder.sae_models import sae as canonical
from rudder.sae_models.importing import convention
from rudder.sae_models.importing.convention import Claims, Comparison
from rudder.sae_models.sae import SAE, Normalisation, Router, TopK
from tests.unit import tiny

MLP = tuple(f"layers.{layer}.{point}" for layer in (1, 2, 3) for point in ("mlp_in", "mlp_out"))
POST = tuple(f"layers.{layer}.resid_post" for layer in range(4))
READ, WRITTEN = "layers.2.mlp_in", "layers.2.mlp_out"
ROUTED = POST[1:3]
TOKENS, LATENTS, K = 512, 160, 12


@pytest.fixture(scope="module")
def at() -> dict[str, Tensor]:
    """Return vectors of real text at all sites."""
    return tiny.real_vectors((*MLP, *POST), TOKENS)


def directions(h: Tensor, share: float) -> SAE:
    """Return random latents, each active on that share of inputs h [n, d], with a zero decoder."""
    g = torch.Generator().manual_seed(0)
    encoder = torch.nn.functional.normalize(torch.randn(LATENTS, h.shape[1], generator=g), dim=1)
    bias = -(h @ encoder.T).quantile(1 - 2 * share, dim=0)
    blank = SAE(encoder, bias, torch.zeros(LATENTS), torch.zeros_like(encoder), torch.zeros(h.shape[1]))
    # The threshold then cuts half of the active latents.
    return replace(blank, threshold=blank.encode(h).quantile(1 - share, dim=0))


def explaining(columns: Tensor, target: Tensor) -> Tensor:
    """Return weights [c + 1, d] of the least-squares fit of a target [n, d] by columns [n, c] and a constant."""
    design = torch.cat([columns, torch.ones(len(columns), 1)], 1).double()
    ridge = 1e-3 * torch.eye(design.shape[1]).double()
    solved: Tensor = torch.linalg.solve(design.T @ design + ridge, design.T @ target.double())
    return solved.float()


@pytest.fixture(scope="module")
def transcoder(at: dict[str, Tensor]) -> SAE:
    """Return a transcoder fitted to an MLP."""
    sae = directions(at[READ], 0.15)
    weights = explaining(torch.cat([sae.encode(at[READ]), at[READ]], 1), at[WRITTEN])
    decoder, skip, bias = weights.split((LATENTS, len(weights) - LATENTS - 1, 1))
    return replace(sae, decoder=decoder.contiguous(), skip=skip.contiguous(), decoder_bias=bias[0])


@pytest.fixture(scope="module")
def skipless(at: dict[str, Tensor]) -> SAE:
    """Return a transcoder fitted without a skip connection."""
    sae = directions(at[READ], 0.15)
    weights = explaining(sae.encode(at[READ]), at[WRITTEN])
    return replace(sae, decoder=weights[:-1].contiguous(), decoder_bias=weights[-1])


@pytest.fixture(scope="module")
def routed(at: dict[str, Tensor]) -> SAE:
    return reading(ROUTED, at)


def reading(sites: tuple[str, ...], at: dict[str, Tensor]) -> SAE:
    """Return a routed SAE fitted to the inputs that its router chooses."""
    x = torch.stack([at[site] for site in sites], -2)
    h = canonical.normalise(x, Normalisation.LAYER_NORM)
    router = Router(0.05 * torch.randn(len(sites), x.shape[-1], generator=torch.Generator().manual_seed(1)))
    site, p = router.route(h)
    read = p[:, None] * h[torch.arange(len(x)), site]
    sae = replace(directions(read, 0.4), threshold=torch.zeros(LATENTS), selection=TopK(K))
    sae = replace(sae, normalisation=Normalisation.LAYER_NORM, router=router)
    weights = explaining(sae.encode(x), read)
    return replace(sae, decoder=weights[:-1].contiguous(), decoder_bias=weights[-1])


def claims(sae: SAE, x: Tensor, target: Tensor | None = None) -> Claims:
    """Return the figures of the true SAE."""
    measured = fidelity.measure(sae, x, target)
    assert measured.fvu < 0.7
    return Claims(measured.l0, measured.fvu)


def assert_best(result: Comparison, cure: str) -> None:
    """Assert that this variant fits best, and that the declared one does not stand."""
    table = "\n".join(f"{fit.misfit:6.2f} {fit.l0:8.1f} {fit.fvu:8.4f} {fit.name}" for fit in result.fits[:8])
    assert not result.stands, table
    assert result.fits[0].name == cure, table


def shifted(sae: SAE, sign: int) -> SAE:
    """Subtract the decoder bias before the encoder once more (-1) or once less (1)."""
    return replace(sae, bias=sae.bias + sign * (sae.encoder @ sae.decoder_bias))


def test_true_conventions_stand(at: dict[str, Tensor], transcoder: SAE, routed: SAE) -> None:
    known = claims(transcoder, at[READ], at[WRITTEN])
    assert convention.compare(transcoder, (READ,), WRITTEN, at, known).stands
    x = torch.stack([at[site] for site in ROUTED], -2)
    assert convention.compare(routed, ROUTED, ROUTED[0], at, claims(routed, x)).stands


@pytest.mark.parametrize(
    ("read", "written", "cure"),
    [
        ("layers.1.mlp_in", WRITTEN, f"at {READ}"),
        ("layers.3.mlp_in", WRITTEN, f"at {READ}"),
        (READ, "layers.1.mlp_out", f"explaining {WRITTEN}"),
        (READ, "layers.3.mlp_out", f"explaining {WRITTEN}"),
        ("layers.1.mlp_in", "layers.1.mlp_out", f"from {READ} to {WRITTEN}"),
        ("layers.3.mlp_in", "layers.3.mlp_out", f"from {READ} to {WRITTEN}"),
    ],
)
def test_comparison_names_the_layer_of_a_transcoder(
    read: str, written: str, cure: str, at: dict[str, Tensor], transcoder: SAE
) -> None:
    known = claims(transcoder, at[READ], at[WRITTEN])
    assert_best(convention.compare(transcoder, (read,), written, at, known), cure)


@pytest.mark.parametrize(
    ("change", "cure"),
    [
        (lambda s: replace(s, threshold=torch.zeros_like(s.threshold)), "threshold"),
        (lambda s: replace(s, skip=s.skip.T), "skip transposed"),
        (lambda s: replace(s, normalisation=Normalisation.CONSTANT_NORM), "normalisation none"),
    ],
)
def test_comparison_names_the_convention_of_a_transcoder(
    change: Callable[[SAE], SAE], cure: str, at: dict[str, Tensor], transcoder: SAE
) -> None:
    # One threshold for all latents, because the comparison fits only one.
    true = replace(transcoder, threshold=transcoder.threshold.mean().expand(LATENTS).clone())
    known = claims(true, at[READ], at[WRITTEN])
    assert_best(convention.compare(change(true), (READ,), WRITTEN, at, known), cure)


@pytest.mark.parametrize(("sign", "cure"), [(1, "pre-bias"), (-1, "no pre-bias")])
def test_comparison_names_the_pre_bias_of_a_transcoder(
    sign: int, cure: str, at: dict[str, Tensor], skipless: SAE
) -> None:
    # In larger units, so that the bias matters to inputs of this norm.
    large = at | {site: 60 * at[site] for site in MLP if site.endswith("mlp_out")}
    true = replace(skipless, decoder=60 * skipless.decoder, decoder_bias=60 * skipless.decoder_bias)
    known = claims(true, large[READ], large[WRITTEN])
    assert_best(convention.compare(shifted(true, sign), (READ,), WRITTEN, large, known), cure)


def test_comparison_names_a_spurious_skip_connection(at: dict[str, Tensor], skipless: SAE) -> None:
    known = claims(skipless, at[READ], at[WRITTEN])
    skip = torch.eye(192) * at[WRITTEN].std() / at[READ].std()
    assert_best(convention.compare(replace(skipless, skip=skip), (READ,), WRITTEN, at, known), "no skip")


def test_comparison_names_spurious_thresholds(at: dict[str, Tensor], transcoder: SAE) -> None:
    relu = replace(transcoder, threshold=torch.zeros(LATENTS))
    weights = explaining(torch.cat([relu.encode(at[READ]), at[READ]], 1), at[WRITTEN])
    relu = replace(relu, decoder=weights[:LATENTS], skip=weights[LATENTS:-1], decoder_bias=weights[-1])
    known = claims(relu, at[READ], at[WRITTEN])
    assert_best(
        convention.compare(replace(relu, threshold=transcoder.threshold), (READ,), WRITTEN, at, known), "no threshold"
    )


@pytest.mark.parametrize("sites", [POST[0:2], POST[2:4]])
def test_comparison_names_the_layers_of_a_routed_sae(
    sites: tuple[str, ...], at: dict[str, Tensor], routed: SAE
) -> None:
    known = claims(routed, torch.stack([at[site] for site in ROUTED], -2))
    assert_best(convention.compare(routed, sites, sites[0], at, known), f"at {', '.join(ROUTED)}")


@pytest.mark.parametrize(
    ("change", "cure"),
    [
        (lambda s: replace(s, normalisation=Normalisation.NONE), "normalisation layer_norm"),
        (lambda s: replace(s, selection=None), f"top {K}"),
    ],
)
def test_comparison_names_the_convention_of_a_routed_sae(
    change: Callable[[SAE], SAE], cure: str, at: dict[str, Tensor], routed: SAE
) -> None:
    known = claims(routed, torch.stack([at[site] for site in ROUTED], -2))
    assert_best(convention.compare(change(routed), ROUTED, ROUTED[0], at, known), cure)


def test_comparison_names_the_pooling_of_a_router(at: dict[str, Tensor]) -> None:
    summing = reading(POST, at)
    assert summing.router is not None
    averaging = replace(summing, router=replace(summing.router, mean=True))
    known = claims(summing, torch.stack([at[site] for site in POST], -2))
    assert_best(convention.compare(averaging, POST, POST[0], at, known), "router of the sum")
