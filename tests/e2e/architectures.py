"""Bundles of every architecture for the shipped model, with random weights scaled to its real activations."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rudder.sae_models import sae
from rudder.sae_models.bundle import bundle as bundles
from rudder.sae_models.bundle import catalogue
from rudder.sae_models.sae import SAE, AdaptiveK, GroupMax, Normalisation, Router, TopK

LATENTS = 64
K = 8


@dataclass(frozen=True)
class Case:
    """An architecture under test: the sites that it reads, the site that it predicts if another, and its SAE."""

    name: str
    sites: tuple[str, ...]
    sae: SAE
    output_site: str = ""


def random_sae(x: Tensor, seed: int, **parts: Any) -> SAE:
    """Build an SAE of random unit vectors, with biases such that a third of them is active on inputs x [n, d]."""
    generator = torch.Generator().manual_seed(seed)
    width = x.shape[-1]
    directions = torch.nn.functional.normalize(torch.randn(LATENTS, width, generator=generator), dim=1)
    bias = -(x @ directions.T).quantile(0.67, dim=0)
    offset = 0.1 * torch.randn(width, generator=generator)
    return SAE(directions, bias, torch.zeros(LATENTS), directions.clone(), offset, **parts)


def jump_relu(x: Tensor, seed: int) -> SAE:
    """Build an SAE with thresholds, the form of JumpReLU, BatchTopK, Matryoshka and folded Gated."""
    base = random_sae(x, seed)
    threshold = base.encode(x).quantile(0.9, dim=0).clamp_min(0.0)
    return SAE(base.encoder, base.bias, threshold, base.decoder, base.decoder_bias)


def architectures(x: Mapping[str, Tensor]) -> Iterator[Case]:
    """Build one case per architecture from inputs x [n, d] of every site."""
    post = "layers.{}.resid_post".format
    yield Case("relu", (post(0),), random_sae(x[post(0)], 0))
    yield Case("jumprelu", (post(1),), jump_relu(x[post(1)], 1))
    yield Case("topk", (post(2),), random_sae(x[post(2)], 2, selection=TopK(K)))
    yield Case("group_max", (post(3),), random_sae(x[post(3)], 3, selection=GroupMax(K)))
    probe = torch.nn.functional.normalize(x[post(4)].mean(0), dim=0)
    center = float((x[post(4)] @ probe).mean())
    adaptive = AdaptiveK(probe, torch.tensor(5.0 - center), k_min=4, k_max=24)
    yield Case("adaptive_k", (post(4),), random_sae(x[post(4)], 4, selection=adaptive))
    for name, site, kind in (
        ("layer_norm_topk", "layers.1.attn_out", Normalisation.LAYER_NORM),
        ("constant_norm_topk", "layers.2.mlp_out", Normalisation.CONSTANT_NORM),
    ):
        h = sae.normalise(x[site], kind)
        yield Case(name, (site,), random_sae(h, 5, selection=TopK(K), normalisation=kind))
    layer_norm = sae.normalise(x["layers.3.attn_out"], Normalisation.LAYER_NORM)
    yield Case("layer_norm", ("layers.3.attn_out",), random_sae(layer_norm, 6, normalisation=Normalisation.LAYER_NORM))
    width = x[post(0)].shape[-1]
    skip = 0.05 * torch.randn(width, width, generator=torch.Generator().manual_seed(7))
    transcoder = random_sae(x["layers.1.mlp_in"], 7, skip=skip)
    yield Case("skip_transcoder", ("layers.1.mlp_in",), transcoder, "layers.1.mlp_out")
    # Without an output site: `partial` alone marks it as a transcoder.
    yield Case("cross_layer", ("layers.3.mlp_in",), random_sae(x["layers.3.mlp_in"], 9, partial=True))
    routed = tuple(f"layers.{layer}.resid_pre" for layer in (1, 2, 4))
    stacked = sae.normalise(torch.stack([x[site] for site in routed], -2), Normalisation.LAYER_NORM)
    router = Router(0.3 * torch.randn(len(routed), width, generator=torch.Generator().manual_seed(8)))
    parts = {"selection": TopK(K), "normalisation": Normalisation.LAYER_NORM, "router": router}
    yield Case("route_sae", routed, random_sae(stacked.flatten(0, 1), 8, **parts))


def write(folder: Path, case: Case, model: bundles.Model, x: Tensor) -> Path:
    """Write the bundle of a case, with conformance vectors from inputs x of its sites."""
    encoded = case.sae.encode(x)
    manifest = bundles.describe(
        case.sae, name=case.name, model=model, sites=case.sites, architecture=case.name,
        training=bundles.Training(credit="random weights"), output_site=case.output_site,
    )  # fmt: skip
    flat = x.reshape(-1, x.shape[-1])
    statistics = bundles.Statistics(
        encoded.amax(0), (encoded > 0).float().mean(0), flat.mean(0), flat.norm(dim=1).mean()
    )
    draft = folder / f"{case.name}.sqlite"
    latents = (catalogue.Latent(catalogue.Summary(i, f"latent {i}", None, None), (), ()) for i in range(LATENTS))
    catalogue.write(draft, latents)
    conformance = bundles.Conformance(x, encoded[:32])
    bundles.write(folder / case.name, manifest, case.sae, statistics, conformance, draft).catalogue.close()
    return folder / case.name
