"""`rudder eval`: measure what steering, policies and guards do. One module of this package per evaluation."""

import importlib
from collections.abc import Sequence

from rudder.server.cli.arguments import command

EXAMPLES = """\
examples:
  rudder eval guards --help
"""
EVALUATIONS = {
    "unlearning": "forgetting, retention, neighbours and fluency of programs, with controls",
    "guards": "how well guards tell a topic or a harmful request, under padding and in streams",
    "steering": "topics reached at bounded cost in fluency, against controls",
    "redteam": "attacks on a server that policies protect, each with a control",
}

EXAMPLES = """\
examples:
  rudder eval steering BUNDLE --model MODEL --corpus textbooks.jsonl.xz --book astronomy --json steering.json
"""


def main(argv: Sequence[str]) -> int:
    """Run an evaluation."""
    if argv and argv[0] in EVALUATIONS:
        module = importlib.import_module(f"rudder.server.cli.eval.{argv[0]}")
        status: int | None = module.main(argv[1:])
        return status or 0
    parser = command("eval", "Measure what steering, policies and guards do.", EXAMPLES)
    group = parser.add_subparsers(required=True, metavar="evaluation")
    for name, text in EVALUATIONS.items():
        group.add_parser(name, help=text, add_help=False)
    parser.parse_args(argv)
    return 0
