"""`rudder eval`: measure what steering, policies and guards do. One module of this package per evaluation."""

from collections.abc import Sequence

from rudder.server.cli.arguments import run_module

EXAMPLES = """\
examples:
  rudder eval guards --help
  rudder eval steering BUNDLE --model MODEL --corpus textbooks.jsonl.xz --book astronomy --json steering.json
"""
EVALUATIONS = {
    "unlearning": "forgetting, retention, neighbours and fluency of programs, with controls",
    "guards": "how well guards tell a topic or a harmful request, under padding and in streams",
    "steering": "topics reached at bounded cost in fluency, against controls",
    "redteam": "attacks on a server that policies protect, each with a control",
}


def main(argv: Sequence[str]) -> int:
    """Run an evaluation."""
    return run_module(
        __name__, EVALUATIONS, argv, "Measure what steering, policies and guards do.", EXAMPLES, "evaluation"
    )
