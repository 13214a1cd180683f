"""`rudder inspect`: show the features of each token of a text."""

from collections.abc import Sequence

from rudder.server.cli.arguments import add_prompt, command, connect, integer, program_of, prompt_of
from rudder.server.cli.output import inspection_table, out, pooled_table
from rudder_client import Report

EXAMPLES = """\
examples:
  rudder inspect "Viruses infect cells."
  rudder inspect - --top 5 --program forget-microbiology < text.txt
"""


def main(argv: Sequence[str]) -> None:
    """Print the strongest features of each token, and of the whole text."""
    parser = command("inspect", "Show the features of each token of a text.", EXAMPLES)
    add_prompt(parser)
    parser.add_argument("--top", type=integer(), default=3, metavar="K", help="features per token (%(default)s)")
    args = parser.parse_args(argv)
    with connect(args) as client:
        report = Report(top_k=args.top, pooled=True)
        inspection = client.inspect(prompt_of(args), steer=program_of(args), report=report)
    out.print(inspection_table(inspection, args.top))
    out.print(pooled_table(inspection.pooled))
