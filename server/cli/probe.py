"""`rudder probe`: train the score of a guard, calibrate its level, and write both as a guard or a policy."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from rudder.sae_models.activations import corpus
from rudder.sae_models.activations.corpus import ContextRule
from rudder.sae_models.analysis import exchanges, guard, guard_training
from rudder.sae_models.analysis import program as messages
from rudder.sae_models.analysis.derive import Topic
from rudder.sae_models.analysis.exchanges import REPORT, TRAIN, TUNE, Exchange
from rudder.sae_models.analysis.guard import Guard, Score
from rudder.sae_models.analysis.guard_figures import highest
from rudder.sae_models.analysis.guard_training import (
    FALSE_ALARMS,
    Decided,
    Ranked,
    Rig,
    Scorer,
    by_class,
    decided,
    ranked,
)
from rudder.sae_models.analysis.probe_training import Linear, Sample, TrainingSettings, fit_linear
from rudder.sae_models.analysis.token_training import fit_tokens
from rudder.sae_models.bundle.bundle import read_manifest
from rudder.sae_models.errors import UserError
from rudder.sae_models.files import write_atomically
from rudder.sae_models.token_model import vocabulary_sha256
from rudder.server.cli.arguments import add_subcommand, command, integer, number
from rudder.server.cli.output import out

EXAMPLES = """\
examples:
  rudder probe train --model MODEL --site layers.2.resid_post --corpus textbooks.jsonl.xz --topic microbiology \\
      --neighbour anatomy-physiology --neighbour chemistry --out microbiology.yaml
  rudder probe train --model MODEL --site layers.9.resid_post --site layers.14.resid_post --prompts prompts.jsonl \\
      --name harmful-request --out policies/harmful-request.yaml --policy
"""
CORPUS = "JSON lines (.jsonl or .jsonl.xz) with `text`, `book`, `module`"
PROMPTS = "JSON lines with `text`, `harmful` or `label` (0 to 1), and `split`: train, tune or report"
# Exchanges of a corpus: the most tokens of each, and the most of a section in training.
TRAIN_TOKENS, TRAIN_PER_SECTION = 256, 4
LONGEST = 1000


def main(argv: Sequence[str]) -> None:
    """Train a probe."""
    args = parser().parse_args(argv)
    args.run(args)


def parser() -> argparse.ArgumentParser:
    """Build the parser."""
    probe = command("probe", "Train the scores of guards.", EXAMPLES)
    group = probe.add_subparsers(required=True, metavar="command")
    train = add_subcommand(group, "train", "train a linear probe, and calibrate a guard on it", EXAMPLES)
    train.set_defaults(run=train_guard)
    train.add_argument("--model", type=Path, required=True, help="folder of the model")
    train.add_argument("--site", action="append", required=True, help="where to read; several: their scores add")
    source = train.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus", type=Path, help=CORPUS)
    source.add_argument("--prompts", type=Path, help=PROMPTS)
    train.add_argument("--topic", action="append", default=[], help="of --corpus: a book to notice")
    train.add_argument("--neighbour", action="append", default=[], help="of --corpus: a benign book close to the topic")
    train.add_argument("--text", action="store_true", help="of --prompts: plain texts, not messages of a chat")
    exclusions = "bundle that the server serves, whose excluded tokens no statistic counts"
    train.add_argument("--bundle", type=Path, action="append", default=[], help=exclusions)
    train.add_argument("--name", default="", help="of the guard (default: the topic, or the file of the prompts)")
    add_settings(train)
    train.add_argument("--out", type=Path, required=True, help="YAML file of the guard")
    train.add_argument(
        "--token-model",
        type=Path,
        help="safetensors file: train a model of token ids too, which has a guard of its own",
    )
    train.add_argument("--policy", action="store_true", help="write a policy that binds all callers")
    train.add_argument("--report", type=Path, help="JSON file of the figures")
    return probe


def add_settings(train: argparse.ArgumentParser) -> None:
    """Add the parameters of training and of the level."""
    settings = TrainingSettings()
    for name, kind, default, text in (
        (
            "--windows",
            integer(1),
            400,
            "of --corpus: training texts of the topic; as many of its neighbours, and of others",
        ),
        ("--sections", integer(1), 1000, "of --corpus: of each benign book, at most, to calibrate and to report"),
        ("--window", integer(1), settings.window, "tokens of training's sliding window"),
        ("--temperature", number(1e6), settings.temperature, "of training's weights"),
        ("--weight-decay", number(1e6), settings.weight_decay, "of training"),
        ("--seeds", integer(1, 100), guard_training.SEEDS, "trained, then averaged"),
        ("--decay", number(1), guard_training.DECAY, "of the served moving average"),
        ("--false-alarms", number(0.5), FALSE_ALARMS, "share of benign texts that set it off"),
    ):
        train.add_argument(name, type=kind, default=default, help=f"{text} (%(default)s)")


@dataclass(frozen=True)
class Splits:
    """Exchanges by split; `neighbours`: their groups that are hardest to tell from positives."""

    train: list[Exchange]
    tune: list[Exchange]
    report: list[Exchange]
    neighbours: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arm:
    """A score as the guard's file has it, and what computes it."""

    score: Score
    scorer: Scorer
    what: str


def train_guard(options: argparse.Namespace) -> None:
    """Train, calibrate, measure and write a guard, or two."""
    rig = guard_training.load_rig(options.model, options.site, rule_of(options.bundle))
    splits = splits_of_corpus(options, rig) if options.corpus else splits_of_prompts(options, rig)
    name = options.name or "-".join(options.topic) or options.prompts.name.partition(".")[0]
    arms, seeds = fit(rig, splits, name, options)
    benign = [exchange for exchange in splits.tune if exchange.label <= 0.5]
    calibration = rig.scores({each: arm.scorer for each, arm in arms.items()}, benign, "calibrate")
    guards = [
        guard_training.calibrated(
            each, arm.score, calibration[each], options.decay, options.false_alarms, prompts=options.corpus is None
        )
        for each, arm in arms.items()
    ]
    figures, ranks = measure(rig, splits, arms, guards, seeds)
    descriptions = [describe(arms[each.name].what, splits, len(benign), figures[each.name], options) for each in guards]
    write(guards, descriptions, options)
    print_figures(guards, figures, ranks)
    if options.report:
        entries = [
            {"guard": each.name, "level": each.level, "calibrated_on": len(benign), **asdict(figures[each.name])}
            for each in guards
        ]
        content = {"guards": entries, "seeds": [asdict(rank) for rank in ranks], "description": descriptions}
        write_atomically(options.report, json.dumps(content, indent=2).encode() + b"\n")


def rule_of(bundles: Sequence[Path]) -> ContextRule:
    """Return what a server of these bundles leaves out of every statistic."""
    contexts = [read_manifest(path)[0].context for path in bundles]
    positions = {position for context in contexts for position in context.excluded_positions}
    tokens = {token for context in contexts for token in context.excluded_tokens}
    return ContextRule(excluded_positions=tuple(sorted(positions)), excluded_tokens=tuple(sorted(tokens)))


def splits_of_corpus(options: argparse.Namespace, rig: Rig) -> Splits:
    """Cut the sections of a labelled corpus into exchanges. UserError: a book of the options is not in it."""
    if not options.topic:
        raise UserError("topic: --corpus needs the book to notice")
    documents, topic = corpus.read(options.corpus), Topic(tuple(options.topic), tuple(options.neighbour))
    exchanges.check_topic(topic, documents)
    books = sorted({document.book for document in documents})
    groups = [set(topic.books), set(topic.neighbours), set(books) - {*topic.books, *topic.neighbours}]
    limits = {book: -(-options.windows // len(group)) for group in groups for book in group}
    benign = dict.fromkeys(set(books) - set(topic.books), options.sections)
    everything = benign | dict.fromkeys(topic.books, len(documents))
    pieces = exchanges.of_corpus(documents, rig.tokenizer, topic, TRAIN, TRAIN_TOKENS, limits, TRAIN_PER_SECTION)
    train = exchanges.behind_benign(pieces, LONGEST, rig.tokenizer)
    tune = exchanges.of_corpus(documents, rig.tokenizer, topic, TUNE, LONGEST, benign)
    report = exchanges.of_corpus(documents, rig.tokenizer, topic, REPORT, LONGEST, everything)
    return Splits(train, tune, report, topic.neighbours)


def splits_of_prompts(options: argparse.Namespace, rig: Rig) -> Splits:
    """Read labelled prompts. UserError by line and field."""
    if options.topic or options.neighbour:
        raise UserError("topic, neighbour: belong to --corpus")
    prompts = exchanges.of_prompts(exchanges.read_prompts(options.prompts), rig.tokenizer, chat=not options.text)
    train, tune, report = ([each for each in prompts if each.split == split] for split in (TRAIN, TUNE, REPORT))
    return Splits(train, tune, report)


def fit(rig: Rig, splits: Splits, name: str, options: argparse.Namespace) -> tuple[dict[str, Arm], list[Linear]]:
    """Train a probe with each seed and, if asked for, a token model: the arm of each guard, and the probes."""
    guard_training.weights_of(splits.train)
    settings = TrainingSettings(options.window, options.temperature, weight_decay=options.weight_decay)
    collected = list(rig.features(splits.train, "read"))
    sample = guard_training.sample_of([x for x, _ in collected], splits.train, splits.neighbours)
    probes = fit_linear(sample, settings, options.seeds)
    score, probe = guard_training.served(name, probes, rig)
    what = f"a linear probe at {', '.join(rig.widths)}, the mean of {options.seeds} seeds"
    arms = {name: Arm(score, guard_training.linear(probe), what)}
    if options.token_model:
        arms[f"{name}-token-ids"] = fit_token_model(rig, [ids for _, ids in collected], sample, options.token_model)
    return arms, probes


def fit_token_model(rig: Rig, texts: Sequence[Sequence[int]], sample: Sample, path: Path) -> Arm:
    """Train a token model and write its file."""
    model = fit_tokens(texts, sample.label, sample.weight, vocabulary_sha256(rig.tokenizer.get_vocab()))
    what = f"n-grams of up to {model.order} token ids, without activations"
    return Arm(guard_training.save_tokens(path, model), lambda _, ids: model.scores(ids), what)


def measure(
    rig: Rig, splits: Splits, arms: Mapping[str, Arm], guards: Sequence[Guard], seeds: Sequence[Linear]
) -> tuple[dict[str, Decided], list[Ranked]]:
    """Return the figures of each guard, and of each seed's probe, on the report split."""
    scorers = {name: arm.scorer for name, arm in arms.items()}
    scorers |= {str(seed): guard_training.linear(probe) for seed, probe in enumerate(seeds)}
    scores = rig.scores(scorers, splits.report, "report")
    statistic = guards[0].statistic
    sides = {name: by_class(splits.report, highest(each, statistic)) for name, each in scores.items()}
    figures = {each.name: decided(*sides[each.name], each.level) for each in guards}
    return figures, [ranked(*sides[str(seed)]) for seed in range(len(seeds))]


def write(guards: Sequence[Guard], descriptions: Sequence[str], options: argparse.Namespace) -> None:
    """Write the guards as one policy that binds all callers, or each in a file of its own."""
    if options.policy:
        binds, description = guard.Binding(all=True), " ".join(descriptions)
        messages.write(options.out, guard.Policy(guards[0].name, description, 1, binds, tuple(guards)))
        return
    for each, path in zip(guards, (options.out, options.token_model and beside(options.token_model)), strict=False):
        messages.write(path, each)


def beside(path: Path) -> Path:
    """Return the path of the guard that reads a token model."""
    return path.with_suffix(".yaml")


def describe(what: str, splits: Splits, benign: int, figures: Decided, options: argparse.Namespace) -> str:
    """Say how a guard was made and what it does, for those who read its file."""
    source = ", ".join(options.topic) or options.prompts.name
    return (
        f"Notices {source} by {what}, trained on {len(splits.train)} texts. Level: exceeded by "
        f"{options.false_alarms:.1%} of benign texts, by split conformal prediction from {benign}. On "
        f"{figures.positives} other texts to notice and {figures.benign} benign ones: AUROC "
        f"{figures.auroc.value:.4f}, noticed {figures.noticed.value:.1%}, false alarms "
        f"{figures.false_alarms.value:.2%} (at most {figures.upper_bound:.2%} with 95 % confidence)."
    )


def print_figures(guards: Sequence[Guard], figures: Mapping[str, Decided], seeds: Sequence[Ranked]) -> None:
    """Print the figures of each guard, and of each seed of the probe."""
    table = Table(title="on the report split")
    for column in ("", "level", "AUROC", f"recall at {FALSE_ALARMS:.0%}", "noticed", "false alarms", "at most"):
        table.add_column(column, justify="right" if column else "left")
    for each in guards:
        found = figures[each.name]
        recalls = (f"{figure.value:.1%}" for figure in (found.recall, found.noticed))
        alarms = f"{found.false_alarms.value:.2%}", f"{found.upper_bound:.2%}"
        table.add_row(each.name, f"{each.level:g}", f"{found.auroc.value:.4f}", *recalls, *alarms)
    for seed, rank in enumerate(seeds):
        table.add_row(f"seed {seed}", "", f"{rank.auroc.value:.4f}", f"{rank.recall.value:.1%}")
    out.print(table)
