"""Import an SAE that others trained: measure it on text, check its convention, write it as a bundle."""

import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from rudder.sae_models import fidelity
from rudder.sae_models.activations import samples as materials
from rudder.sae_models.activations.samples import TextSample
from rudder.sae_models.bundle import bundle, catalogue, semantic
from rudder.sae_models.bundle.bundle import Bundle, Conformance, Manifest, Model, Source, Statistics, Training
from rudder.sae_models.bundle.catalogue import Latent, Summary
from rudder.sae_models.errors import UserError
from rudder.sae_models.evaluation import activity as entries
from rudder.sae_models.evaluation import labelling, labels, logit_lens
from rudder.sae_models.evaluation.labels import Labels
from rudder.sae_models.fidelity import Fidelity
from rudder.sae_models.formats.folding import fold_decoder_norm, fold_input_scale
from rudder.sae_models.formats.source import Declaration, Loaded
from rudder.sae_models.importing import contexts, convention
from rudder.sae_models.importing.convention import Claims, Comparison
from rudder.sae_models.sae import SAE

FIGURE_TOKENS = 8192
COMPARISON_TOKENS = 2048
# Random draws of tokens for conformance vectors, and the misfit to the whole text's figures at which drawing stops.
DRAWS, TYPICAL_MISFIT = 16, 0.1
# Hook points whose vectors are part of the residual stream, so that the unembedding reads them.
RESIDUAL_POINTS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "embed")


# Name of the note on an input scale that the source publishes elsewhere (formats/saelens.py).
INPUT_SCALE = "input_scale"


class ImportRefused(UserError):
    """A checkpoint that is not imported; the message begins with the field that is wrong."""


@dataclass(frozen=True)
class ImportRequest:
    """Parameters of an import: a bundle at `out` for the model checkpoint in the folder `model`.

    `sites` and `output_site` override what the source declares. `corpus`: JSON lines, of which about `tokens` tokens
    are measured. `labels`: a Neuronpedia export, whose model is called `labels_model`, and the SAE's label set
    `labels_set`, if the source does not say so. `embedder`: sentence embedder for semantic search. `accept`: import
    even if the figures contradict the claims.
    """

    model: Path
    out: Path
    sites: tuple[str, ...] = ()
    output_site: str = ""
    corpus: Path | None = None
    tokens: int = 500_000
    labels: Path | None = None
    labels_model: str = ""
    labels_set: str = ""
    embedder: str = ""
    accept: bool = False
    credit: str = ""


@dataclass(frozen=True)
class Measurements:
    """Everything measured on a corpus."""

    training: Training
    statistics: Statistics
    conformance: Conformance
    latents: list[Latent]
    verdict: Comparison | None


@dataclass(frozen=True)
class ImportResult:
    """The bundle; the comparison of conventions, None without a corpus; the labels, None if none were requested."""

    bundle: Bundle
    verdict: Comparison | None
    labels: Labels | None


def import_sae(loaded: Loaded, source: Source, request: ImportRequest) -> ImportResult:
    """Write a bundle of a loaded checkpoint.

    Raises ImportRefused, or the error of a file: BundleError, CorpusError, LabelError, MeaningUnknown, ValueError.
    """
    bundle.check_replaceable(request.out)
    content = manifest_for(loaded, source, request)
    imported_labels = load_labels(content, loaded.declared, request)
    measured = None if request.corpus is None else measure(loaded.sae, content, request, request.corpus)
    if measured is not None:
        content = msgspec.structs.replace(content, training=measured.training)
    latents = [Latent(Summary(i, "", None, None), (), ()) for i in range(content.latents)]
    labelled = with_labels(measured.latents if measured else latents, imported_labels)
    if measured is None:
        conformance = bundle.conformance_of(loaded.sae, synthetic_inputs(loaded.sae, content))
    else:
        conformance = measured.conformance
    statistics = measured.statistics if measured else None
    with tempfile.TemporaryDirectory() as scratch:
        database = Path(scratch) / bundle.CATALOGUE
        catalogue.write(database, labelled)
        if request.embedder:
            semantic.embed_labels(database, request.embedder, semantic.load_embedder(request.embedder))
        written = bundle.write(request.out, content, loaded.sae, statistics, conformance, database)
    return ImportResult(written, measured.verdict if measured else None, imported_labels)


def source_of(loaded: Loaded, where: str) -> Source:
    """Return the origin of a checkpoint from `repository@revision:subfolder`, or the name alone of a local path."""
    revision = re.search(r"@([^:]+)", where)
    origin = Path(where).name if Path(where).exists() else where
    return Source(loaded.format, origin, revision[1] if revision else None, loaded.declared.l0)


def with_input_scale(loaded: Loaded, scale: float | None) -> Loaded:
    """Fold in an input scale known from elsewhere, if the checkpoint declares one without giving its value."""
    if scale is None or INPUT_SCALE not in loaded.declared.notes:
        return loaded
    notes = {key: note for key, note in loaded.declared.notes.items() if key != INPUT_SCALE}
    declared = replace(loaded.declared, folded=(*loaded.declared.folded, INPUT_SCALE), notes=notes)
    sae = fold_input_scale(loaded.sae, scale)
    if "decoder_norm" in declared.folded:
        # Activations are in units of the decoder's norm after scaling, so its rows must have norm 1 again.
        sae = fold_decoder_norm(sae)
    return replace(loaded, sae=sae, declared=declared)


def manifest_for(loaded: Loaded, source: Source, request: ImportRequest) -> Manifest:
    """Return the manifest without figures. ImportRefused: a site is unknown, or widths of SAE and model differ."""
    declared, sae = loaded.declared, loaded.sae
    sites = request.sites or declared.sites
    if not sites:
        raise ImportRefused(f"site: the {loaded.format} checkpoint does not say which site it reads, give --site")
    if sae.partial and not (request.output_site or declared.output_site):
        raise ImportRefused(
            f"output_site: the {loaded.format} checkpoint does not say which site it writes, give --output-site"
        )
    width = materials.read_model_shape(request.model).hidden_size
    for field, size in (("d", sae.width), ("d_out", sae.decoder.shape[1])):
        if size != width:
            raise ImportRefused(f"{field}: the SAE has {size}, the residual stream of {request.model} has {width}")
    return bundle.describe(
        sae,
        name=request.out.name,
        model=Model(request.model.resolve().name, bundle.model_sha256(request.model), width),
        sites=sites,
        output_site=output_site_of(declared, request),
        architecture=declared.architecture,
        training=Training(credit=request.credit),
        declared=str(declared.notes.get("normalize_activations", sae.normalisation)),
        folded=declared.folded,
        assumed=assumed_scale(declared),
        source=source,
        context=contexts.declared_context(declared, request.model),
    )


def assumed_scale(declared: Declaration) -> str:
    """Return the note on an input scale that the source declares without giving its value; empty without one."""
    return f"{INPUT_SCALE}: {declared.notes[INPUT_SCALE]}" if INPUT_SCALE in declared.notes else ""


def output_site_of(declared: Declaration, request: ImportRequest) -> str:
    """Return the site that the SAE reconstructs; empty if it is the one that it reads, which a request may override."""
    transcodes = declared.output_site not in declared.sites
    return request.output_site or (declared.output_site if transcodes or not request.sites else "")


def load_labels(content: Manifest, declared: Declaration, request: ImportRequest) -> Labels | None:
    """Return the requested labels. LabelError: they are of another model, layer or SAE."""
    if request.labels is None:
        return None
    published, _, label_set = str(declared.notes.get("neuronpedia_id", "")).partition("/")
    models = (request.labels_model,) if request.labels_model else (content.model.name, declared.model, published)
    records, label_set = labels.read(request.labels), request.labels_set or label_set
    return labels.match(records, models, content.site, content.latents, label_set)


def with_labels(latents: Sequence[Latent], imported: Labels | None) -> Iterator[Latent]:
    """Yield the latents with imported labels in place of their own."""
    for latent in latents:
        label = imported.by_latent.get(latent.summary.index) if imported else None
        if label:
            latent = replace(latent, summary=with_label(latent.summary, label.text, label.origin))
        yield latent


def with_label(summary: Summary, text: str, origin: str) -> Summary:
    """Return a summary with a label of others: the scores are of the label that it replaces."""
    return replace(summary, label=text, origin=origin, label_score=None, label_error=None, intervention=None)


def measure(sae: SAE, content: Manifest, request: ImportRequest, corpus: Path) -> Measurements:
    """Measure figures, statistics, conformance vectors and catalogue entries on a corpus.

    ImportRefused: the figures contradict the claims of the source, and `accept` is not set.
    """
    material, vectors, verdict = sample_and_compare(sae, content, request.model, corpus, request.tokens)
    x, target = inputs_and_target(content, vectors)
    measured = fidelity.measure(sae, x, target)
    problem = contradiction(measured, claims_of(content), verdict)
    if problem and not request.accept:
        raise ImportRefused(f"convention: {problem}; --accept imports it as it is declared")
    sample = entries.sample_of(material.windows, material.documents, material.tokenizer)
    sums = entries.tally_of(materials.sae_inputs(material, content.sites, material.windows), sae, sample)
    statistics = entries.statistics_of(sums)
    dead = float((statistics.frequency == 0).float().mean())
    whole = Claims(measured.l0, measured.fvu if measured.compared else None)
    conformance = typical_conformance(sae, x, target, whole)
    outlier_share = 1 - sums.tokens / int(material.windows.counted.sum())
    training = Training(l0=whole.l0, fvu=whole.fvu, dead_share=dead, outlier_share=outlier_share, credit=request.credit)
    latents = labelling.describe(sums, sample, sae, unembedding(content, material))
    return Measurements(training, statistics, conformance, latents, verdict)


def typical_conformance(sae: SAE, x: Tensor, target: Tensor | None, whole: Claims) -> Conformance:
    """Return conformance vectors of a random draw of tokens whose L0 and FVU are close to those of all tokens.

    A few tokens may hold most of the variance, so that an arbitrary draw can have another FVU.
    """
    picks = [torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)) for seed in range(DRAWS)]
    best, min_misfit = picks[0][: bundle.CONFORMANCE_TOKENS], float("inf")
    for pick in (order[: bundle.CONFORMANCE_TOKENS] for order in picks):
        measured = fidelity.measure(sae, x[pick], None if target is None else target[pick])
        misfit = convention.misfit(measured.l0, measured.fvu, whole, measured.l0)
        if misfit < min_misfit:
            best, min_misfit = pick, misfit
        if min_misfit < TYPICAL_MISFIT:
            break
    return bundle.conformance_of(sae, x[best], targets=None if target is None else target[best])


def sample_and_compare(
    sae: SAE, content: Manifest, model: Path, corpus: Path, tokens: int
) -> tuple[TextSample, dict[str, Tensor], Comparison | None]:
    """Return the corpus as windows, vectors [n, d] at the sites, and the comparison of conventions unless partial."""
    layers = materials.read_model_shape(model).layers
    own = content.sites if content.partial else (*content.sites, content.output_site)
    near = [] if content.partial else [other for site in own for other in materials.adjacent_sites(site, layers)]
    sites = list(dict.fromkeys((*own, *near)))
    material = materials.load_text_sample(model, sites, corpus, tokens, *contexts.windows_of(content.context, model))
    vectors = materials.sample_vectors(material, sites, FIGURE_TOKENS)
    if content.partial:
        return material, vectors, None
    fewer = {site: x[:COMPARISON_TOKENS] for site, x in vectors.items()}
    return material, vectors, convention.compare(sae, content.sites, content.output_site, fewer, claims_of(content))


def claims_of(content: Manifest) -> Claims:
    """Return the figures that the manifest claims, or without a training L0 the source's."""
    claimed = content.source.l0 if content.source and content.training.l0 is None else content.training.l0
    return Claims(claimed, content.training.fvu)


def contradiction(measured: Fidelity, claims: Claims, verdict: Comparison | None) -> str:
    """Return how the figures contradict the SAE as declared; empty if they do not."""
    if verdict:
        return "" if verdict.stands else describe_mismatch(verdict)
    if bundle.confirms(measured.l0, claims.l0):
        return ""
    return f"L0 {measured.l0:.4g} on this text, L0 {claims.l0:.4g} is claimed"


def describe_mismatch(verdict: Comparison) -> str:
    """Return the figures of an SAE that does not fit as declared, and the variant that fits best with its cure."""
    declared, best = verdict.declared, verdict.fits[0]
    figures = f"L0 {declared.l0:.4g} and FVU {declared.fvu:.4g} on this text"
    if best is declared:
        return f"{figures} are not what is claimed, and no other reading fits better"
    return f"{figures}; {best.name!r} fits best, L0 {best.l0:.4g} and FVU {best.fvu:.4g}: {best.cure}"


def inputs_and_target(content: Manifest, vectors: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return the SAE's inputs [n, d], with a router [n, L, d], and the target [n, d_out] of a transcoder."""
    x = torch.stack([vectors[site] for site in content.sites], dim=-2) if content.router else vectors[content.site]
    return x, vectors[content.output_site] if content.transcodes and not content.partial else None


def unembedding(content: Manifest, material: TextSample) -> Tensor | None:
    """Return the model's unembedding [V, d] if the SAE writes to the residual stream at one site, else None."""
    in_residual = content.output_site.endswith(RESIDUAL_POINTS) and not content.partial
    return logit_lens.unembedding(material.trunk) if in_residual else None


def synthetic_inputs(sae: SAE, content: Manifest) -> Tensor:
    """Return inputs [n, d] for conformance vectors without a corpus: each activates a latent of its own.

    x = encoder (threshold - bias + 1) / |encoder|^2 gives z = threshold + 1, unless the input is normalised.
    """
    chosen = torch.linspace(0, sae.latents - 1, min(sae.latents, bundle.EXPECTED_TOKENS)).long()
    rows = sae.encoder[chosen].float()
    wanted = (sae.threshold - sae.bias + 1)[chosen, None]
    x = rows * wanted / rows.square().sum(1, keepdim=True).clamp(min=1e-12)
    return x[:, None].repeat(1, len(content.sites), 1) if content.router else x
