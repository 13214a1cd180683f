"""Export of a trained SAE: evaluation on held-out data, catalogue, and bundle."""

import itertools
import sqlite3
import tempfile
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from rudder.sae_models import fidelity, precision
from rudder.sae_models.activations import corpus, harvest
from rudder.sae_models.activations.hooks import parse_site
from rudder.sae_models.activations.samples import TextSample
from rudder.sae_models.activations.stream import Vectors
from rudder.sae_models.bundle import bundle, catalogue
from rudder.sae_models.bundle.bundle import Form, Manifest, Model, Statistics, Training
from rudder.sae_models.bundle.catalogue import Latent
from rudder.sae_models.bundle.manifest import NO_CONTEXT
from rudder.sae_models.evaluation import activity, labelling, logit_lens, probing, splicing
from rudder.sae_models.evaluation.probing import Labelled
from rudder.sae_models.fidelity import Fidelity
from rudder.sae_models.importing import importer
from rudder.sae_models.importing.convention import Claims
from rudder.sae_models.sae import SAE
from rudder.sae_models.training import data
from rudder.sae_models.training.config import Config, SAESpec
from rudder.sae_models.training.data import TrainingInputs, TrainingText
from rudder.sae_models.training.record import Record

PROBE_LATENTS = (1, 5, 20)
# Bounds of the histograms: of log10 of the share of tokens on which a latent fires, and of cosines.
DENSITY = (-6.0, 0.0, 24)
COSINE = (0.0, 1.0, 20)


def evaluate_and_export(run_config: Config, spec: SAESpec, sae: SAE, inputs: TrainingInputs, folder: Path) -> None:
    """Evaluate an SAE, add the figures to the record, and write its bundle into the run's folder."""
    dtype = precision.DTYPES[run_config.export.dtype]
    # Evaluated as rounded; products of float32 matrices are faster.
    sae = with_dtype(with_dtype(sae, dtype), torch.float32)
    statistics, latents = build_catalogue(run_config, spec, sae, inputs)
    vectors, outlier_share = data.sample(inputs.held_out, run_config.evaluation.tokens)
    x, target = data.sae_inputs(spec, vectors), data.reconstruction_target(spec, vectors)
    reconstructed = x if target is None else target
    figures = vector_figures(spec, sae, fidelity.measure(sae, x, target, progress=True))
    figures["outlier_share"] = outlier_share
    figures["precision"] = precision.resolve(spec.settings.precision, data.device_of(run_config))
    if inputs.text is not None:
        figures |= splicing_figures(run_config, spec, sae, inputs.text, reconstructed.flatten(0, -2).mean(0))
        figures |= probing_figures(run_config, spec, sae, inputs)
    figures["left_out"] = missing_figures(figures, latents)
    steps = run_config.tokens // run_config.batch
    with Record(folder, steps) as record:
        record.add("evaluation", steps, steps * run_config.batch, {spec.name: figures})
    conformance = importer.typical_conformance(sae, x, target, Claims(figures["l0"], figures["fvu"]))
    sae, form = with_dtype(sae, dtype), Form(run_config.export.shard_bytes, run_config.export.compressed)
    content = build_manifest(run_config, spec, sae, inputs, figures)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".catalogue.") as scratch:
            database = Path(scratch) / bundle.CATALOGUE
            catalogue.write(database, latents)
            written = bundle.write(folder / spec.name, content, sae, statistics, conformance, database, form)
            written.catalogue.close()
    except (OSError, sqlite3.Error, SafetensorError) as error:
        raise OSError(f"bundle: {folder / spec.name}: {error}; the checkpoint is complete, run it again") from error


def with_dtype(sae: SAE, dtype: torch.dtype) -> SAE:
    """Return an SAE with its matrices in a dtype."""
    skip = None if sae.skip is None else sae.skip.to(dtype)
    return replace(sae, encoder=sae.encoder.to(dtype), decoder=sae.decoder.to(dtype), skip=skip)


def build_catalogue(
    run_config: Config, spec: SAESpec, sae: SAE, inputs: TrainingInputs
) -> tuple[Statistics, list[Latent]]:
    """Return statistics of each latent on the training data and, for text, its catalogue entry."""
    limit = run_config.evaluation.catalogue_tokens
    if inputs.text is None:
        sums = activity.activity(sae, data.sae_inputs(spec, data.sample_vectors(inputs.train, limit)))
        return activity.statistics_of(sums), list(activity.unlabelled(sums))
    text = inputs.text
    sample = activity.sample_of(text.train.first(limit), text.documents, text.tokenizer)
    chunks = data.text_vectors(inputs, inputs.train, sample.windows)
    batches = ((data.sae_inputs(spec, vectors), counted) for vectors, counted in chunks)
    tally = activity.tally_of(batches, sae, sample)
    return activity.statistics_of(tally), labelling.describe(tally, sample, sae, unembedding(spec, text))


def missing_figures(figures: Mapping[str, Any], latents: Sequence[Latent]) -> list[str]:
    """Return what was not measured or described, and the input that it needs."""
    causes = {
        "what latents stand for: needs text": all(not latent.summary.label for latent in latents),
        "words that latents promote: needs a causal language model and a site in its residual stream": not any(
            latent.promoted for latent in latents
        ),
        "CE recovered and KL: need text, a causal language model and one site": "kl" not in figures,
        "probes: need text of several books": "probe_1" not in figures,
    }
    return [cause for cause, holds in causes.items() if holds]


def text_sample_of(text: TrainingText) -> TextSample:
    """Return the training text in the form that importing takes."""
    return TextSample(text.trunk, text.tokenizer, text.documents, text.train)


def unembedding(spec: SAESpec, text: TrainingText) -> Tensor | None:
    """Return the unembedding [V, d] if the SAE writes to the residual stream of a causal language model, else None."""
    if harvest.is_causal_lm(text.trunk.config) and spec.all_sites[-1].endswith(importer.RESIDUAL_POINTS):
        return logit_lens.unembedding(text.trunk)
    return None


def vector_figures(spec: SAESpec, sae: SAE, measured: Fidelity) -> dict[str, Any]:
    """Return the figures that need vectors only, as the record and the report hold them."""
    density = measured.frequency[measured.frequency > 0].log10().clamp(min=DENSITY[0])
    return {
        "site": " ".join(spec.all_sites),
        "fvu": measured.fvu,
        "l0": measured.l0,
        "dead_share": measured.dead_share,
        "dense_latents": measured.dense_latents(fidelity.DENSE),
        "dense_share": measured.dense_share(fidelity.DENSE),
        "frequent_latents": measured.dense_latents(fidelity.FREQUENT),
        "frequent_share": measured.dense_share(fidelity.FREQUENT),
        "shrinkage": measured.shrinkage,
        "density": histogram(density, *DENSITY),
        "decoder_cosine": histogram(splicing.max_cosines(sae.decoder), *COSINE),
    }


def histogram(values: Tensor, low: float, high: float, bins: int) -> list[int]:
    """Count the values in each of `bins` equal bins from low to high."""
    counts: list[int] = values.float().cpu().histc(bins, low, high).long().tolist()
    return counts


def splicing_figures(run_config: Config, spec: SAESpec, sae: SAE, text: TrainingText, mean: Tensor) -> dict[str, float]:
    """Return CE and KL of the language model with the SAE spliced in. Empty for other models, and for an SAE with a
    router: it may read layers above the site that it replaces.
    """
    model = harvest.load_model(Path(run_config.model), text.trunk.device)
    if not harvest.is_causal_lm(model.config) or len(spec.sites) > 1:
        return {}
    windows = text.held_out.first(run_config.evaluation.loss_tokens)
    output = parse_site(spec.output_site) if spec.output_site else None
    result = splicing.splice(model, parse_site(spec.sites[0]), sae, mean, windows, output)
    return {
        "ce": result.ce,
        "ce_spliced": result.ce_spliced,
        "ce_ablated": result.ce_ablated,
        "ce_recovered": result.recovered,
        "kl": result.kl,
    }


def probing_figures(run_config: Config, spec: SAESpec, sae: SAE, inputs: TrainingInputs) -> dict[str, float]:
    """Return balanced accuracies of sparse probes for the book of a window, on latents and on as many plain dimensions.
    Empty without labels.
    """
    text, limit = inputs.text, run_config.evaluation.probe_windows // 2
    assert text is not None
    windows = text.held_out.first(run_config.evaluation.tokens)
    folds = torch.tensor([text.documents[source].fold for source in windows.document.tolist()])
    books = [text.documents[source].book for source in windows.document.tolist()]
    parts = [(folds == fold).nonzero().flatten()[:limit].tolist() for fold in corpus.HELD_OUT_FOLDS]
    shared = sorted(set.intersection(*({books[window] for window in part} for part in parts)))
    if len(shared) < 2:
        return {}
    means = window_means(spec, sae, data.text_vectors(inputs, inputs.held_out, windows), set(itertools.chain(*parts)))
    pairs = [label_means(means, part, books, shared) for part in parts]
    latents, plain = zip(*pairs, strict=True)
    figures = {f"probe_{k}": probing.balanced_accuracy(latents[0], latents[1], k) for k in PROBE_LATENTS}
    return figures | {f"probe_{k}_of_inputs": probing.balanced_accuracy(plain[0], plain[1], k) for k in PROBE_LATENTS}


def window_means(
    spec: SAESpec, sae: SAE, chunks: Iterable[tuple[Vectors, Tensor]], selected: Container[int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return mean activations [F] and inputs [d] of each selected window that has counted tokens, by its number."""
    means, number = {}, 0
    for vectors, counted in tqdm(chunks, desc="probe", unit="chunk"):
        for window, positions in enumerate(counted):
            if number + window in selected and positions.any():
                x = data.sae_inputs(spec, {site: x[window][positions] for site, x in vectors.items()})
                means[number + window] = sae.encode(x).mean(0).cpu(), x.flatten(0, -2).mean(0).cpu()
        number += len(counted)
    return means


def label_means(
    means: Mapping[int, tuple[Tensor, Tensor]], windows: Sequence[int], books: Sequence[str], shared: Sequence[str]
) -> tuple[Labelled, Labelled]:
    """Return the means of latents and inputs of windows from one of the shared books, labelled by book."""
    chosen = [window for window in windows if books[window] in shared and window in means]
    label = torch.tensor([shared.index(books[window]) for window in chosen])
    latents, plain = (torch.stack([means[window][kind] for window in chosen]) for kind in (0, 1))
    return Labelled(latents, label), Labelled(plain, label)


def build_manifest(
    run_config: Config, spec: SAESpec, sae: SAE, inputs: TrainingInputs, figures: Mapping[str, Any]
) -> Manifest:
    """Return the manifest, without the hashes of the files."""
    return bundle.describe(
        sae,
        name=spec.name,
        model=Model(inputs.model, inputs.model_sha256, sae.width),
        sites=spec.sites,
        output_site=spec.output_site or "",
        architecture=spec.architecture,
        training=Training(
            tokens=run_config.tokens,
            seed=spec.seed,
            l0=figures["l0"],
            fvu=figures["fvu"],
            ce_recovered=figures.get("ce_recovered"),
            dead_share=figures["dead_share"],
            outlier_share=figures["outlier_share"],
            credit=run_config.credit,
        ),
        declared="dataset scalar",
        folded=("pre_bias", "input_scale"),
        context=data.context_of(run_config, inputs.text) if inputs.text else NO_CONTEXT,
    )
