"""`rudder probe`: train the score of a guard, calibrate its level, and write both as a guard or a policy."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from rudder.sae_models.activations import corpus
from rudder.sae_models.activations.corpus import ContextRule
from rudder.sae_models.analysis import exchanges, guard, guard_training
from rudder.sae_models.analysis import program as messages
from rudder.sae_models.analysis.derive import Topic
from rudder.sae_models.analysis.exchanges import REPORT, TRAIN, TUNE, Exchange
from rudder.sae_models.analysis.guard import Guard
from rudder.sae_models.analysis.guard_figures import highest
from rudder.sae_models.analysis.guard_training import FALSE_ALARMS, Decided, Ranked, Rig, by_class, decided, ranked
from rudder.sae_models.analysis.probe_training import Linear, TrainingSettings
from rudder.sae_models.bundle.bundle import read_manifest
from rudder.sae_models.errors import UserError
from rudder.sae_models.files import write_atomically
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
# Exchanges of a corpus: the tokens of each, the most of a section, and the most of a book.
TRAIN_TOKENS, TRAIN_PER_SECTION = 256, 4
LONGEST = 1000
PER_BOOK = 1000


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
    train.add_argument("--policy", action="store_true", help="write a policy that binds all callers, with this guard")
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


def train_guard(options: argparse.Namespace) -> None:
    """Train, calibrate, measure and write a guard."""
    rig = guard_training.load_rig(options.model, options.site, rule_of(options.bundle))
    splits = splits_of_corpus(options, rig) if options.corpus else splits_of_prompts(options, rig)
    name = options.name or "-".join(options.topic) or options.prompts.name.partition(".")[0]
    probes = fit(rig, splits, options)
    score, probe = guard_training.served(name, probes, rig)
    benign = [exchange for exchange in splits.tune if exchange.label <= 0.5]
    calibration = rig.scores({name: guard_training.linear(probe)}, benign, "calibrate")[name]
    trained = guard_training.guard_of(name, score, calibration, options.decay, options.false_alarms)
    guarded, seeds = measure(rig, splits, trained, probe, probes)
    description = describe(splits, len(benign), guarded, options)
    messages.write(options.out, policy_of(trained, description) if options.policy else trained)
    print_figures(trained, guarded, seeds)
    if options.report:
        report = {"guard": name, "level": trained.level, "calibrated_on": len(benign), "description": description}
        content = {**report, "served": asdict(guarded), "seeds": [asdict(seed) for seed in seeds]}
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
    benign = dict.fromkeys(set(books) - set(topic.books), PER_BOOK)
    train = exchanges.of_corpus(documents, rig.tokenizer, topic, TRAIN, TRAIN_TOKENS, limits, TRAIN_PER_SECTION)
    tune = exchanges.of_corpus(documents, rig.tokenizer, topic, TUNE, LONGEST, benign)
    report = exchanges.of_corpus(documents, rig.tokenizer, topic, REPORT, LONGEST, dict.fromkeys(books, PER_BOOK))
    return Splits(train, tune, report, topic.neighbours)


def splits_of_prompts(options: argparse.Namespace, rig: Rig) -> Splits:
    """Read labelled prompts. UserError by line and field."""
    if options.topic or options.neighbour:
        raise UserError("topic, neighbour: belong to --corpus")
    prompts = exchanges.of_prompts(exchanges.read_prompts(options.prompts), rig.tokenizer, chat=not options.text)
    train, tune, report = ([each for each in prompts if each.split == split] for split in (TRAIN, TUNE, REPORT))
    return Splits(train, tune, report)


def fit(rig: Rig, splits: Splits, options: argparse.Namespace) -> list[Linear]:
    """Train a probe with each seed."""
    guard_training.weights_of(splits.train)
    settings = TrainingSettings(options.window, options.temperature, weight_decay=options.weight_decay)
    inputs = [x for x, _ in rig.features(splits.train, "read")]
    sample = guard_training.sample_of(inputs, splits.train, splits.neighbours)
    return guard_training.fit_seeds(sample, settings, options.seeds)


def measure(
    rig: Rig, splits: Splits, trained: Guard, probe: Linear, seeds: Sequence[Linear]
) -> tuple[Decided, list[Ranked]]:
    """Return the figures of the guard, and of each seed's probe, on the report split."""
    arms = {str(number): guard_training.linear(each) for number, each in enumerate([probe, *seeds])}
    scores = rig.scores(arms, splits.report, "report")
    sides = [by_class(splits.report, highest(scores[arm], trained.statistic)) for arm in arms]
    return decided(*sides[0], trained.level), [ranked(*side) for side in sides[1:]]


def describe(splits: Splits, benign: int, figures: Decided, options: argparse.Namespace) -> str:
    """Say how a guard was made and what it does, for those who read its file."""
    source = ", ".join(options.topic) or options.prompts.name
    return (
        f"Notices {source}: a linear probe at {', '.join(options.site)}, the mean of {options.seeds} seeds trained on "
        f"{len(splits.train)} texts. Level: exceeded by {options.false_alarms:.1%} of benign texts, by split conformal "
        f"prediction from {benign}. On {figures.positives} other texts to notice and {figures.benign} benign ones: "
        f"AUROC {figures.auroc.value:.4f}, noticed {figures.noticed.value:.1%}, false alarms "
        f"{figures.false_alarms.value:.2%} (at most {figures.upper_bound:.2%} with 95 % confidence)."
    )


def policy_of(trained: Guard, description: str) -> guard.Policy:
    """Return a policy with this guard that binds all callers."""
    return guard.Policy(trained.name, description, 1, guard.Binding(all=True), (trained,))


def print_figures(trained: Guard, guarded: Decided, seeds: Sequence[Ranked]) -> None:
    """Print the figures of the guard and of each seed."""
    table = Table(title=f"{trained.name}: level {trained.level:g}, on the report split")
    for column in ("", "AUROC", f"recall at {FALSE_ALARMS:.0%}", "noticed", "false alarms", "at most"):
        table.add_column(column, justify="right" if column else "left")
    for seed, each in enumerate(seeds):
        table.add_row(f"seed {seed}", f"{each.auroc.value:.4f}", f"{each.recall.value:.1%}")
    recalls = (f"{figure.value:.1%}" for figure in (guarded.recall, guarded.noticed))
    alarms = f"{guarded.false_alarms.value:.2%}", f"{guarded.upper_bound:.2%}"
    table.add_row("served", f"{guarded.auroc.value:.4f}", *recalls, *alarms)
    out.print(table)
