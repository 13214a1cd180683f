"""What becomes of a trained SAE: it is measured on what it was not trained on, described, and written as a bundle."""

import sqlite3
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from rudder.sae_models import fidelity
from rudder.sae_models.activations import corpus, harvest
from rudder.sae_models.activations import samples as materials
from rudder.sae_models.activations.corpus import Windows
from rudder.sae_models.activations.hooks import parse_site
from rudder.sae_models.activations.samples import Material
from rudder.sae_models.bundle import bundle, catalogue
from rudder.sae_models.bundle.bundle import Manifest, Model, Statistics, Training
from rudder.sae_models.bundle.catalogue import Latent
from rudder.sae_models.evaluation import activity as entries
from rudder.sae_models.evaluation import probing
from rudder.sae_models.evaluation import splicing as metrics
from rudder.sae_models.evaluation.probing import Labelled
from rudder.sae_models.fidelity import Fidelity
from rudder.sae_models.importing import importer as importing
from rudder.sae_models.importing.convention import Claims
from rudder.sae_models.sae import SAE
from rudder.sae_models.training import data
from rudder.sae_models.training.config import Config, Trained
from rudder.sae_models.training.data import Given, TrainingData
from rudder.sae_models.training.record import Record

PROBE_LATENTS = (1, 5, 20)
# Bounds of the histograms: of log10 of the share of tokens on which a latent fires, and of cosines.
DENSITY = (-6.0, 0.0, 24)
COSINE = (0.0, 1.0, 20)


def conclude(asked: Config, spec: Trained, sae: SAE, made: Given, folder: Path) -> None:
    """Measures an SAE, adds the figures to the record, and writes its bundle into the run's folder."""
    statistics, latents = catalogued(asked, spec, sae, made)
    vectors = data.sample_of(made.held_out, asked.evaluation.tokens)
    x, target = data.inputs(spec, vectors), data.explained(spec, vectors)
    explained = x if target is None else target
    figures = figures_of(spec, sae, fidelity.measure(sae, x, target, progress=True))
    if made.text is not None:
        figures |= spliced(asked, spec, sae, made.text, explained.flatten(0, -2).mean(0))
        figures |= probed(asked, spec, sae, made.text)
    figures["left_out"] = left_out(figures, latents)
    steps = asked.tokens // asked.batch
    with Record(folder, steps) as record:
        record.add("evaluation", steps, steps * asked.batch, {spec.name: figures})
    conformance = importing.typical_conformance(sae, x, target, Claims(figures["l0"], figures["fvu"]))
    content = manifest_of(asked, spec, sae, made, figures)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".catalogue.") as scratch:
            database = Path(scratch) / bundle.CATALOGUE
            catalogue.write(database, latents)
            bundle.write(folder / spec.name, content, sae, statistics, conformance, database).catalogue.close()
    except (OSError, sqlite3.Error, SafetensorError) as error:
        raise OSError(f"bundle: {folder / spec.name}: {error}; the checkpoint is whole, run it again") from error


def catalogued(asked: Config, spec: Trained, sae: SAE, made: Given) -> tuple[Statistics, list[Latent]]:
    """How each latent is active on what was trained on, and, of text, what it stands for."""
    most = asked.evaluation.catalogue_tokens
    if made.text is None:
        sums = entries.activity(sae, data.inputs(spec, data.sample_of(made.train, most)))
        return entries.statistics_of(sums), list(entries.unlabelled(sums))
    text = made.text
    sample = entries.sample_of(text.train.first(most), text.documents, text.tokenizer)
    passes = materials.inputs(material_of(text), spec.sites, sample.windows)
    tally = entries.tally_of(passes, sae, sample)
    return entries.statistics_of(tally), list(described(spec, sae, text, entries.describe(tally, sample)))


def left_out(figures: Mapping[str, Any], latents: Sequence[Latent]) -> list[str]:
    """What was not measured or told because it needs what is not there."""
    causes = {
        "what latents stand for: needs text": all(not latent.summary.label for latent in latents),
        "words that latents promote: needs a causal language model and a site in its residual stream": not any(
            latent.promoted for latent in latents
        ),
        "CE recovered and KL: need text, a causal language model and one site": "kl" not in figures,
        "probes: need text of several books": "probe_1" not in figures,
    }
    return [cause for cause, holds in causes.items() if holds]


def material_of(made: TrainingData) -> Material:
    """The training text as importing knows it."""
    return Material(made.trunk, made.tokenizer, made.documents, made.train)


def described(spec: Trained, sae: SAE, made: TrainingData, latents: Iterable[Latent]) -> Iterable[Latent]:
    """The latents, with the words that their decoder rows promote where these are added to a residual stream."""
    if not (harvest.speaks(made.trunk.config) and spec.all_sites[-1].endswith(importing.RESIDUAL_POINTS)):
        return latents
    return importing.with_logit_lens(list(latents), sae, material_of(made))


def figures_of(spec: Trained, sae: SAE, measured: Fidelity) -> dict[str, Any]:
    """What vectors alone tell of an SAE, as the record and the report hold it."""
    density = measured.frequency[measured.frequency > 0].log10().clamp(min=DENSITY[0])
    return {
        "site": " ".join(spec.all_sites),
        "fvu": measured.fvu,
        "l0": measured.l0,
        "dead_share": measured.dead_share,
        "shrinkage": measured.shrinkage,
        "density": histogram(density, *DENSITY),
        "decoder_cosine": histogram(metrics.max_cosines(sae.decoder), *COSINE),
    }


def histogram(values: Tensor, low: float, high: float, bins: int) -> list[int]:
    """How many values are in each of equal bins from low to high."""
    found: list[int] = values.float().cpu().histc(bins, low, high).long().tolist()
    return found


def spliced(asked: Config, spec: Trained, sae: SAE, made: TrainingData, mean: Tensor) -> dict[str, float]:
    """What the language model loses; nothing of another model, or of an SAE that routes: it may read above its site."""
    model = harvest.load_model(Path(asked.model), made.trunk.device)
    if not harvest.speaks(model.config) or len(spec.sites) > 1:
        return {}
    windows = made.held_out.first(asked.evaluation.loss_tokens)
    output = parse_site(spec.output_site) if spec.output_site else None
    found = metrics.splice(model, parse_site(spec.sites[0]), sae, mean, windows, output)
    return {
        "ce": found.ce,
        "ce_spliced": found.ce_spliced,
        "ce_ablated": found.ce_ablated,
        "ce_recovered": found.recovered,
        "kl": found.kl,
    }


def probed(asked: Config, spec: Trained, sae: SAE, made: TrainingData) -> dict[str, float]:
    """Sparse probes for the book of a window, on latents and on as many plain dimensions; nothing without labels."""
    most = asked.evaluation.probe_windows // 2
    folds = [made.held_out.where(corpus.in_folds(made.held_out, made.documents, [f])) for f in corpus.HELD_OUT_FOLDS]
    parts = [fold.take(torch.arange(min(most, len(fold)))) for fold in folds]
    books = [[made.documents[source].book for source in part.document.tolist()] for part in parts]
    shared = sorted(set.intersection(*map(set, books)))
    if len(shared) < 2:
        return {}
    pairs = [pooled(spec, sae, made, part, names, shared) for part, names in zip(parts, books, strict=True)]
    latents, plain = zip(*pairs, strict=True)
    found = {f"probe_{k}": probing.balanced_accuracy(latents[0], latents[1], k) for k in PROBE_LATENTS}
    return found | {f"probe_{k}_of_inputs": probing.balanced_accuracy(plain[0], plain[1], k) for k in PROBE_LATENTS}


def pooled(
    spec: Trained, sae: SAE, made: TrainingData, windows: Windows, books: list[str], shared: list[str]
) -> tuple[Labelled, Labelled]:
    """Mean activations, and mean inputs, of each window of one of the shared books."""
    windows = windows.where(torch.tensor([book in shared for book in books]))
    label = torch.tensor([shared.index(book) for book in books if book in shared])
    latents, plain = [], []
    found = harvest.text_activations(made.trunk, made.sites, windows)
    passes = -(-len(windows) // harvest.WINDOWS_A_PASS)
    for seen, counted in tqdm(found, total=passes, desc="probe", unit="pass"):
        by_site = {str(site): x for site, x in zip(made.sites, seen, strict=True)}
        for row, positions in enumerate(counted):
            x = data.inputs(spec, {site: x[row][positions] for site, x in by_site.items()})
            latents.append(sae.encode(x).mean(0))
            plain.append(x.flatten(0, -2).mean(0))
    return Labelled(torch.stack(latents).cpu(), label), Labelled(torch.stack(plain).cpu(), label)


def manifest_of(asked: Config, spec: Trained, sae: SAE, made: Given, figures: Mapping[str, Any]) -> Manifest:
    """The manifest but for the hashes of the files."""
    return bundle.describe(
        sae,
        name=spec.name,
        model=Model(made.model, made.model_sha256, sae.width),
        sites=spec.sites,
        output_site=spec.output_site or "",
        architecture=spec.architecture,
        training=Training(
            tokens=asked.tokens,
            seed=spec.seed,
            l0=figures["l0"],
            fvu=figures["fvu"],
            ce_recovered=figures.get("ce_recovered"),
            dead_share=figures["dead_share"],
            credit=asked.credit,
        ),
        declared="dataset scalar",
        folded=("pre_bias", "input_scale"),
    )
