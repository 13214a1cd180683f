"""`rudder policy get`: print a policy of a server as a file."""

import sys
from collections.abc import Sequence

from rudder.server.cli.arguments import add_address, command, utf8
from rudder.server.cli.policy.files import written
from rudder_client import Client


def main(argv: Sequence[str]) -> None:
    """Print a policy as YAML."""
    parser = command("policy get", "Print a policy that is in force on a server, as a file.")
    add_address(parser)
    parser.add_argument("name", type=utf8, help="name of the policy")
    args = parser.parse_args(argv)
    with Client(args.address) as client:
        sys.stdout.write(written(client.policy(args.name)))
