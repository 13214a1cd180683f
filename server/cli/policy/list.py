"""`rudder policy list`: the policies in force on a server."""

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from rudder.server.cli.arguments import add_address, command
from rudder.server.cli.output import out
from rudder.v1 import policy_pb2
from rudder_client import Client

SHOWN_DIGEST = 12


def main(argv: Sequence[str]) -> None:
    """Print a table of the policies."""
    parser = command("policy list", "List the policies in force on a server.")
    add_address(parser)
    args = parser.parse_args(argv)
    with Client(args.address) as client:
        policies = client.policies()
    table = Table("policy", "version", "mode", "guards", "certificate", "digest", "description")
    for policy in policies:
        mode = "shadow" if policy.mode == policy_pb2.POLICY_MODE_SHADOW else "enforce"
        names = (policy.name, str(policy.version), mode, ", ".join(policy.guards), policy.certificate)
        table.add_row(*map(escape, names), policy.digest[:SHOWN_DIGEST], escape(policy.description))
    out.print(table if policies else "no policy is in force")
