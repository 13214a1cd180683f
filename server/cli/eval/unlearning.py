"""`rudder eval unlearning`: how well programs make a topic inaccessible, and at what cost, against a model's twin."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from rudder.sae_models import PRETRAINED
from rudder.sae_models.analysis import program as programs
from rudder.sae_models.analysis.unlearning import report as reports
from rudder.sae_models.analysis.unlearning import study as studies
from rudder.sae_models.analysis.unlearning.material import FULL, QUICK, gather
from rudder.server.cli.arguments import command, integer
from rudder.server.cli.output import err, out
from rudder.server.cli.program import CORPUS
from rudder.server.cli.rig import add_rig, rig_of, topic_of

EXAMPLES = """\
examples:
  rudder eval unlearning --corpus textbooks.jsonl.xz --json unlearning.json --plot unlearning.png
  rudder eval unlearning --corpus textbooks.jsonl.xz --json quick.json --quick
"""


def main(argv: Sequence[str]) -> None:
    """Run the study, write its report and print it."""
    args = parser().parse_args(argv)
    earlier = reports.earlier_reports(args.json)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    material = gather(rig_of(args), args.corpus, topic_of(args), QUICK if args.quick else FULL)
    present = programs.read(args.program) if args.program else None
    report = reports.report_of(studies.run(material, present, args.store), earlier)
    reports.write(args.json, report)
    if args.plot:
        reports.plot(report, args.plot)
    print_report(report)


def parser() -> argparse.ArgumentParser:
    """Build the parser."""
    unlearning = command(
        "eval unlearning",
        "Compare ways to make a topic inaccessible through a server, cross-fitted, with intervals and controls.",
        EXAMPLES,
    )
    unlearning.add_argument("--corpus", type=Path, required=True, help=f"{CORPUS}, `glossary`")
    unlearning.add_argument("--json", type=Path, required=True, help="file of the report")
    unlearning.add_argument("--plot", type=Path, help="PNG file of the plot")
    unlearning.add_argument("--quick", action="store_true", help="a small sample: minutes")
    unlearning.add_argument("--store", type=Path, help="folder of outcomes, so that a run that was stopped goes on")
    unlearning.add_argument("--topic", nargs="+", default=["microbiology"], help="books to forget (%(default)s)")
    unlearning.add_argument(
        "--neighbours", nargs="*", default=["anatomy-physiology", "chemistry"], help="books near them (%(default)s)"
    )
    add_rig(unlearning)
    unlearning.add_argument(
        "--program",
        type=Path,
        default=PRETRAINED / "programs" / "forget-microbiology.yaml",
        help="YAML file of a program to compare as it is (that of the demo)",
    )
    unlearning.add_argument("--threads", type=integer(1), help="of PyTorch")
    return unlearning


def print_report(report: reports.Report) -> None:
    """Print the table, the bars, and whether the reported folds were looked at before."""
    table = Table("method", *(name.replace("_", " ") for name in reports.TABLE), title="Unlearning")
    for row in reports.table_rows(report):
        table.add_row(*row)
    table.caption = "shares in percent, with 95 % intervals over sections"
    out.print(table)
    out.print(f"chosen on the folds for tuning: {report.chosen}")
    for line in reports.bars_text(report):
        out.print(line)
    for name, figure in report.controls[studies.KEYWORDS].items():
        out.print(f"{studies.KEYWORDS}: {name} {reports.cell(figure, True)} %")
    for note in filter(None, (reports.cloze_note(report), reports.changed(report))):
        err.print(note)
