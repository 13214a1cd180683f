"""`rudder steer`: calibrate rows of a bundle for topics, and show them."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from rudder.sae_models import concepts
from rudder.sae_models.concepts import Candidate, Concept, Concepts
from rudder.sae_models.errors import UserError
from rudder.server.cli.arguments import add_subcommand, command, integer
from rudder.server.cli.output import err, out

if TYPE_CHECKING:
    from rudder.sae_models.analysis.steering import Settings
    from rudder.sae_models.analysis.topics import Material, Topic

EXAMPLES = """\
examples:
  rudder steer calibrate BUNDLE --model MODEL --corpus textbooks.jsonl.xz --book astronomy --book psychology
  rudder steer calibrate BUNDLE --model MODEL --corpus textbooks.jsonl.xz --topics topics.yaml
  rudder steer show BUNDLE
  rudder steer scores BUNDLE --model MODEL
"""
TOPICS = """\
a YAML file of topics is a list of mappings with `name`, one of
  book: a book of the corpus, against the others
  text: a file of text about the topic, one passage a line, against the corpus
  label: words of latents' labels
  pairs: a file of JSON lines with texts `with` and `without` the topic
and, if you like, `words`: a list of other words for it
"""


def main(argv: Sequence[str]) -> None:
    """Calibrate or show concepts."""
    args = parser().parse_args(argv)
    args.run(args)


def parser() -> argparse.ArgumentParser:
    """Build the parser."""
    steer = command("steer", "Find rows that steer towards topics, and how strongly they may.", EXAMPLES)
    group = steer.add_subparsers(required=True, metavar="command")
    add_calibrate(group)
    add_scores(group)
    showing = add_subcommand(group, "show", "show the concepts of a bundle", EXAMPLES)
    showing.set_defaults(run=show)
    showing.add_argument("bundle", type=Path, help="folder of the bundle")
    return steer


def add_calibrate(group: Any) -> None:
    """Add `steer calibrate`."""
    text = "calibrate rows for topics, and write them into BUNDLE/concepts.yaml, in place of concepts of the same names"
    action = add_subcommand(group, "calibrate", text, f"{EXAMPLES}\n{TOPICS}")
    action.set_defaults(run=calibrate)
    add_material(action)
    action.add_argument("--book", action="append", default=[], help="book of the corpus as a topic; may be repeated")
    action.add_argument("--topics", type=Path, help="YAML file of topics")
    action.add_argument("--prompts", type=integer(2, 64), default=64, help="neutral prompts (%(default)s)")
    action.add_argument("--seeds", type=integer(1), default=2, help="texts of each prompt (%(default)s)")
    action.add_argument("--random", type=integer(5), default=20, help="random directions to compare with (%(default)s)")
    action.add_argument("--credit", default="", help="attribution to store with the concepts")


def add_material(action: argparse.ArgumentParser) -> None:
    """Add what rows are found and tried on."""
    action.add_argument("bundle", type=Path, help="folder of the bundle")
    action.add_argument("--model", type=Path, required=True, help="folder of its model")
    action.add_argument("--corpus", type=Path, required=True, help="text with books: JSON lines (.jsonl, .jsonl.xz)")
    judge = "folder of another model, whose token embeddings the second judge of topics reads (by default the same)"
    action.add_argument("--judge", type=Path, help=judge)
    action.add_argument("--windows", type=integer(1), default=24, help="windows of each book (%(default)s)")


def add_scores(group: Any) -> None:
    """Add `steer scores`."""
    text = "write output and input scores of all latents into a bundle's catalogue, for searches"
    action = add_subcommand(group, "scores", text, EXAMPLES)
    action.set_defaults(run=write_scores)
    action.add_argument("bundle", type=Path, help="folder of the bundle; written anew in place")
    action.add_argument("--model", type=Path, required=True, help="folder of its model")


def write_scores(args: argparse.Namespace) -> None:
    """Write scores into a catalogue."""
    from rudder.sae_models.analysis.scores import score_bundle

    scored = score_bundle(args.bundle, args.model)
    out.print(f"{scored} latents scored in {escape(str(args.bundle))}, whose SHA-256 is another one now")


def calibrate(args: argparse.Namespace) -> None:
    """Calibrate topics one by one; each is written when it is done."""
    from rudder.sae_models.analysis import topics

    wanted = [topics.Topic(book, book=book) for book in args.book]
    wanted += topics.read_topics(args.topics) if args.topics else []
    if not wanted:
        raise UserError("topics: name some by --book or --topics")
    # A wrong topic ends the command before anything slow begins.
    for topic in wanted:
        topic.describe()
    material = topics.load_material(args.bundle, args.model, args.judge or args.model, args.corpus, args.windows)
    calibrate_topics(args, wanted, material)


def calibrate_topics(args: argparse.Namespace, wanted: Sequence["Topic"], material: "Material") -> None:
    """Calibrate topics on their material."""
    from rudder.sae_models.analysis import neutral, steering, topics
    from rudder.sae_models.analysis.candidates import site_of

    settings = steering.Settings(seeds=args.seeds, random_directions=args.random)
    content = earlier_content(args, material, settings)
    profile = topics.profile_of(material, wanted)
    prompts = neutral.PROMPTS[: args.prompts]
    room = steering.room_of(material.voice, site_of(material.bundle), prompts, settings.seeds)
    for topic in wanted:
        concept = topics.calibrate(material, room, profile, topic, settings)
        content = concepts.with_concept(content, concept)
        concepts.write(args.bundle / concepts.FILE, content)
        print_concepts(content, [concept])


def earlier_content(args: argparse.Namespace, material: "Material", settings: "Settings") -> Concepts:
    """Return the bundle's file of concepts, without any if there is none.

    UserError: its concepts are of another model or SAE, or were calibrated otherwise.
    """
    from rudder.sae_models.bundle.bundle import weight_files

    path, manifest = args.bundle / concepts.FILE, material.bundle.manifest
    weights = {file: manifest.files[file] for file in weight_files(manifest)}
    record, credit = settings.record(material.voice, args.prompts), args.credit or manifest.training.credit
    empty = Concepts(manifest.name, manifest.site, manifest.model.sha256, weights, record, (), credit)
    if not path.is_file():
        return empty
    earlier = concepts.read(path)
    if concepts.fits(earlier, manifest.name, manifest.site, manifest.model.sha256, manifest.files):
        raise UserError(f"{path}: its concepts are of another model or SAE: remove it")
    if concepts.rounded(concepts.plain(earlier.calibration)) != concepts.rounded(concepts.plain(record)):
        raise UserError(f"{path}: its concepts were calibrated otherwise: remove it, or use the same options")
    return earlier


def show(args: argparse.Namespace) -> None:
    """Print the concepts of a bundle."""
    content = concepts.read(args.bundle / concepts.FILE)
    print_concepts(content, content.concepts)


def print_concepts(content: Concepts, chosen: Sequence[Concept]) -> None:
    """Print a table of concepts, each with its candidates."""
    columns = ("concept", "rows", "strength 1", "limit", "KL", "response", "95 %", "random", "")
    table = Table(*columns, title=f"{content.bundle}, {content.site}", title_justify="left")
    for concept in chosen:
        for number, candidate in enumerate(concept.candidates):
            name = f"[bold]{escape(concept.name)}[/]" if number == 0 else ""
            table.add_row(name, *figures_of(candidate))
    out.print(table)
    for concept in chosen:
        err.print(f"[dim]{escape(concept.name)}: {escape(concept.source)}[/]")


def figures_of(candidate: Candidate) -> list[str]:
    """Format the figures of a candidate."""
    response = candidate.response
    return [
        f"{candidate.kind} ({len(candidate.rows)})",
        f"{candidate.s_max:.3f} ||x||",
        candidate.limit,
        f"{concepts.kl_at(candidate.curve, candidate.s_max):.2f}",
        f"{response.value:.3f}",
        f"{response.low:.3f}-{response.high:.3f}",
        f"{candidate.random:.3f}",
        "[red]inert[/]" if candidate.inert else "",
    ]
