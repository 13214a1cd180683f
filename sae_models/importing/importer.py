"""Makes a bundle of an SAE that somebody else trained."""

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
from rudder.sae_models.activations.samples import Material
from rudder.sae_models.bundle import bundle, catalogue
from rudder.sae_models.bundle import semantic as meaning
from rudder.sae_models.bundle.bundle import Bundle, Conformance, Manifest, Model, Source, Statistics, Training
from rudder.sae_models.bundle.catalogue import Latent, Summary
from rudder.sae_models.errors import UserError
from rudder.sae_models.evaluation import activity as entries
from rudder.sae_models.evaluation import labels
from rudder.sae_models.evaluation import logit_lens as lens
from rudder.sae_models.evaluation.labels import Labels
from rudder.sae_models.fidelity import Fidelity
from rudder.sae_models.formats.folding import fold_decoder_norm, fold_input_scale
from rudder.sae_models.formats.source import Declaration, Loaded
from rudder.sae_models.importing import convention
from rudder.sae_models.importing.convention import Claims, Verdict
from rudder.sae_models.sae import SAE

FIGURE_TOKENS = 8192
VERDICT_TOKENS = 2048
# Draws of tokens for conformance vectors, and how near their figures must be to those of the text, in logarithms.
DRAWS, TYPICAL = 16, 0.1
# Sites whose vectors are added to the residual stream, so that the unembedding reads them.
ADDED = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "embed")


# A note by this name tells of a scale that its source keeps elsewhere (saelens).
INPUT_SCALE = "input_scale"


class ImportRefused(UserError):
    """A checkpoint of which no bundle is made; the message begins with what is wrong."""


@dataclass(frozen=True)
class Wish:
    """What is to be made: a bundle at `out` for the checkpoint in the folder `model`.

    `sites`, `output_site` and `architecture` stand in for what the source does not tell, or tells wrongly. `corpus`,
    JSON lines, is measured on for about `tokens` tokens; with `accept`, also where the figures speak against the SAE.
    """

    model: Path
    out: Path
    sites: tuple[str, ...] = ()
    output_site: str = ""
    corpus: Path | None = None
    tokens: int = 500_000
    labels: Path | None = None
    labels_model: str = ""
    embedder: str = ""
    accept: bool = False
    credit: str = ""


@dataclass(frozen=True)
class Measured:
    """What text says of an SAE."""

    training: Training
    statistics: Statistics
    conformance: Conformance
    latents: list[Latent]
    verdict: Verdict | None


@dataclass(frozen=True)
class Imported:
    """The bundle, and what was found on the way; None where not asked for."""

    bundle: Bundle
    verdict: Verdict | None
    labels: Labels | None


def make(loaded: Loaded, source: Source, wish: Wish) -> Imported:
    """ImportRefused, or an error of what is read: BundleError, CorpusError, LabelError, MeaningUnknown, ValueError."""
    bundle.check_replaceable(wish.out)
    content = described(loaded, source, wish)
    found = labels_for(content, loaded.declared, wish)
    measured = None if wish.corpus is None else measure(loaded.sae, content, wish, wish.corpus)
    if measured is not None:
        content = msgspec.structs.replace(content, training=measured.training)
    latents = [Latent(Summary(i, "", None, None), (), ()) for i in range(content.latents)]
    labelled = relabelled(measured.latents if measured else latents, found)
    conformance = measured.conformance if measured else bundle.conformance_of(loaded.sae, invented(loaded.sae, content))
    statistics = measured.statistics if measured else None
    with tempfile.TemporaryDirectory() as scratch:
        database = Path(scratch) / bundle.CATALOGUE
        catalogue.write(database, labelled)
        if wish.embedder:
            meaning.store(database, wish.embedder, meaning.embedder(wish.embedder))
        made = bundle.write(wish.out, content, loaded.sae, statistics, conformance, database)
    return Imported(made, measured.verdict if measured else None, found)


def source_of(loaded: Loaded, where: str) -> Source:
    """Where a checkpoint is from: of `repository@revision:subfolder` both parts, of a local path its name alone."""
    revision = re.search(r"@([^:]+)", where)
    known = Path(where).name if Path(where).exists() else where
    return Source(loaded.format, known, revision[1] if revision else None, loaded.declared.l0)


def with_scale(loaded: Loaded, scale: float | None) -> Loaded:
    """The checkpoint with an input scale that is known from elsewhere, where it could not find one itself."""
    if scale is None or INPUT_SCALE not in loaded.declared.notes:
        return loaded
    notes = {key: note for key, note in loaded.declared.notes.items() if key != INPUT_SCALE}
    declared = replace(loaded.declared, folded=(*loaded.declared.folded, INPUT_SCALE), notes=notes)
    sae = fold_input_scale(loaded.sae, scale)
    if "decoder_norm" in declared.folded:
        # It is that of the scaled decoder which activations are told in.
        sae = fold_decoder_norm(sae)
    return replace(loaded, sae=sae, declared=declared)


def described(loaded: Loaded, source: Source, wish: Wish) -> Manifest:
    """The manifest without figures. ImportRefused: a site is not known, or the SAE does not fit the model's width."""
    declared, sae = loaded.declared, loaded.sae
    sites = wish.sites or declared.sites
    if not sites:
        raise ImportRefused(f"site: the {loaded.format} checkpoint does not tell what it reads, give --site")
    if sae.partial and not (wish.output_site or declared.output_site):
        raise ImportRefused(
            f"output_site: the {loaded.format} checkpoint does not tell what it writes, give --output-site"
        )
    width = materials.shape_of(wish.model).hidden_size
    for field, size in (("d", sae.width), ("d_out", sae.decoder.shape[1])):
        if size != width:
            raise ImportRefused(f"{field}: the SAE has {size}, the residual stream of {wish.model} has {width}")
    return bundle.describe(
        sae,
        name=wish.out.name,
        model=Model(wish.model.resolve().name, bundle.model_sha256(wish.model), width),
        sites=sites,
        output_site=output_of(declared, wish),
        architecture=declared.architecture,
        training=Training(credit=wish.credit),
        declared=str(declared.notes.get("normalize_activations", sae.normalisation)),
        folded=declared.folded,
        assumed=assumed(declared),
        source=source,
    )


def assumed(declared: Declaration) -> str:
    """What the source declares of its input, does not give, and was taken for something; empty where nothing was."""
    return f"{INPUT_SCALE}: {declared.notes[INPUT_SCALE]}" if INPUT_SCALE in declared.notes else ""


def output_of(declared: Declaration, wish: Wish) -> str:
    """The site that is explained; empty where it is the one that is read, which a wish may have moved."""
    transcodes = declared.output_site not in declared.sites
    return wish.output_site or (declared.output_site if transcodes or not wish.sites else "")


def labels_for(content: Manifest, declared: Declaration, wish: Wish) -> Labels | None:
    """The labels asked for, once they fit the model and layer."""
    if wish.labels is None:
        return None
    published = str(declared.notes.get("neuronpedia_id", "")).partition("/")[0]
    models = (wish.labels_model,) if wish.labels_model else (content.model.name, declared.model, published)
    return labels.matching(labels.read(wish.labels), models, content.site, content.latents)


def relabelled(latents: Sequence[Latent], found: Labels | None) -> Iterator[Latent]:
    """The latents, with labels from elsewhere in place of their own."""
    for latent in latents:
        label = found.by_latent.get(latent.summary.index) if found else None
        if label:
            latent = replace(latent, summary=replace(latent.summary, label=label.text, origin=label.origin))
        yield latent


def measure(sae: SAE, content: Manifest, wish: Wish, corpus: Path) -> Measured:
    """Figures, statistics, conformance vectors and catalogue entries. ImportRefused where the figures speak against
    what the source claims, unless they are accepted."""
    using, at, verdict = figures(sae, content, wish.model, corpus, wish.tokens)
    x, target = inputs_and_target(content, at)
    found = fidelity.measured(sae, x, target)
    problem = doubt(found, claims_of(content), verdict)
    if problem and not wish.accept:
        raise ImportRefused(f"convention: {problem}; --accept imports it as it is declared")
    sample = entries.sample_of(using.windows, using.documents, using.tokenizer)
    sums = entries.tally_of(materials.inputs(using, content.sites, using.windows), sae, sample)
    statistics = entries.statistics_of(sums)
    dead = float((statistics.frequency == 0).float().mean())
    whole = Claims(found.l0, found.fvu if found.compared else None)
    conformance = typical(sae, x, target, whole)
    training = Training(l0=whole.l0, fvu=whole.fvu, dead_share=dead, credit=wish.credit)
    latents = list(entries.describe(sums, sample))
    if content.output_site.endswith(ADDED) and not sae.partial:
        latents = list(with_words(latents, sae, using))
    return Measured(training, statistics, conformance, latents, verdict)


def typical(sae: SAE, x: Tensor, target: Tensor | None, whole: Claims) -> Conformance:
    """Conformance vectors of tokens [n] that are as sparse and as faithful as all together.

    A few tokens may hold most of the variance, so that not any few will do.
    """
    picks = [torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)) for seed in range(DRAWS)]
    best, least = picks[0][: bundle.CONFORMANCE_TOKENS], float("inf")
    for pick in (order[: bundle.CONFORMANCE_TOKENS] for order in picks):
        found = fidelity.measured(sae, x[pick], None if target is None else target[pick])
        misfit = convention.misfit(found.l0, found.fvu, whole, found.l0)
        if misfit < least:
            best, least = pick, misfit
        if least < TYPICAL:
            break
    return bundle.conformance_of(sae, x[best], targets=None if target is None else target[best])


def figures(
    sae: SAE, content: Manifest, model: Path, corpus: Path, tokens: int
) -> tuple[Material, dict[str, Tensor], Verdict | None]:
    """The material, vectors [n, d] at the sites, and, of an SAE with an output, which convention fits."""
    layers = materials.shape_of(model).layers
    own = content.sites if content.partial else (*content.sites, content.output_site)
    near = [] if content.partial else [other for site in own for other in materials.neighbours(site, layers)]
    sites = list(dict.fromkeys((*own, *near)))
    using = materials.material(model, sites, corpus, tokens)
    at = materials.sample(using, sites, FIGURE_TOKENS)
    if content.partial:
        return using, at, None
    some = {site: x[:VERDICT_TOKENS] for site, x in at.items()}
    return using, at, convention.verdict(sae, content.sites, content.output_site, some, claims_of(content))


def claims_of(content: Manifest) -> Claims:
    """Of the manifest, or where it has none, of the source."""
    claimed = content.source.l0 if content.source and content.training.l0 is None else content.training.l0
    return Claims(claimed, content.training.fvu)


def doubt(found: Fidelity, claims: Claims, verdict: Verdict | None) -> str:
    """Why figures speak against an SAE as it is declared, empty where they do not; a cure only from a verdict."""
    if verdict:
        return "" if verdict.stands else advice(verdict)
    if bundle.near(found.l0, claims.l0):
        return ""
    return f"L0 {found.l0:.4g} on this text, L0 {claims.l0:.4g} is claimed"


def advice(verdict: Verdict) -> str:
    """What to do about an SAE that does not fit as it is declared."""
    declared, best = verdict.declared, verdict.fits[0]
    found = f"L0 {declared.l0:.4g} and FVU {declared.fvu:.4g} on this text"
    if best is declared:
        return f"{found} are not what is claimed, and no other reading fits better"
    return f"{found}; {best.name!r} fits best, L0 {best.l0:.4g} and FVU {best.fvu:.4g}: {best.cure}"


def inputs_and_target(content: Manifest, at: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """What the SAE reads [n, d], with a router [n, L, d], and what it explains if that is another site's [n, d_out]."""
    x = torch.stack([at[site] for site in content.sites], dim=-2) if content.router else at[content.site]
    return x, at[content.output_site] if content.transcodes and not content.partial else None


def with_words(latents: Sequence[Latent], sae: SAE, using: Material) -> Iterator[Latent]:
    """The latents with their logit-lens words."""
    vocabulary = using.windows.tokens[using.windows.counted].unique()
    found = lens.words(sae.decoder, lens.unembedding(using.trunk), vocabulary, using.tokenizer)
    for latent, (promoted, suppressed) in zip(latents, found, strict=True):
        yield replace(latent, promoted=promoted, suppressed=suppressed)


def invented(sae: SAE, content: Manifest) -> Tensor:
    """Inputs [n, d] for conformance vectors where there is no text: each activates a latent of its own.

    x = encoder (threshold - bias + 1) / |encoder|^2 gives z = threshold + 1, but for a normalisation.
    """
    chosen = torch.linspace(0, sae.latents - 1, min(sae.latents, bundle.EXPECTED_TOKENS)).long()
    rows = sae.encoder[chosen].float()
    wanted = (sae.threshold - sae.bias + 1)[chosen, None]
    x = rows * wanted / rows.square().sum(1, keepdim=True).clamp(min=1e-12)
    return x[:, None].repeat(1, len(content.sites), 1) if content.router else x
