"""`rudder policy apply`: put a policy file in force on a server."""

from collections.abc import Sequence

from rich.markup import escape

from rudder.server.cli.arguments import add_address, command
from rudder.server.cli.output import out
from rudder.server.cli.policy.files import add_file
from rudder.server.program.named import read_policy
from rudder_client import Client

DESCRIPTION = """\
Put a policy in force on a running server, in place of the one of its name. Running calls keep the version that they
began with. The server forgets it when it stops: what is to stay belongs into policies.folder.
"""


def main(argv: Sequence[str]) -> None:
    """Apply a policy and print what is in force now."""
    parser = command("policy apply", DESCRIPTION)
    add_address(parser)
    add_file(parser)
    args = parser.parse_args(argv)
    with Client(args.address) as client:
        summary = client.apply(read_policy(args.file))
    out.print(f"{escape(summary.name)}, version {summary.version}, is in force: {summary.digest}")
