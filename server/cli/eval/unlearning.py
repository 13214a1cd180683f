"""`rudder eval unlearning`: how well programs make a topic inaccessible, and at what cost, against a model's twin."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from rudder.sae_models import PRETRAINED
from rudder.sae_models.activations import harvest
from rudder.sae_models.analysis import program as programs
from rudder.sae_models.analysis.derive import Topic
from rudder.sae_models.analysis.unlearning import report as reports
from rudder.sae_models.analysis.unlearning import study as studies
from rudder.sae_models.analysis.unlearning.material import FULL, QUICK, gather
from rudder.sae_models.analysis.unlearning.rig import Rig
from rudder.sae_models.bundle import bundle
from rudder.server.cli.arguments import command, integer
from rudder.server.cli.output import err, out
from rudder.server.cli.program import CORPUS, load_twin

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
    rig = rig_of(args)
    topic = Topic(tuple(args.topic), tuple(args.neighbours))
    material = gather(rig, args.corpus, topic, QUICK if args.quick else FULL)
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
    folders = {
        "--model": ("textbook-lm", "folder of the model"),
        "--twin": ("textbook-lm-twin", "folder of the same model trained without the topic"),
        "--bundle": ("textbook-lm-layers.2", "folder of an SAE bundle of the model"),
        "--program": ("programs/forget-microbiology.yaml", "YAML file of a program to compare as it is"),
    }
    for name, (default, text) in folders.items():
        unlearning.add_argument(name, type=Path, default=PRETRAINED / default, help=f"{text} (that of the demo)")
    unlearning.add_argument("--threads", type=integer(1), help="of PyTorch")
    return unlearning


def rig_of(args: argparse.Namespace) -> Rig:
    """Load the model, its twin and the bundle. UserError: they do not fit."""
    loaded, model = bundle.load(args.bundle), harvest.load_model(args.model)
    bundle.check_model(loaded, bundle.model_sha256(args.model), model.config.hidden_size)
    return Rig(model, load_twin(args.twin, args.model), harvest.load_tokenizer(args.model), loaded)


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
    if note := reports.changed(report):
        err.print(note)
