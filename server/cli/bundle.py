"""`rudder bundle`: import published SAEs as bundles, check bundles, and label their latents.

Nothing heavy is imported before a command runs.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from rudder.sae_models.errors import UserError
from rudder.server.cli.arguments import add_subcommand, command, integer
from rudder.server.cli.output import err, out, print_error

if TYPE_CHECKING:
    from rudder.sae_models.evaluation.label_score import LabelScores
    from rudder.sae_models.importing.check import Report
    from rudder.sae_models.importing.convention import Comparison
    from rudder.sae_models.importing.importer import ImportRequest, ImportResult

HOLDS, FAILS = 0, 1
CORPUS = "JSON lines (.jsonl or .jsonl.xz) with `text` and, if known, `book`, `module`, `title`"
EMBEDDER = "store embeddings of the labels, by a sentence embedder such as sentence-transformers/all-MiniLM-L6-v2"
EXAMPLES = """\
examples:
  rudder bundle import REPOSITORY --model MODEL --corpus TEXT.jsonl --out BUNDLE
  rudder bundle check BUNDLE --model MODEL --corpus TEXT.jsonl
  rudder bundle label BUNDLE --model MODEL --corpus TEXT.jsonl
  rudder bundle explain BUNDLE --endpoint http://localhost:8000/v1
"""
EXPLAIN_KEY = "The key of the endpoint is read from OPENAI_API_KEY. Answers are kept in BUNDLE.explanations.jsonl."
CHECK_STATUS = "exit status: 0 all holds, 1 something does not, 2 it could not be checked"
IMPORT_STATUS = "exit status: 0 the bundle is written, 1 it was refused, 2 something could not be read"


def main(argv: Sequence[str]) -> int:
    """Import or check a bundle."""
    args = parser().parse_args(argv)
    status: int = args.run(args)
    return status


def parser() -> argparse.ArgumentParser:
    """Build the parser."""
    bundle = command("bundle", "Import, check and label SAE bundles.", EXAMPLES)
    group = bundle.add_subparsers(required=True, metavar="command")
    add_import(group)
    add_check(group)
    add_label(group)
    add_explain(group)
    return bundle


def add_import(group: Any) -> None:
    """Add `bundle import`."""
    action = add_subcommand(group, "import", "make a bundle of a published SAE", f"{EXAMPLES}\n{IMPORT_STATUS}")
    action.set_defaults(run=run_import)
    source = "a file or folder, repository[@revision][:subfolder] on Hugging Face, or SAELens release/id"
    action.add_argument("source", help=source)
    action.add_argument("--model", type=Path, required=True, help="folder of the model that the SAE was trained on")
    action.add_argument("--out", type=Path, required=True, help="folder of the bundle; its name is the bundle's name")
    sites = "layers.<L>.<point> that it reads, where the source does not say; repeat for an SAE with a router"
    action.add_argument("--site", action="append", default=[], help=sites)
    action.add_argument("--output-site", default="", help="site that it predicts, where that is another (transcoders)")
    action.add_argument("--corpus", type=Path, help=f"text to measure on and describe latents with: {CORPUS}")
    action.add_argument(
        "--tokens", type=integer(1), default=500_000, help="approximate tokens of the corpus (%(default)s)"
    )
    action.add_argument("--labels", type=Path, help="labels of the latents: a Neuronpedia export, file or folder")
    action.add_argument("--labels-model", default="", help="name of the model in the labels, if not its own")
    action.add_argument(
        "--labels-set", default="", help="name of this SAE's set in the labels, such as 20-gemmascope-res-16k"
    )
    action.add_argument("--embedder", default="", help=EMBEDDER)
    action.add_argument("--credit", default="", help="attribution to store with the bundle")
    action.add_argument("--accept", action="store_true", help="import even if L0 or FVU contradict the convention")


def add_check(group: Any) -> None:
    """Add `bundle check`."""
    text = "verify a bundle; with its model and text, also its L0 and FVU, and which convention fits best"
    action = add_subcommand(group, "check", text, f"{EXAMPLES}\n{CHECK_STATUS}")
    action.set_defaults(run=run_check)
    action.add_argument("bundle", type=Path, help="folder of the bundle")
    action.add_argument("--model", type=Path, help="folder of its model")
    action.add_argument("--corpus", type=Path, help=f"text to measure on, with --model: {CORPUS}")
    action.add_argument("--json", action="store_true", help="print the report as JSON")


def add_label(group: Any) -> None:
    """Add `bundle label`."""
    text = "label a bundle's latents anew from a corpus, and score the labels on text that they were not made from"
    action = add_subcommand(group, "label", text, EXAMPLES)
    action.set_defaults(run=run_label)
    action.add_argument("bundle", type=Path, help="folder of the bundle; written anew in place")
    action.add_argument("--model", type=Path, required=True, help="folder of its model")
    action.add_argument("--corpus", type=Path, required=True, help=f"text to label from: {CORPUS}")
    action.add_argument(
        "--tokens", type=integer(1), default=1_000_000, help="approximate tokens of the corpus (%(default)s)"
    )


def add_explain(group: Any) -> None:
    """Add `bundle explain`."""
    text = "label a bundle's latents by a language model behind an OpenAI-compatible endpoint, scored by detection"
    action = add_subcommand(group, "explain", text, f"{EXAMPLES}\n{EXPLAIN_KEY}")
    action.set_defaults(run=run_explain)
    action.add_argument("bundle", type=Path, help="folder of the bundle; written anew in place")
    action.add_argument("--endpoint", required=True, metavar="URL", help="address, such as http://localhost:8000/v1")
    action.add_argument("--explainer", default="", help="name of the model there; by default the first that it lists")
    action.add_argument("--latents", type=integer(), nargs="+", default=[], help="latents to explain; by default all")
    action.add_argument("--limit", type=integer(1), help="maximum number of latents to explain now")


def run_import(args: argparse.Namespace) -> int:
    """Import an SAE; FAILS where the bundle is refused."""
    from rudder.sae_models.bundle.bundle import BundleError
    from rudder.sae_models.formats import hub
    from rudder.sae_models.formats.load import load
    from rudder.sae_models.importing import importer as importing

    try:
        release = None if Path(args.source).exists() else hub.release(args.source)
        checkpoint = load(hub.resolve(args.source), release.overrides if release else {})
        loaded = importing.with_input_scale(checkpoint, release.scaling if release else None)
        err.print(f"{escape(loaded.format)}: {escape(loaded.why)}")
        for key, note in loaded.declared.notes.items():
            if isinstance(note, str | int | float):
                err.print(f"[dim]{escape(key)}: {escape(str(note))}[/]")
        if assumptions := importing.assumed_scale(loaded.declared):
            err.print(f"[bold yellow]ASSUMED[/] {escape(assumptions)}")
        print_imported(importing.import_sae(loaded, importing.source_of(loaded, args.source), wish_of(args)))
    except (BundleError, importing.ImportRefused) as error:
        print_error(error)
        return FAILS
    return HOLDS


def run_check(args: argparse.Namespace) -> int:
    """Check a bundle; FAILS where something does not hold."""
    from rudder.sae_models.bundle.bundle import BundleError
    from rudder.sae_models.importing import check

    if args.corpus and not args.model:
        raise UserError("--corpus: needs --model, to compute the activations that the SAE reads")
    require_bundle(args.bundle)
    try:
        report = check.check_bundle(args.bundle, args.model, args.corpus)
    except BundleError as error:
        print_error(error)
        return FAILS
    sys.stdout.write(as_json(report) + "\n") if args.json else print_report(report)
    return HOLDS if report.holds else FAILS


def run_label(args: argparse.Namespace) -> int:
    """Label a bundle; FAILS where the bundle is damaged or of another model."""
    from rudder.sae_models.bundle.bundle import BundleError
    from rudder.sae_models.importing.relabel import relabel

    require_bundle(args.bundle)
    try:
        print_scores(relabel(args.bundle, args.model, args.corpus, args.tokens))
    except BundleError as error:
        print_error(error)
        return FAILS
    return HOLDS


def run_explain(args: argparse.Namespace) -> int:
    """Explain latents of a bundle; FAILS where the bundle is damaged."""
    from rudder.sae_models.bundle.bundle import BundleError
    from rudder.sae_models.bundle.catalogue import ALL
    from rudder.sae_models.evaluation import explanations

    require_bundle(args.bundle)
    model, ask = explanations.endpoint(args.endpoint, args.explainer, os.environ.get("OPENAI_API_KEY") or "none")
    request = explanations.Request(tuple(args.latents), args.limit or ALL)
    try:
        known = explanations.explain(args.bundle, model, ask, request)
    except BundleError as error:
        print_error(error)
        return FAILS
    used, useless = sum(entry.holds for entry in known), sum(bool(entry.problem) for entry in known)
    counts = f"{used} explanations better than chance, which are labels now; {useless} useless answers"
    out.print(f"{len(known)} latents explained by {escape(model)}: {counts}")
    return HOLDS


def require_bundle(folder: Path) -> None:
    """Raise UserError unless a folder is there."""
    if not folder.is_dir():
        raise UserError(f"bundle: {folder} is not a folder")


def print_scores(scores: "LabelScores") -> None:
    """Print a summary of label scores."""
    if not scores.scored:
        out.print("no label score: no latent is active in enough documents")
        return
    low, high = scores.quartiles
    out.print(f"label score: median {scores.median:.3f}, quartiles {low:.3f} to {high:.3f}, of {scores.scored} latents")
    out.print(f"mean by activity {scores.by_activity:.3f}; {scores.labelled:.1%} of active latents have a label")


def wish_of(args: argparse.Namespace) -> "ImportRequest":
    """Convert the arguments to the importer's request."""
    from rudder.sae_models.importing.importer import ImportRequest

    same = ("model", "out", "output_site", "corpus", "tokens", "embedder", "accept", "credit")
    labels = ("labels", "labels_model", "labels_set")
    return ImportRequest(sites=tuple(args.site), **{name: getattr(args, name) for name in same + labels})


def print_imported(imported: "ImportResult") -> None:
    """Print the new bundle, its measurements and the labels that were taken."""
    content, training = imported.bundle.manifest, imported.bundle.manifest.training
    out.print(f"[bold]{escape(str(imported.bundle.path))}[/]  {content.architecture}, reads {', '.join(content.sites)}")
    out.print(f"{content.latents} latents of width {content.d}, {content.dtype}, sha256 {imported.bundle.sha256}")
    if not imported.bundle.measured:
        out.print("[yellow]not measured: without --corpus there are no maximum activations, frequencies and figures[/]")
    else:
        fvu = "no FVU, its latents write to many layers" if training.fvu is None else f"FVU {training.fvu:.4g}"
        out.print(f"L0 {training.l0 or 0:.4g}, {fvu}, {training.dead_share or 0:.2%} of latents never active")
    if imported.labels:
        labels = imported.labels
        skipped = f"{labels.empty} without text, {labels.repeated} for a latent that has one"
        out.print(f"{len(labels.by_latent)} labels taken of {labels.records} records; skipped: {skipped}")
        out.print(f"label set: {escape(labels.label_set)}")
    if imported.verdict:
        out.print(verdict_table(imported.verdict))


def print_report(report: "Report") -> None:
    """Print the table of findings, and that of conventions."""
    table = Table("", "field", "", title=escape(report.name), title_justify="left")
    for finding in report.findings:
        mark = "[green]holds[/]" if finding.holds else "[bold red]FAILS[/]"
        table.add_row(mark, finding.field, escape(finding.detail))
    out.print(table)
    if report.verdict:
        out.print(verdict_table(report.verdict))


def verdict_table(verdict: "Comparison") -> Table:
    """Build the table of the conventions under which the SAE was read, best first."""
    table = Table("convention", "L0", "FVU", "misfit", "how to apply it", title="conventions", title_justify="left")
    for fit in verdict.fits:
        style = "bold" if fit is verdict.declared else ""
        figures = (f"{fit.l0:.1f}", f"{fit.fvu:.4g}", f"{fit.misfit:.2f}")
        table.add_row(escape(fit.name), *figures, escape(fit.cure), style=style)
    return table


def as_json(report: "Report") -> str:
    """Write the report as JSON."""
    return json.dumps({"holds": report.holds, **asdict(report)}, indent=2)
