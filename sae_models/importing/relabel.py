"""Label the latents of a bundle anew from a corpus."""

from dataclasses import replace
from pathlib import Path

from rudder.sae_models.activations import samples
from rudder.sae_models.bundle import bundle, revision
from rudder.sae_models.bundle.catalogue import Latent
from rudder.sae_models.evaluation import activity, label_score, labelling, terms
from rudder.sae_models.evaluation.label_score import LabelScores
from rudder.sae_models.importing import contexts, importer


def relabel(path: Path, model: Path, corpus: Path, tokens: int) -> LabelScores:
    """Write labels, scores, contexts and neighbours of a bundle's latents anew, from about `tokens` tokens of a corpus.

    Labels that others wrote stay, and so do statistics, if the bundle has them. Return the label scores. BundleError:
    the bundle is damaged or of another model. CorpusError: the corpus cannot be read.
    """
    old = bundle.load(path)
    bundle.check_model(old, bundle.model_sha256(model), samples.read_model_shape(model).hidden_size)
    content = old.manifest
    length, rule = contexts.windows_of(content.context, model)
    material = samples.load_text_sample(model, content.sites, corpus, tokens, length, rule)
    sample = activity.sample_of(material.windows, material.documents, material.tokenizer)
    sums = activity.tally_of(samples.sae_inputs(material, content.sites, material.windows), old.sae, sample)
    latents = labelling.describe(sums, sample, old.sae, importer.unembedding(content, material))
    described = [with_earlier(latent, old.catalogue.get(latent.summary.index), old.measured) for latent in latents]
    statistics = old.statistics if old.measured else activity.statistics_of(sums)
    written = revision.write(replace(old, statistics=statistics), described, measured=True)
    scores = label_score.label_scores(written.catalogue)
    written.catalogue.close()
    return scores


def with_earlier(latent: Latent, earlier: Latent, measured: bool) -> Latent:
    """Return a new entry with the statistics of the earlier one, if measured, and with its label if others wrote it."""
    # What it makes the model say is the same; its strongest contexts are not.
    summary = replace(latent.summary, output_score=earlier.summary.output_score)
    latent = replace(latent, summary=summary)
    if measured:
        figures = {name: getattr(earlier.summary, name) for name in ("frequency", "max_activation")}
        summary, latent = replace(summary, **figures), replace(latent, quantiles=earlier.quantiles)
    if earlier.summary.label and not terms.is_from_corpus(earlier.summary):
        summary = importer.with_label(summary, earlier.summary.label, earlier.summary.origin)
    return replace(latent, summary=summary)
