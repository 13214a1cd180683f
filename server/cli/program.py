"""`rudder program`: derive the shipped programs from a labelled corpus, and measure what a program costs."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from rudder.sae_models.activations import corpus, harvest
from rudder.sae_models.activations.hooks import parse_site
from rudder.sae_models.analysis import derive
from rudder.sae_models.analysis import program as programs
from rudder.sae_models.analysis.derive import Material
from rudder.sae_models.analysis.shipped import SHIPPED
from rudder.sae_models.analysis.unlearning import books
from rudder.sae_models.bundle import bundle
from rudder.sae_models.errors import UserError
from rudder.sae_models.evaluation import splicing as metrics
from rudder.server.cli.arguments import add_subcommand, command, integer
from rudder.server.cli.output import out

EXAMPLES = """\
examples:
  rudder program derive --corpus textbooks.jsonl.xz --bundle BUNDLE --model MODEL --out PROGRAMS
  rudder program evaluate --corpus textbooks.jsonl.xz --bundle BUNDLE --model MODEL --program FILE --twin TWIN
"""
CORPUS = "JSON lines (.jsonl or .jsonl.xz) with `text`, `book`, `module`"


def main(argv: Sequence[str]) -> None:
    """Derive or evaluate programs."""
    args = parser().parse_args(argv)
    args.run(args)


def parser() -> argparse.ArgumentParser:
    """Build the parser."""
    program = command("program", "Derive and evaluate the programs of a bundle.", EXAMPLES)
    group = program.add_subparsers(required=True, metavar="command")
    deriving = add_subcommand(group, "derive", "make the programs that ship with the demonstration model", EXAMPLES)
    deriving.set_defaults(run=write_programs)
    deriving.add_argument("--out", type=Path, required=True, help="folder of the programs' YAML files")
    evaluating = add_subcommand(
        group, "evaluate", "print the loss per book on held-out sections, with and without a program", EXAMPLES
    )
    evaluating.set_defaults(run=print_losses)
    evaluating.add_argument("--program", type=Path, required=True, help="YAML file of the program")
    evaluating.add_argument("--twin", type=Path, help="folder of a model trained without the topic, to compare with")
    evaluating.add_argument(
        "--windows", type=integer(1), default=24, help="maximum number of windows of each book (%(default)s)"
    )
    for action in (deriving, evaluating):
        action.add_argument("--corpus", type=Path, required=True, help=CORPUS)
        action.add_argument("--bundle", type=Path, required=True, help="folder of an SAE bundle")
        action.add_argument("--model", type=Path, required=True, help="folder of the bundle's model")
        action.add_argument(
            "--length", type=integer(2), default=256, help="tokens of a window, BOS included (%(default)s)"
        )
    return program


def material(options: argparse.Namespace) -> Material:
    """Load the bundle, check it against its model, and cut the corpus into windows."""
    loaded = bundle.load(options.bundle)
    trunk = harvest.load_trunk(options.model, parse_site(loaded.manifest.site))
    bundle.check_model(loaded, bundle.model_sha256(options.model), trunk.config.hidden_size)
    documents = corpus.read(options.corpus)
    context = loaded.manifest.context
    # Begun as the server begins a text, and without what it leaves out.
    rule = corpus.ContextRule(excluded_positions=context.excluded_positions, excluded_tokens=context.excluded_tokens)
    windows = corpus.windows(documents, harvest.load_tokenizer(options.model), options.length, rule)
    return derive.material_of(loaded, trunk, documents, windows)


def write_programs(options: argparse.Namespace) -> None:
    """Write one YAML file per shipped program."""
    source = material(options)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, derive_program in SHIPPED.items():
        programs.write(options.out / f"{name}.yaml", derive_program(source, name))
        print(options.out / f"{name}.yaml")


def print_losses(options: argparse.Namespace) -> None:
    """Print the table of losses by book, largest rise first."""
    program = programs.read(options.program)
    twin = load_twin(options.twin, options.model) if options.twin else None
    source = material(options)
    windows = derive.sample_windows(source, corpus.HELD_OUT_FOLDS, dict.fromkeys(source.books, options.windows))
    model = harvest.load_model(options.model)
    plain, of_twin = metrics.losses(model, windows), metrics.losses(twin, windows) if twin else None
    losses = books.losses_by_book(
        model, source.trunk, source.bundle, program, windows, source.documents, plain, of_twin
    )
    table = Table(title=f"{program.name}: nats per token on held-out sections")
    for column in ("book", "tokens", "without", "with", "rise", "touched", *(("twin", "gap") if twin else ())):
        table.add_column(column, justify="left" if column == "book" else "right")
    for book in losses:
        rise = f"{book.edited - book.plain:+.3f}"
        compared = ["" if figure is None else f"{figure:.3f}" for figure in (book.twin, book.gap)] if twin else []
        figures = f"{book.tokens:,}", f"{book.plain:.3f}", f"{book.edited:.3f}", rise, f"{book.touched:.2%}"
        table.add_row(book.book, *figures, *compared)
    if twin:
        table.caption = "gap: the rise as a share of the twin's; 1: as if the model had not been trained on the topic"
    out.print(table)


def load_twin(folder: Path, model: Path) -> Any:
    """Load the twin. UserError: its vocabulary is not the model's."""
    theirs, ours = (harvest.load_tokenizer(each).get_vocab() for each in (folder, model))
    if theirs != ours:
        raise UserError(f"twin: {folder} reads other tokens than {model}: their losses cannot be compared")
    return harvest.load_model(folder)
