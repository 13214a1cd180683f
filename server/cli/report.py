"""`rudder report`: write the HTML report of a training run."""

from collections.abc import Sequence
from pathlib import Path

from rudder.sae_models.training import report
from rudder.server.cli.arguments import command


def main(argv: Sequence[str]) -> None:
    """Write the report, and print its path."""
    parser = command(
        "report",
        "Write report.html into the folder of a training run, from its config.yaml and metrics.jsonl.",
        "example:\n  rudder report runs/textbook",
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    print(report.write(parser.parse_args(argv).run))
