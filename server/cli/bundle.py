"""`rudder bundle`: makes bundles of other people's SAEs, and verifies bundles.

Nothing heavy is imported before a command runs.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from rudder.sae_models.importing.check import Report
    from rudder.sae_models.importing.convention import Comparison
    from rudder.sae_models.importing.importer import ImportRequest, ImportResult

HOLDS, FAILS, CANNOT = 0, 1, 2
CORPUS = "JSON lines (.jsonl or .jsonl.xz) with `text` and, if known, `book`, `module`, `title`"
EMBEDDER = "store the labels' meanings, by a sentence embedder such as sentence-transformers/all-MiniLM-L6-v2"
CHECK_STATUS = "exit status: 0 all holds, 1 something does not, 2 it could not be checked"
IMPORT_STATUS = "exit status: 0 the bundle is written, 1 it was refused, 2 something could not be read"

out = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def add_bundle(commands: Any) -> None:
    """The commands `bundle import` and `bundle check`."""
    group = commands.add_parser("bundle", help="make and verify SAE bundles")
    actions = group.add_subparsers(required=True, metavar="command")
    _add_import(actions)
    _add_check(actions)


def _add_import(actions: Any) -> None:
    text = "make a bundle of a published SAE"
    command = actions.add_parser("import", help=text, description=text, epilog=IMPORT_STATUS)
    command.set_defaults(run=run_import)
    source = "a file or folder, repository[@revision][:subfolder] on Hugging Face, or SAELens release/id"
    command.add_argument("source", help=source)
    command.add_argument("--model", type=Path, required=True, help="folder of the model that the SAE was trained on")
    command.add_argument("--out", type=Path, required=True, help="folder of the bundle; its name is the bundle's name")
    sites = "layers.<L>.<point> that it reads, where the source does not say; repeat for an SAE with a router"
    command.add_argument("--site", action="append", default=[], help=sites)
    command.add_argument("--output-site", default="", help="that it explains, where that is another (transcoders)")
    command.add_argument("--corpus", type=Path, help=f"text to measure on and describe latents with: {CORPUS}")
    command.add_argument("--tokens", type=int, default=500_000, help="of the corpus, about (%(default)s)")
    command.add_argument("--labels", type=Path, help="labels of the latents: a Neuronpedia export, file or folder")
    command.add_argument("--labels-model", default="", help="what the labels call the model, if not by its name")
    command.add_argument("--embedder", default="", help=EMBEDDER)
    command.add_argument("--credit", default="", help="line of attribution to keep with the bundle")
    command.add_argument("--accept", action="store_true", help="import though L0 or FVU speak against the convention")


def _add_check(actions: Any) -> None:
    text = "verify a bundle; with its model and text, also how sparse and faithful it is, and which convention fits"
    command = actions.add_parser("check", help="verify a bundle", description=text, epilog=CHECK_STATUS)
    command.set_defaults(run=run_check)
    command.add_argument("bundle", type=Path, help="folder of the bundle")
    command.add_argument("--model", type=Path, help="folder of the model that it is for")
    command.add_argument("--corpus", type=Path, help=f"text to measure on, with --model: {CORPUS}")
    command.add_argument("--json", action="store_true", help="print the report as JSON")


def run_import(args: argparse.Namespace) -> int:
    """`rudder bundle import`."""
    from rudder.sae_models.formats import hub
    from rudder.sae_models.formats.load import load
    from rudder.sae_models.importing import importer as importing

    def make() -> int:
        known = None if Path(args.source).exists() else hub.release(args.source)
        loaded = importing.with_input_scale(load(hub.resolve(args.source)), known.scaling if known else None)
        err.print(f"{escape(loaded.format)}: {escape(loaded.why)}")
        for key, note in loaded.declared.notes.items():
            if isinstance(note, str | int | float):
                err.print(f"[dim]{escape(key)}: {escape(str(note))}[/]")
        if taken := importing.assumed_scale(loaded.declared):
            err.print(f"[bold yellow]ASSUMED[/] {escape(taken)}")
        tell_imported(importing.import_sae(loaded, importing.source_of(loaded, args.source), wish_of(args)))
        return HOLDS

    return answered(make)


def run_check(args: argparse.Namespace) -> int:
    """`rudder bundle check`."""
    from rudder.sae_models.importing import check as checking

    def look() -> int:
        if args.corpus and not args.model:
            raise ValueError("--corpus: needs --model, which makes the text into what the SAE reads")
        if not args.bundle.is_dir():
            raise FileNotFoundError(f"bundle: {args.bundle} is not a folder")
        report = checking.check_bundle(args.bundle, args.model, args.corpus)
        sys.stdout.write(as_json(report) + "\n") if args.json else tell_report(report)
        return HOLDS if report.holds else FAILS

    return answered(look)


def answered(command: Callable[[], int]) -> int:
    """The exit status of a command that reads foreign files; what is wrong with them goes to standard error."""
    from rudder.sae_models.activations.corpus import CorpusError
    from rudder.sae_models.bundle.bundle import BundleError
    from rudder.sae_models.bundle.semantic import MeaningUnknown
    from rudder.sae_models.evaluation.labels import LabelError
    from rudder.sae_models.formats.source import FormatError
    from rudder.sae_models.importing.importer import ImportRefused

    try:
        return command()
    except (
        BundleError,
        ImportRefused,
        FormatError,
        LabelError,
        MeaningUnknown,
        CorpusError,
        OSError,
        ValueError,
    ) as error:
        err.print(f"[bold red]rudder:[/] {escape(str(error))}")
        return FAILS if isinstance(error, BundleError | ImportRefused) else CANNOT


def wish_of(args: argparse.Namespace) -> "ImportRequest":
    """What the command line asks for."""
    from rudder.sae_models.importing.importer import ImportRequest

    same = ("model", "out", "output_site", "corpus", "tokens", "labels", "labels_model", "embedder", "accept", "credit")
    return ImportRequest(sites=tuple(args.site), **{name: getattr(args, name) for name in same})


def tell_imported(imported: "ImportResult") -> None:
    """What was made, and what it was made from."""
    content, training = imported.bundle.manifest, imported.bundle.manifest.training
    out.print(f"[bold]{escape(str(imported.bundle.path))}[/]  {content.architecture}, reads {', '.join(content.sites)}")
    out.print(f"{content.latents} latents of width {content.d}, {content.dtype}, sha256 {imported.bundle.sha256}")
    if not imported.bundle.measured:
        out.print("[yellow]not measured: without --corpus there are no maximum activations, frequencies and figures[/]")
    else:
        fvu = "no FVU, its latents write to many layers" if training.fvu is None else f"FVU {training.fvu:.4g}"
        out.print(f"L0 {training.l0 or 0:.4g}, {fvu}, {training.dead_share or 0:.2%} of latents never active")
    if imported.labels:
        found = imported.labels
        left = f"{found.empty} records without text, {found.repeated} for a latent that had one"
        out.print(f"{len(found.by_latent)} labels taken of {found.records} records; {left}")
    if imported.verdict:
        out.print(verdict_table(imported.verdict))


def tell_report(report: "Report") -> None:
    """A table of findings, and one of conventions."""
    table = Table("", "field", "", title=escape(report.name), title_justify="left")
    for finding in report.findings:
        mark = "[green]holds[/]" if finding.holds else "[bold red]FAILS[/]"
        table.add_row(mark, finding.field, escape(finding.detail))
    out.print(table)
    if report.verdict:
        out.print(verdict_table(report.verdict))


def verdict_table(verdict: "Comparison") -> Table:
    """Every reading of the SAE, best first."""
    table = Table("reading", "L0", "FVU", "misfit", "to get there", title="conventions", title_justify="left")
    for fit in verdict.fits:
        style = "bold" if fit is verdict.declared else ""
        figures = (f"{fit.l0:.1f}", f"{fit.fvu:.4g}", f"{fit.misfit:.2f}")
        table.add_row(escape(fit.name), *figures, escape(fit.cure), style=style)
    return table


def as_json(report: "Report") -> str:
    """The report for programs."""
    return json.dumps({"holds": report.holds, **asdict(report)}, indent=2)
