"""`rudder eval steering`: ways to steer towards topics, compared at equal cost."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from rudder.sae_models import concepts
from rudder.sae_models.errors import UserError
from rudder.sae_models.files import write_atomically
from rudder.server.cli.arguments import command, integer
from rudder.server.cli.output import err, out
from rudder.server.cli.steer import add_material

if TYPE_CHECKING:
    from rudder.sae_models.analysis.arms import Chosen, Stage
    from rudder.sae_models.analysis.topics import Material

REACHED, MISSED = 0, 1
EXAMPLES = """\
examples:
  rudder eval steering BUNDLE --model MODEL --corpus textbooks.jsonl.xz --judge TWIN --json steering.json
  rudder eval steering BUNDLE --model MODEL --corpus textbooks.jsonl.xz --book astronomy --book psychology --quick

exit status: 0 the bar is reached, 1 it is not, 2 something could not be read
"""
# Norms of the displacement as shares of ||x||.
DOSES, QUICK_DOSES = (0.07, 0.1, 0.15, 0.2, 0.3, 0.45, 0.65, 1.0), (0.1, 0.2, 0.3, 0.45, 0.65)
PROMPTS, QUICK_PROMPTS, QUICK_CONCEPTS = 32, 12, 3
PROMPT_WORDS = 16
# The bar, at doses within the budgets: share of the difference of means' topic share, and multiple of random's.
OF_MEANS, OF_RANDOM = 0.8, 3.0
FIGURES = ("topic_share", "topic_share_without_own_words", "score", "perplexity_ratio", "repetition", "kept", "kl")
# Of these, so many with their interval in the table; all have it in the JSON.
WITH_INTERVAL = 4


def main(argv: Sequence[str]) -> int:
    """Compare arms; MISSED if the bar is not reached."""
    args = parser().parse_args(argv)
    books = wanted_books(args)
    from rudder.sae_models.analysis import topics

    material = topics.load_material(args.bundle, args.model, args.judge or args.model, args.corpus, args.windows)
    result: dict[str, Any] = {}
    for result in evaluate(args, books, material):
        err.print(f"[dim]{', '.join(result['concepts'])}: done[/]")
        if args.json:
            write_atomically(args.json, json.dumps(result, indent=2).encode() + b"\n")
    print_result(result)
    return REACHED if all(bar["reached"] for bar in result["bars"].values()) else MISSED


def parser() -> argparse.ArgumentParser:
    """Build the parser."""
    steering = command("eval steering", "Compare ways to steer towards topics, at equal cost in fluency.", EXAMPLES)
    add_material(steering)
    steering.add_argument("--book", action="append", default=[], help="topic; by default those of BUNDLE/concepts.yaml")
    steering.add_argument("--prompts", type=integer(4), help=f"prompts per half and topic ({PROMPTS})")
    steering.add_argument("--quick", action="store_true", help="fewer topics, prompts and doses")
    steering.add_argument("--json", type=Path, help="file to write the result to")
    return steering


def wanted_books(args: argparse.Namespace) -> list[str]:
    """Return the topics to compare on; with --quick, unless they are named, the first few. UserError: there is none."""
    path = args.bundle / concepts.FILE
    known = [concept.name for concept in concepts.read(path).concepts] if path.is_file() and not args.book else []
    books = args.book or known
    if not books:
        raise UserError(f"book: name some, as there is no {path}")
    return list(books[:QUICK_CONCEPTS] if args.quick and not args.book else books)


def evaluate(args: argparse.Namespace, books: Sequence[str], material: "Material") -> Iterator[dict[str, Any]]:
    """Compare the arms topic by topic; yield the result on the topics so far, as plain values."""
    from rudder.sae_models.analysis import topics

    profile = topics.profile_of(material, [])
    prompts = args.prompts or (QUICK_PROMPTS if args.quick else PROMPTS)
    by_concept, judged = {}, judges_record(material)
    for book in books:
        stages = stages_of(material, book, prompts)
        by_concept[book] = compare(material, profile, book, stages, QUICK_DOSES if args.quick else DOSES)
        yield {**summarise(by_concept), **judged, "prompts": prompts}


def stages_of(material: "Material", book: str, prompts: int) -> tuple["Stage", "Stage"]:
    """Return the stages on which doses are chosen and texts are reported: beginnings of passages of other books."""
    from rudder.sae_models.activations import corpus
    from rudder.sae_models.analysis import arms, candidates, judges, steering

    others = [document for document in material.documents if document.book != book]
    site, per_book = candidates.site_of(material.bundle), 1 + prompts // 8
    texts = [
        judges.passages_of(others, folds, per_book).texts for folds in (corpus.TUNING_FOLDS, corpus.HELD_OUT_FOLDS)
    ]
    beginnings = (arms.prompts_of(half, PROMPT_WORDS)[:: max(1, len(half) // prompts)][:prompts] for half in texts)
    rooms = (steering.room_of(material.voice, site, half, 1) for half in beginnings)
    tune, report = (arms.stage_of(room, material.panel, material.readers[1][0]) for room in rooms)
    return tune, report


def compare(
    material: "Material", profile: Any, book: str, stages: tuple["Stage", "Stage"], doses: Sequence[float]
) -> dict[str, "Chosen"]:
    """Run all arms on one topic."""
    from rudder.sae_models.analysis import arms, candidates, topics
    from rudder.sae_models.analysis.crossing import Budgets

    ranking = topics.ranking_of(material, topics.Topic(book, book=book), profile)
    scores = candidates.scores_of(material.voice, material.bundle, ranking.latents)
    groups = candidates.groups_of(material.bundle, ranking, scores.output)
    tried = arms.arms_of(material.bundle, groups, profile.difference_of_means(book))
    found = {arm.name: arms.choose(*stages, arm, book, doses, Budgets()) for arm in tried}
    return {
        **found,
        "sae": arms.best_of_sae(found),
        "prompting": arms.prompted(stages[1], book),
        "unsteered": arms.unsteered(stages[1], book),
    }


def judges_record(material: "Material") -> dict[str, Any]:
    """Return what is compared, and how well the judges do on held-out passages."""
    from rudder.sae_models.activations import corpus
    from rudder.sae_models.analysis import judges

    held_out = judges.passages_of(material.documents, corpus.HELD_OUT_FOLDS, 40)
    accuracy, agreement = material.panel.accuracy(held_out), material.panel.agreement(held_out.texts)
    manifest = material.bundle.manifest
    record = {"accuracy": accuracy, "agreement": agreement, "topics": len(held_out.topics)}
    return {"model": manifest.model.name, "bundle": manifest.name, "judges": record}


def summarise(by_concept: Mapping[str, Mapping[str, "Chosen"]]) -> dict[str, Any]:
    """Return figures of each arm over all topics, the bars, and by topic the doses and topic shares."""
    from rudder.sae_models.analysis import arms

    # A ranking of few latents has fewer distinct groups: an arm is compared where every topic has it.
    names = [name for name in next(iter(by_concept.values())) if all(name in found for found in by_concept.values())]
    figures = {name: arm_figures([found[name] for found in by_concept.values()], by_concept) for name in names}
    return {
        "concepts": list(by_concept),
        "arms": {name: {k: asdict(arms.estimate(v)) for k, v in each.items()} for name, each in figures.items()},
        "bars": bars_of({name: each["topic_share"] for name, each in figures.items()}),
        "per_concept": {
            book: {name: plain(each) for name, each in found.items()} for book, found in by_concept.items()
        },
    }


def plain(chosen: "Chosen") -> dict[str, float]:
    """Return the doses of an arm on one topic, and the topic share within the budgets."""
    share = float((chosen.at_within.response >= 0.5).float().mean())
    return {"best": chosen.best, "within": chosen.within, "topic_share": share}


def arm_figures(chosen: Sequence["Chosen"], by_concept: Mapping[str, Mapping[str, "Chosen"]]) -> dict[str, Any]:
    """Return resampled means of an arm's figures: the score at the dose of the best one, all others within the budgets.

    The perplexity ratio is to unsteered texts of the same prompts.
    """
    from rudder.sae_models.analysis.arms import resampled

    within = [each.at_within for each in chosen]
    plain = resampled([found["unsteered"].at_within.nats for found in by_concept.values()])
    return {
        "topic_share": resampled([(each.response >= 0.5).float() for each in within]),
        "topic_share_without_own_words": resampled([(each.response_without >= 0.5).float() for each in within]),
        "score": resampled([each.at_best.score for each in chosen]),
        "perplexity_ratio": (resampled([each.nats for each in within]) - plain).exp(),
        "repetition": resampled([each.repeated for each in within]),
        "kept": resampled([each.kept for each in within]),
        "kl": resampled([each.kl for each in within]),
    }


def bars_of(share: Mapping[str, Any]) -> dict[str, Any]:
    """Return the bars: the topic share of the SAE's rows less what it must reach, and whether it does."""
    from rudder.sae_models.analysis.arms import estimate

    wanted = {
        f"{OF_MEANS:g} of difference-of-means": OF_MEANS * share["difference-of-means"],
        f"{OF_RANDOM:g} times random": OF_RANDOM * share["random"],
    }
    margins = {name: estimate(share["sae"] - least) for name, least in wanted.items()}
    # Where nothing is reached, nothing is shown.
    reached = {name: margin.value >= 0 and float(share["sae"][0]) > 0 for name, margin in margins.items()}
    return {
        name: {"margin": asdict(margin), "reached": reached[name], "certain": reached[name] and margin.low >= 0}
        for name, margin in margins.items()
    }


def print_result(result: Mapping[str, Any]) -> None:
    """Print the table of arms, and the bars."""
    columns = [name.replace("_", " ") for name in FIGURES]
    table = Table("arm", *columns, title=f"{result['bundle']}: {', '.join(result['concepts'])}", title_justify="left")
    for name, each in result["arms"].items():
        intervals = [
            f"{f['value']:.2f} ({f['low']:.2f}-{f['high']:.2f})" for f in map(each.get, FIGURES[:WITH_INTERVAL])
        ]
        table.add_row(name, *intervals, *(f"{each[figure]['value']:.2f}" for figure in FIGURES[WITH_INTERVAL:]))
    out.print(table)
    for name, bar in result["bars"].items():
        margin, verdict = bar["margin"], "reached" if bar["reached"] else "[bold red]missed[/]"
        interval = f"{margin['value']:+.3f} ({margin['low']:+.3f} to {margin['high']:+.3f})"
        out.print(f"at least {name}: {verdict}, by {interval} of topic share")
