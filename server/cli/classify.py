"""`rudder classify`: train classifiers of whole texts by latents, and measure them."""

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.table import Table

from rudder.sae_models.activations import corpus
from rudder.sae_models.analysis import classify, exchanges, guard_training
from rudder.sae_models.analysis.classify import Bools, Classifier, Settings
from rudder.sae_models.analysis.derive import Topic
from rudder.sae_models.analysis.exchanges import REPORT, TRAIN, TUNE, Exchange
from rudder.sae_models.analysis.guard_figures import auroc, figure
from rudder.sae_models.analysis.guard_training import Rig, by_class
from rudder.sae_models.bundle import bundle as bundles
from rudder.sae_models.bundle.bundle import Bundle
from rudder.sae_models.errors import UserError
from rudder.sae_models.files import write_atomically
from rudder.sae_models.statistics import Floats
from rudder.server.cli.arguments import add_subcommand, command, integer, number
from rudder.server.cli.output import out
from rudder.server.cli.probe import CORPUS, PROMPTS, rule_of

EXAMPLES = """\
examples:
  rudder classify train --model MODEL --bundle BUNDLE --corpus textbooks.jsonl.xz --topic microbiology --out topic.json
  rudder classify train --model MODEL --bundle BUNDLE --prompts prompts.jsonl --kind tree --forbid 12 --out harmful.json
  rudder classify eval harmful.json --model MODEL --bundle BUNDLE --prompts prompts.jsonl --json figures.json
"""
TOKENS = 256


def main(argv: Sequence[str]) -> None:
    """Run a command."""
    args = parser().parse_args(argv)
    args.run(args)


def parser() -> argparse.ArgumentParser:
    """Build the parser."""
    made = command("classify", "Train classifiers of whole texts by latents, and measure them.", EXAMPLES)
    group = made.add_subparsers(required=True, metavar="command")
    training = add_subcommand(group, "train", "train a classifier, and calibrate it on texts of its own", EXAMPLES)
    training.set_defaults(run=train)
    settings = Settings()
    training.add_argument("--name", default="", help="of the classifier (default: the topic, or the file of prompts)")
    training.add_argument("--kind", choices=("logistic", "tree"), default=settings.kind, help="of model (%(default)s)")
    training.add_argument(
        "--pooling", choices=("maximum", "mean", "share"), default=settings.pooling, help="over tokens (%(default)s)"
    )
    training.add_argument("--latents", type=integer(1), default=settings.latents, help="at most (%(default)s)")
    training.add_argument(
        "--forbid", type=integer(0), action="append", default=[], help="a latent that it must not use, nor lean on"
    )
    training.add_argument("--aversion", type=number(1e6), default=settings.aversion, help="to those (%(default)s)")
    training.add_argument("--out", type=Path, required=True, help="JSON file of the classifier")
    measuring = add_subcommand(group, "eval", "measure a classifier on the report split", EXAMPLES)
    measuring.set_defaults(run=evaluate)
    measuring.add_argument("classifier", type=Path, metavar="FILE", help="JSON file of the classifier")
    measuring.add_argument("--json", type=Path, help="JSON file of the figures")
    for each in (training, measuring):
        add_texts(each)
    return made


def add_texts(parser: argparse.ArgumentParser) -> None:
    """Add model, bundle and texts."""
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--bundle", type=Path, required=True, help="folder of the bundle whose latents are used")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus", type=Path, help=CORPUS)
    source.add_argument("--prompts", type=Path, help=PROMPTS)
    parser.add_argument("--topic", action="append", default=[], help="of --corpus: a book to tell from the others")
    parser.add_argument("--text", action="store_true", help="of --prompts: plain texts, not messages of a chat")
    parser.add_argument(
        "--texts", type=integer(1), default=400, help="of --corpus: of topic, and of others (%(default)s)"
    )


@dataclass(frozen=True)
class Read:
    """Texts of a split: their exchanges, pooled activations [n, F] of the whole dictionary, and labels [n]."""

    texts: Sequence[Exchange]
    values: Floats
    label: Bools


def train(options: argparse.Namespace) -> None:
    """Train, calibrate, measure and write a classifier."""
    bundle, rig = load(options)
    settings = Settings(options.kind, options.pooling, options.latents, aversion=options.aversion)
    if wrong := [latent for latent in options.forbid if latent >= bundle.manifest.latents]:
        raise UserError(
            f"forbid: {bundle.manifest.name} has latents 0 to {bundle.manifest.latents - 1}, not {wrong[0]}"
        )
    splits = {split: read(rig, bundle, options, split, settings.pooling) for split in (TRAIN, TUNE, REPORT)}
    source = options.corpus or options.prompts
    made = classify.train(
        splits[TRAIN].values, splits[TRAIN].label, splits[TUNE].values, splits[TUNE].label, bundle.sae,
        tuple(options.forbid), settings, name=options.name or "-".join(options.topic) or source.name.partition(".")[0],
        bundle=bundle.manifest.name, bundle_sha256=bundle.sha256, model_sha256=bundle.manifest.model.sha256,
        record={
            "source": source.name, "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
            "topic": options.topic, "settings": asdict(settings),
            "texts": {split: [int(r.label.sum()), int((~r.label).sum())] for split, r in splits.items()},
        },
    )  # fmt: skip
    labels = {str(i): bundle.catalogue.get(i).summary.label for i in (*made.latents, *made.forbidden, *made.excluded)}
    record = made.record | {"labels": labels, "figures": figures_of(made, splits[REPORT])}
    classify.save(options.out, replaced(made, record))
    print_figures(made, record["figures"])


def evaluate(options: argparse.Namespace) -> None:
    """Measure a classifier on the report split of texts."""
    bundle, rig = load(options)
    made = classify.load(options.classifier, bundle.sha256)
    figures = figures_of(made, read(rig, bundle, options, REPORT, made.pooling))
    if options.json:
        write_atomically(options.json, json.dumps(figures, indent=2).encode() + b"\n")
    print_figures(made, figures)


def load(options: argparse.Namespace) -> tuple[Bundle, Rig]:
    """Load a bundle, and the model up to its site. UserError: the bundle is of another model."""
    bundle = bundles.load(options.bundle)
    bundles.check_model(bundle, bundles.model_sha256(options.model), bundle.manifest.model.hidden_size)
    return bundle, guard_training.load_rig(options.model, [bundle.manifest.site], rule_of([options.bundle]))


def read(rig: Rig, bundle: Bundle, options: argparse.Namespace, split: str, pooling: classify.Pooling) -> Read:
    """Run the texts of a split through the model."""
    texts = of_corpus(rig, options, split) if options.corpus else of_prompts(rig, options, split)
    values = classify.pooled(rig, bundle.sae, texts, pooling, split)
    return Read(texts, values, np.array([text.label > 0.5 for text in texts], bool))


def of_corpus(rig: Rig, options: argparse.Namespace, split: str) -> list[Exchange]:
    """Return texts of a split of a corpus: as many of the topic as of all other books."""
    if not options.topic:
        raise UserError("topic: --corpus needs the book to tell from the others")
    documents, topic = corpus.read(options.corpus), Topic(tuple(options.topic))
    exchanges.check_topic(topic, documents)
    books = {document.book for document in documents}
    groups = [set(topic.books), books - set(topic.books)]
    limits = {book: -(-options.texts // len(group)) for group in groups for book in group}
    return exchanges.of_corpus(documents, rig.tokenizer, topic, split, TOKENS, limits)


def of_prompts(rig: Rig, options: argparse.Namespace, split: str) -> list[Exchange]:
    """Return the prompts of a split."""
    if options.topic:
        raise UserError("topic: belongs to --corpus")
    prompts = [prompt for prompt in exchanges.read_prompts(options.prompts) if prompt.split == split]
    return exchanges.of_prompts(prompts, rig.tokenizer, chat=not options.text)


def figures_of(made: Classifier, report: Read) -> dict[str, Any]:
    """Return how well a classifier ranks and decides, how calibrated it is, and how it leans on what it must not."""
    probabilities, label = made.probabilities(report.values), report.label
    order = figure(auroc, *by_class(report.texts, probabilities))
    leaning = classify.reliance(probabilities, report.values[:, list(made.forbidden)], label) if made.forbidden else []
    return {
        "auroc": asdict(order),
        "accuracy": float(((probabilities > 0.5) == label).mean()),
        "brier": float(np.square(probabilities - label).mean()),
        "calibration_error": classify.calibration_error(probabilities, label),
        "reliance": dict(zip(map(str, made.forbidden), leaning, strict=True)),
        "texts": [int(label.sum()), int((~label).sum())],
    }


def replaced(made: Classifier, record: dict[str, Any]) -> Classifier:
    """Return a classifier with another record."""
    return msgspec.structs.replace(made, record=record)


def print_figures(made: Classifier, figures: dict[str, Any]) -> None:
    """Print the figures as a table."""
    table = Table("figure", "value", title=f"{made.name}: {made.kind} over {len(made.latents)} latents")
    order = figures["auroc"]
    table.add_row("AUROC", f"{order['value']:.3f} ({order['low']:.3f} to {order['high']:.3f})")
    for name in ("accuracy", "brier", "calibration_error"):
        table.add_row(name.replace("_", " "), f"{figures[name]:.3f}")
    for latent, value in figures["reliance"].items():
        table.add_row(f"leans on {latent}", f"{value:+.3f}")
    out.print(table)
