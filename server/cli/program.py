"""Makes the shipped programs from a labelled corpus, and measures what a program costs each book.

python -m sae_models.analysis derive --corpus textbooks.jsonl.xz --bundle BUNDLE --model MODEL --out PROGRAMS
python -m sae_models.analysis evaluate --corpus textbooks.jsonl.xz --bundle BUNDLE --model MODEL --program FILE
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rudder.sae_models.activations import corpus, harvest
from rudder.sae_models.activations.hooks import parse_site
from rudder.sae_models.analysis import derive, unlearning
from rudder.sae_models.analysis import program as programs
from rudder.sae_models.analysis.derive import Material
from rudder.sae_models.analysis.shipped import SHIPPED
from rudder.sae_models.bundle import bundle
from rudder.sae_models.bundle.bundle import BundleError
from rudder.sae_models.evaluation import splicing as metrics


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sae_models.analysis", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--corpus", type=Path, required=True, help="JSON lines (.jsonl or .jsonl.xz) with `text`, `book`, `module`"
    )
    common.add_argument("--bundle", type=Path, required=True, help="folder of an SAE bundle")
    common.add_argument("--model", type=Path, required=True, help="folder of the model that the bundle was made for")
    common.add_argument(
        "--length", type=int, default=256, help="tokens in a window, BOS included (default %(default)s)"
    )
    making = commands.add_parser("derive", parents=[common], help="make the shipped programs")
    making.add_argument("--out", type=Path, required=True, help="folder of the programs' YAML files")
    measuring = commands.add_parser(
        "evaluate", parents=[common], help="loss by book on held-out sections, with and without a program"
    )
    measuring.add_argument("--program", type=Path, required=True, help="YAML file of the program")
    measuring.add_argument("--twin", type=Path, help="folder of a model that has never seen the topic, to compare with")
    measuring.add_argument(
        "--windows", type=int, default=24, help="at most so many windows of each book (default %(default)s)"
    )
    return parser.parse_args(argv)


def material(options: argparse.Namespace) -> Material:
    """The bundle checked against its model, and the corpus in windows."""
    loaded = bundle.load(options.bundle)
    trunk = harvest.load_trunk(options.model, parse_site(loaded.manifest.site))
    bundle.check_model(loaded, bundle.model_sha256(options.model), trunk.config.hidden_size)
    documents = corpus.read(options.corpus)
    windows = corpus.windows(documents, harvest.load_tokenizer(options.model), options.length)
    return derive.material_of(loaded, trunk, documents, windows)


def write_programs(options: argparse.Namespace) -> None:
    """One YAML file a shipped program."""
    using = material(options)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, make in SHIPPED.items():
        programs.write(options.out / f"{name}.yaml", make(using, name))
        print(options.out / f"{name}.yaml")


def print_losses(options: argparse.Namespace) -> None:
    """A table by book, most harmed first."""
    program = programs.read(options.program)
    twin = load_twin(options.twin, options.model) if options.twin else None
    using = material(options)
    windows = derive.sample_windows(using, corpus.HELD_OUT_FOLDS, dict.fromkeys(using.books, options.windows))
    model = harvest.load_model(options.model)
    plain, never = metrics.losses(model, windows), metrics.losses(twin, windows) if twin else None
    found = unlearning.losses_by_book(model, using.trunk, using.bundle, program, windows, using.documents, plain, never)
    table = Table(title=f"{program.name}: nats a token on held-out sections")
    for column in ("book", "tokens", "without", "with", "rise", "touched", *(("twin", "gap") if twin else ())):
        table.add_column(column, justify="left" if column == "book" else "right")
    for row in found:
        rise = f"{row.edited - row.plain:+.3f}"
        beside = ["" if figure is None else f"{figure:.3f}" for figure in (row.twin, row.gap)] if twin else []
        figures = f"{row.tokens:,}", f"{row.plain:.3f}", f"{row.edited:.3f}", rise, f"{row.touched:.2%}"
        table.add_row(row.book, *figures, *beside)
    if twin:
        table.caption = "gap: the rise as a share of what the twin lacks; 1 is as ignorant as a model that never saw it"
    Console().print(table)


def load_twin(folder: Path, model: Path) -> Any:
    """The twin. ValueError: it reads other tokens than the model."""
    theirs, ours = (harvest.load_tokenizer(each).get_vocab() for each in (folder, model))
    if theirs != ours:
        raise ValueError(f"twin: {folder} reads other tokens than {model}: their losses cannot be compared")
    return harvest.load_model(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 with the reason on stderr."""
    options = arguments(argv)
    try:
        write_programs(options) if options.command == "derive" else print_losses(options)
    except (BundleError, ValueError, OSError, corpus.CorpusError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
