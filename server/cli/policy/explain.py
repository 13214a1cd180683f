"""`rudder policy explain`: which policies bind a caller, and what they lock and forbid, in words."""

from collections.abc import Sequence

from rich.markup import escape

from rudder.server.cli.arguments import add_address, command, utf8
from rudder.server.cli.output import out
from rudder_client import Client

EXAMPLES = """\
examples:
  rudder policy explain
  rudder policy explain --caller alice --roles generate,observe
"""


def main(argv: Sequence[str]) -> None:
    """Print one sentence a line."""
    parser = command("policy explain", "Say which policies bind a caller, and what they lock and forbid.", EXAMPLES)
    add_address(parser)
    parser.add_argument("--caller", type=utf8, default="", help="id of a caller (yourself)")
    parser.add_argument("--roles", type=utf8, default="", help="roles of that caller, separated by commas")
    args = parser.parse_args(argv)
    with Client(args.address) as client:
        explanation = client.explain(args.caller, [role for role in args.roles.split(",") if role])
    for statement in explanation.statements:
        out.print(escape(statement))
