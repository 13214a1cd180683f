"""The schema of a bundle's manifest.json, its consistency checks, and the tensors that it implies."""

from typing import Literal

import msgspec
import torch
from torch import Tensor

from rudder.sae_models import sae
from rudder.sae_models.errors import UserError
from rudder.sae_models.hookpoints import SITE
from rudder.sae_models.sae import LAYER_NORM_EPSILON, SAE, Normalisation, Router

FORMAT_VERSION = 2
# Above the context length of any model, and above the size of any vocabulary.
MAX_CONTEXT = 1 << 24
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class BundleError(UserError):
    """A bundle that must not be served; the message begins with the field that is wrong."""


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the manifest; unknown fields are an error."""


class Model(Part, frozen=True):
    """The one model checkpoint that a bundle fits. `sha256` is `bundle.model_sha256` of its folder."""

    name: str
    sha256: str
    hidden_size: int


class Source(Part, frozen=True):
    """Origin of an imported SAE: format, file or repository (`where`), revision, and the L0 that it claims."""

    format: str
    where: str
    revision: str | None = None
    l0: float | None = None


class Training(Part, frozen=True):
    """How the SAE was trained, and its figures on held-out text; null where not measured.

    `outlier_share`: share of the tokens left out of training and measurement as attention sinks (activations/norms.py).
    """

    tokens: int | None = None
    seed: int | None = None
    l0: float | None = None
    fvu: float | None = None
    ce_recovered: float | None = None
    dead_share: float | None = None
    credit: str = ""
    outlier_share: float | None = None


class InputNormalisation(Part, frozen=True):
    """Input normalisation: the source's own word for it, what is folded into the weights, and what remains at run time.

    `assumed`: a parameter that the source declares but does not give, and the value assumed for it; empty otherwise.
    `epsilon`: of a layer norm.
    """

    declared: str = "none"
    folded: tuple[str, ...] = ()
    run_time: Normalisation = Normalisation.NONE
    assumed: str = ""
    epsilon: float = LAYER_NORM_EPSILON


class Context(Part, frozen=True):
    """The contexts that the SAE was trained on; a bundle's statistics and figures are measured on such contexts too.

    `size`: tokens of a context; null if not known. `prepend_bos`: whether each starts with BOS; null if not known.
    `excluded_positions`: positions in a context, from 0, that the SAE was not trained on. `excluded_tokens`: ids of
    tokens that it was not trained on, wherever they occur. Whoever reads with the SAE, counts its activations or edits
    by it leaves both out.
    """

    size: int | None = None
    prepend_bos: bool | None = None
    excluded_positions: tuple[int, ...] = ()
    excluded_tokens: tuple[int, ...] = ()


class Threshold(Part, frozen=True, tag_field="kind", tag="threshold"):
    """A latent is active where z exceeds its own threshold: ReLU, JumpReLU, Gated, BatchTopK at inference."""


class TopK(Part, frozen=True, tag_field="kind", tag="top_k"):
    """sae.TopK."""

    k: int


class GroupMax(Part, frozen=True, tag_field="kind", tag="group_max"):
    """sae.GroupMax."""

    k: int


class AdaptiveK(Part, frozen=True, tag_field="kind", tag="adaptive_k"):
    """sae.AdaptiveK; its probe and offset are among the weights."""

    k_min: int
    k_max: int
    steepness: float
    scale: float


Activation = Threshold | TopK | GroupMax | AdaptiveK


class Manifest(Part, frozen=True):
    """The content of manifest.json.

    `sites`: the sites that the encoder reads, more than one only with a `router`, whose value names its pooling.
    `output_site`: the site that the decoder reconstructs. `architecture`: the trainer's or source's name for it.
    `dtype`: of encoder, decoder and skip; all else is float32. `partial`: the latents also write to sites other than
    `output_site` (sae.SAE), so no FVU can be claimed. `context`: what it was trained on.
    """

    format_version: int
    name: str
    model: Model
    sites: tuple[str, ...]
    output_site: str
    architecture: str
    activation: Activation
    normalisation: InputNormalisation
    d: int
    d_out: int
    latents: int
    dtype: Literal["float32", "bfloat16", "float16"]
    skip: bool
    router: Literal["sum", "mean"] | None
    source: Source | None
    training: Training
    files: dict[str, str]
    partial: bool = False
    context: Context = Context()

    @property
    def site(self) -> str:
        """The site that the encoder reads; with a router the first."""
        return self.sites[0]

    @property
    def transcodes(self) -> bool:
        """Whether the SAE writes another site than it reads."""
        return self.output_site not in self.sites


NO_CONTEXT = Context()


class _Version(msgspec.Struct):
    format_version: int


def require(condition: bool, field: str, problem: str) -> None:
    """Raise BundleError unless the condition holds."""
    if not condition:
        raise BundleError(f"{field}: {problem}")


def describe(
    weights: SAE,
    *,
    name: str,
    model: Model,
    sites: tuple[str, ...],
    architecture: str,
    training: Training,
    output_site: str = "",
    declared: str = "none",
    folded: tuple[str, ...] = (),
    assumed: str = "",
    source: Source | None = None,
    context: Context = NO_CONTEXT,
) -> Manifest:
    """Return the manifest of an SAE without file hashes. `output_site` defaults to the first site read."""
    router = weights.router
    return Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        model=model,
        sites=sites,
        output_site=output_site or sites[0],
        architecture=architecture,
        activation=_activation(weights),
        normalisation=InputNormalisation(declared, folded, weights.normalisation, assumed, weights.epsilon),
        d=weights.width,
        d_out=weights.decoder.shape[1],
        latents=weights.latents,
        dtype=_dtype(weights),
        skip=weights.skip is not None,
        router=None if router is None else "mean" if router.mean else "sum",
        source=source,
        training=training,
        files={},
        partial=weights.partial,
        context=context,
    )


def _activation(weights: SAE) -> Activation:
    match weights.selection:
        case sae.TopK(k):
            return TopK(k)
        case sae.GroupMax(k):
            return GroupMax(k)
        case sae.AdaptiveK() as s:
            return AdaptiveK(s.k_min, s.k_max, s.steepness, s.scale)
    return Threshold()


def _dtype(weights: SAE) -> Literal["float32", "bfloat16", "float16"]:
    dtypes = {t.dtype for t in (weights.encoder, weights.decoder, weights.skip) if t is not None}
    if dtypes == {torch.bfloat16}:
        return "bfloat16"
    return "float16" if dtypes == {torch.float16} else "float32"


def parse(raw: bytes) -> Manifest:
    """Parse manifest.json. BundleError: the field that is missing, unknown, of the wrong type, or inconsistent."""
    try:
        version = msgspec.json.decode(raw, type=_Version).format_version
        require(version == FORMAT_VERSION, "format_version", f"{version}, this program reads {FORMAT_VERSION}")
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"manifest.json: {error}") from error
    _check_sites(manifest)
    _check_sizes(manifest)
    _check_context(manifest.context)
    return manifest


def _check_sites(manifest: Manifest) -> None:
    sites, router = manifest.sites, manifest.router
    for site in (*sites, manifest.output_site):
        require(site == "embed" or bool(SITE.fullmatch(site)), "sites", f"{site!r} is not layers.<L>.<point> or embed")
    require(bool(sites) and len(set(sites)) == len(sites), "sites", f"{list(sites)}, one or more and each once")
    epsilon = manifest.normalisation.epsilon
    # Banks serve every row with one epsilon. An SAE with a router is encoded whole and may have its own.
    usual = epsilon == LAYER_NORM_EPSILON or (router is not None and 0 < epsilon < 1)
    require(usual, "normalisation.epsilon", f"{epsilon}, rows are normalised with {LAYER_NORM_EPSILON}")
    several = "is for two or more sites, and they need one"
    require((router is not None) == (len(sites) > 1), "router", f"{router} for {len(sites)} sites: it {several}")


def _check_sizes(manifest: Manifest) -> None:
    hidden, latents, rule = manifest.model.hidden_size, manifest.latents, manifest.activation
    for field, width in (("d", manifest.d), ("d_out", manifest.d_out)):
        require(width == hidden, field, f"{width}, the model's hidden size is {hidden}")
    require(latents > 0, "latents", f"{latents}")
    if isinstance(rule, TopK | GroupMax):
        require(0 < rule.k <= latents, "activation.k", f"{rule.k} of {latents} latents")
    if isinstance(rule, GroupMax):
        require(latents % rule.k == 0, "activation.k", f"{rule.k} groups do not divide {latents} latents")
    if isinstance(rule, AdaptiveK):
        require(0 <= rule.k_min <= rule.k_max <= latents, "activation.k_max", f"{rule.k_min} to {rule.k_max}")
        require(rule.scale > 0, "activation.scale", f"{rule.scale}")
    measurable = manifest.training.fvu is None or not manifest.partial
    require(measurable, "training.fvu", "claimed of an SAE that is partial: its latents write to other sites too")
    # A square matrix and its transpose have the same shape: only a measured reconstruction tells them apart.
    undecidable = manifest.training.fvu is None and latents in (manifest.d, manifest.d_out)
    require(not undecidable, "latents", f"{latents} equals d: the matrices' orientation is ambiguous without an FVU")


def _check_context(context: Context) -> None:
    require(context.size is None or 2 <= context.size <= MAX_CONTEXT, "context.size", f"{context.size}")
    for field in ("excluded_positions", "excluded_tokens"):
        numbers = getattr(context, field)
        ordered = list(numbers) == sorted(set(numbers)) and all(0 <= number < MAX_CONTEXT for number in numbers)
        require(ordered, f"context.{field}", f"not in ascending order, or not from 0 to {MAX_CONTEXT - 1}")


def weight_shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the manifest's SAE, by name."""
    f, d, d_out = manifest.latents, manifest.d, manifest.d_out
    shapes: dict[str, tuple[int, ...]] = {
        "encoder": (f, d),
        "bias": (f,),
        "threshold": (f,),
        "decoder": (f, d_out),
        "decoder_bias": (d_out,),
    }
    if manifest.skip:
        shapes["skip"] = (d, d_out)
    if isinstance(manifest.activation, AdaptiveK):
        shapes |= {"probe": (d,), "offset": ()}
    if manifest.router:
        shapes["router"] = (len(manifest.sites), d)
    return shapes


def tensors_of(weights: SAE) -> dict[str, Tensor]:
    """Return an SAE's tensors as they are stored: matrices in the manifest's dtype, all else float32."""
    dtype = DTYPES[_dtype(weights)]
    matrices = {"encoder": weights.encoder, "decoder": weights.decoder, "skip": weights.skip}
    vectors = {"bias": weights.bias, "threshold": weights.threshold, "decoder_bias": weights.decoder_bias}
    if isinstance(weights.selection, sae.AdaptiveK):
        vectors |= {"probe": weights.selection.probe, "offset": weights.selection.offset}
    if weights.router:
        vectors["router"] = weights.router.weight
    stored = {name: tensor.to(dtype) for name, tensor in matrices.items() if tensor is not None}
    return stored | {name: tensor.float() for name, tensor in vectors.items()}


def sae_of(manifest: Manifest, tensors: dict[str, Tensor]) -> SAE:
    """Build the SAE of a manifest from its stored tensors."""
    return SAE(
        *(tensors[name] for name in ("encoder", "bias", "threshold", "decoder", "decoder_bias")),
        normalisation=manifest.normalisation.run_time,
        selection=_selection(manifest.activation, tensors),
        skip=tensors.get("skip"),
        router=Router(tensors["router"], manifest.router == "mean") if manifest.router else None,
        partial=manifest.partial,
        epsilon=manifest.normalisation.epsilon,
    )


def _selection(rule: Activation, tensors: dict[str, Tensor]) -> sae.Selection | None:
    match rule:
        case TopK(k):
            return sae.TopK(k)
        case GroupMax(k):
            return sae.GroupMax(k)
        case AdaptiveK():
            probe, offset = tensors["probe"], tensors["offset"]
            return sae.AdaptiveK(probe, offset, rule.k_min, rule.k_max, rule.steepness, rule.scale)
    return None
