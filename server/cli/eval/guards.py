"""`rudder eval guards`: how well guards tell a topic, or a harmful request, and on what they are best built."""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from rudder.sae_models import PRETRAINED
from rudder.sae_models.activations import corpus
from rudder.sae_models.activations.corpus import ContextRule
from rudder.sae_models.analysis import exchanges, guard_training
from rudder.sae_models.analysis import guard_evaluation as evaluation
from rudder.sae_models.analysis import program as messages
from rudder.sae_models.analysis.derive import Topic
from rudder.sae_models.analysis.exchanges import REPORT, TRAIN, TUNE, Exchange, Prompt
from rudder.sae_models.analysis.guard_evaluation import ARMS, RESIDUAL, TEXT, TOKENS, Fitted, Measured
from rudder.sae_models.analysis.guard_training import Rig
from rudder.sae_models.bundle import bundle as bundles
from rudder.sae_models.bundle.bundle import Bundle
from rudder.sae_models.errors import UserError
from rudder.sae_models.files import write_atomically
from rudder.server.cli.arguments import command, integer
from rudder.server.cli.output import out

EXAMPLES = """\
examples:
  rudder eval guards --corpus textbooks.jsonl.xz --json topic.json
  rudder eval guards --prompts prompts.jsonl --chat-model MODEL --chat-bundle BUNDLE --json harmful.json
"""
TRAIN_TOKENS, TRAIN_PER_SECTION, REPORT_PER_SECTION = 256, 4, 2
LONGEST, EXCERPT, EXCERPTS = 1000, 200, 20
# Tokens before and behind an excerpt, by the name of the padding.
PADDINGS = {"0": (0, 0), "400": (400, 0), "800": (800, 0), "400_around": (200, 200)}
STREAM = "400"
# Of prompts: one padding, of text in the same message.
PADDING_CHARACTERS = 1700


def main(argv: Sequence[str]) -> None:
    """Measure guards."""
    options = parser().parse_args(argv)
    if not options.corpus and not options.prompts:
        raise UserError("corpus, prompts: one of them says what to measure guards on")
    found: dict[str, Any] = {}
    if options.corpus:
        found["topic"] = topic(options)
    if options.prompts:
        found["harmful"] = harmful(options)
    write_atomically(options.json, json.dumps(found, indent=1).encode() + b"\n")
    for name, each in found.items():
        print_arms(name, each)


def parser() -> argparse.ArgumentParser:
    """Build the parser."""
    guards = command("eval guards", "Measure guards of a topic, and of harmful requests.", EXAMPLES)
    guards.add_argument("--json", type=Path, required=True, help="file of the figures, each with its 95 %% interval")
    guards.add_argument("--guards", type=Path, help="folder: write the guards that were measured to it")
    guards.add_argument("--corpus", type=Path, help="labelled corpus: measure a guard of a topic")
    guards.add_argument("--topic", action="append", help="book to notice (microbiology)")
    guards.add_argument("--neighbour", action="append", help="book close to it (anatomy-physiology, chemistry)")
    guards.add_argument("--model", type=Path, default=PRETRAINED / "textbook-lm", help="folder of the model")
    guards.add_argument("--bundle", type=Path, default=PRETRAINED / "textbook-lm-layers.2", help="bundle of the model")
    guards.add_argument("--site", action="append", default=[], help="read by the probe besides the bundle's site")
    guards.add_argument("--prompts", type=Path, help="labelled prompts: measure a guard of harmful requests")
    guards.add_argument("--chat-model", type=Path, help="folder of the chat model that reads the prompts")
    guards.add_argument("--chat-bundle", type=Path, help="bundle of the chat model")
    guards.add_argument("--chat-site", action="append", default=[], help="read besides the site of the chat bundle")
    guards.add_argument("--texts", type=integer(1), default=3000, help="prompts of a class and split (%(default)s)")
    guards.add_argument("--training-texts", type=integer(1), default=3000, help="of a class of prompts (%(default)s)")
    guards.add_argument("--padded", type=integer(1), default=20, help="prompts of a class to pad (%(default)s)")
    guards.add_argument("--seeds", type=integer(1, 100), default=guard_training.SEEDS, help="(%(default)s)")
    guards.add_argument("--windows", type=integer(1), default=400, help="training texts of the topic (%(default)s)")
    guards.add_argument("--sections", type=integer(1), default=1000, help="of each benign book, at most")
    return guards


def load(model: Path, bundle: Path, sites: Sequence[str]) -> tuple[Rig, Bundle]:
    """Load a model and its bundle; the rig reads the bundle's site and `sites`."""
    loaded = bundles.load(bundle)
    context = loaded.manifest.context
    rule = ContextRule(excluded_positions=context.excluded_positions, excluded_tokens=context.excluded_tokens)
    rig = guard_training.load_rig(model, [loaded.manifest.site, *sites], rule)
    bundles.check_model(loaded, bundles.model_sha256(model), rig.trunk.config.hidden_size)
    return rig, loaded


def topic(options: argparse.Namespace) -> dict[str, Any]:
    """Measure guards of a topic on a labelled corpus."""
    chosen = Topic(
        tuple(options.topic or ["microbiology"]), tuple(options.neighbour or ["anatomy-physiology", "chemistry"])
    )
    documents = corpus.read(options.corpus)
    exchanges.check_topic(chosen, documents)
    rig, bundle = load(options.model, options.bundle, options.site)
    books = sorted({document.book for document in documents})
    near = {*chosen.books, *chosen.neighbours}
    groups = [set(chosen.books), set(chosen.neighbours), set(books) - near]
    limits = {book: -(-options.windows // len(group)) for group in groups for book in group}

    def cut(split: str, tokens: int, limits: dict[str, int], per_section: int = 1) -> list[Exchange]:
        return exchanges.of_corpus(documents, rig.tokenizer, chosen, split, tokens, limits, per_section)

    train = exchanges.behind_benign(cut(TRAIN, TRAIN_TOKENS, limits, TRAIN_PER_SECTION), LONGEST, rig.tokenizer)
    fitted = evaluation.fit_arms(rig, train, chosen.neighbours, bundle, [e.group for e in train], options.seeds)
    benign = dict.fromkeys(set(books) - set(chosen.books), options.sections)
    hazard = dict.fromkeys(chosen.books, len(documents) * REPORT_PER_SECTION)
    report = cut(REPORT, LONGEST, hazard, REPORT_PER_SECTION) + cut(REPORT, LONGEST, benign)
    measured = Measured(
        rig, fitted,
        evaluation.score(rig, fitted, cut(TUNE, LONGEST, benign), "calibrate"),
        evaluation.score(rig, fitted, report, "report"),
        {name: evaluation.score(rig, fitted, each, f"padding {name}") for name, each in padded(rig, report).items()},
    )  # fmt: skip
    found = figures(measured, evaluation.LENGTHS)
    for arm in ARMS[:-1]:
        each = found["arms"][arm]
        each["released"] = evaluation.releases(measured, arm, each["level"], STREAM, PADDINGS[STREAM][0])
    if options.guards:
        write_guards(options.guards, "-".join(chosen.books), fitted, found)
    return {"topic": chosen.books, "neighbours": chosen.neighbours, **found}


def padded(rig: Rig, report: Sequence[Exchange]) -> dict[str, list[Exchange]]:
    """Return excerpts of the report's exchanges in each padding, which is benign text of other sections.

    UserError: too few sections are long enough.
    """
    whole = [each for each in report if len(each.ids) > LONGEST]
    excerpts = [exchanges.excerpt_of(each, len(each.ids) - LONGEST + EXCERPT) for each in whole]
    sides = [[each for each in excerpts if (each.label > 0.5) == side] for side in (True, False)]
    chosen = [each for side in sides for each in side[:: max(1, -(-len(side) // EXCERPTS))]]
    padding = [each for each in whole if each.label <= 0.5]
    if len({each.cluster for each in padding}) < 2 or not sides[0]:
        raise UserError(f"corpus: too few sections of the report split have {LONGEST} tokens")
    return {name: exchanges.padded(chosen, padding, *size, rig.tokenizer) for name, size in PADDINGS.items()}


def harmful(options: argparse.Namespace) -> dict[str, Any]:
    """Measure guards of harmful requests on labelled prompts."""
    if not options.chat_model or not options.chat_bundle:
        raise UserError("chat-model, chat-bundle: --prompts needs the model that reads them, and its bundle")
    prompts = limited(exchanges.read_prompts(options.prompts), options.texts, options.training_texts)
    rig, bundle = load(options.chat_model, options.chat_bundle, options.chat_site)

    def of_split(split: str) -> list[Exchange]:
        return exchanges.of_prompts([prompt for prompt in prompts if prompt.split == split], rig.tokenizer)

    train = of_split(TRAIN)
    classes = ["harmful" if each.label > 0.5 else "benign" for each in train]
    fitted = evaluation.fit_arms(rig, train, (), bundle, classes, options.seeds)
    measured = Measured(
        rig, fitted,
        evaluation.score(rig, fitted, [each for each in of_split(TUNE) if each.label <= 0.5], "calibrate"),
        evaluation.score(rig, fitted, of_split(REPORT), "report"),
        {
            name: evaluation.score(rig, fitted, exchanges.of_prompts(each, rig.tokenizer), f"padding {name}")
            for name, each in padded_prompts(prompts, options.padded).items()
        },
    )  # fmt: skip
    found = figures(measured)
    if options.guards:
        write_guards(options.guards, "harmful-request", fitted, found, prompts=True)
    return found


def write_guards(folder: Path, name: str, fitted: Fitted, found: dict[str, Any], prompts: bool = False) -> None:
    """Write the guards that were measured: that of the probe, and that of the token model with its model."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = f"{name}-token-ids"
    scores = {name: fitted.probe, tokens: guard_training.save_tokens(folder / f"{tokens}.safetensors", fitted.tokens)}
    for (each, score), arm in zip(scores.items(), (RESIDUAL, TOKENS), strict=True):
        guard = guard_training.guard_of(each, score, guard_training.DECAY, found["arms"][arm]["level"], prompts)
        messages.write(folder / f"{each}.yaml", guard)


def limited(prompts: Sequence[Prompt], texts: int, training_texts: int) -> list[Prompt]:
    """Return the first prompts of each split and class."""
    members: defaultdict[tuple[str, bool], list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        members[prompt.split, prompt.label > 0.5].append(prompt)
    limits = {TRAIN: min(texts, training_texts)}
    return [prompt for (split, _), each in members.items() for prompt in each[: limits.get(split, texts)]]


def padded_prompts(prompts: Sequence[Prompt], count: int) -> dict[str, list[Prompt]]:
    """Return prompts of the report split alone, and behind benign requests of the training split in one message."""
    sides = [[p for p in prompts if p.split == REPORT and (p.label > 0.5) == side] for side in (True, False)]
    chosen = [prompt for side in sides for prompt in side[:count]]
    benign = [prompt.text for prompt in prompts if prompt.split == TRAIN and prompt.label <= 0.5]
    generator = random.Random(0)
    behind = [replace(each, text=f"{padding_of(benign, generator)}\n\n{each.text}") for each in chosen]
    return {"0": chosen, f"{PADDING_CHARACTERS} characters": behind}


def padding_of(texts: Sequence[str], generator: random.Random) -> str:
    """Return texts in random order, a line each, cut to PADDING_CHARACTERS."""
    return "\n".join(generator.sample(texts, len(texts)))[:PADDING_CHARACTERS]


def figures(measured: Measured, lengths: Sequence[int] = ()) -> dict[str, Any]:
    """Return the figures of all arms as JSON."""
    report = measured.report.exchanges
    return {
        "sites": [*measured.rig.widths],
        "latents": [*measured.fitted.latents],
        "report": {
            "positives": sum(each.label > 0.5 for each in report),
            "benign": sum(each.label <= 0.5 for each in report),
            "sections": len({each.cluster for each in report}),
        },
        "arms": {arm: evaluation.report_arm(measured, arm, lengths) for arm in ARMS},
        "cascade": evaluation.cascade(measured),
        "either": evaluation.either(measured),
        "seeds": evaluation.seeds(measured),
        "residual_probe_less_tf_idf": asdict(evaluation.difference(measured, RESIDUAL, TEXT)),
    }


def print_arms(name: str, found: dict[str, Any]) -> None:
    """Print the figures of each arm."""
    paddings = [padding for padding in next(iter(found["arms"].values())).get("padding", {}) if padding != "0"]
    table = Table(title=f"{name}: {found['report']['positives']} texts to notice, {found['report']['benign']} benign")
    for column in ("", "AUROC", "recall at 1%", "noticed", "false alarms", *(f"padding {p}" for p in paddings)):
        table.add_column(column, justify="right" if column else "left")
    for arm, each in found["arms"].items():
        shares = [percent(each[field]) for field in ("recall", "noticed", "false_alarms")]
        under = [percent(each["padding"][padding]["of_unpadded"]) for padding in paddings]
        auroc = "{value:.4f} ({low:.4f} to {high:.4f})".format(**each["auroc"])
        table.add_row(arm, auroc, *shares, *under)
    either = found["either"]
    under = [percent(either["padding"][padding]["of_unpadded"]) for padding in paddings]
    table.add_row("probe or token ids", "", "", percent(either["noticed"]), percent(either["false_alarms"]), *under)
    table.caption = "with 95 % intervals over sections; under padding: recall as a share of that without"
    out.print(table)


def percent(figure: dict[str, float]) -> str:
    """Write a share with its interval."""
    return "{:.1f} ({:.1f} to {:.1f})".format(*(100 * figure[part] for part in ("value", "low", "high")))
