"""`rudder debug`: what an operator looks into when a server does not behave."""

import argparse
import time
from collections.abc import Sequence

from rich.table import Table

from rudder.server.cli.arguments import add_address, add_subcommand, command, connect, number
from rudder.server.cli.output import out
from rudder.v1 import debug_pb2
from rudder_client import Client

EXAMPLES = """\
examples:
  rudder debug ledger
  rudder debug ledger --wait 10 && echo "nothing is held"
"""
CHECK_S = 0.2


def main(argv: Sequence[str]) -> int:
    """Run a command."""
    debug = command("debug", "Look into a running server. Needs the role administer.", EXAMPLES)
    group = debug.add_subparsers(required=True, metavar="command")
    ledger = add_subcommand(group, "ledger", "show what calls hold of a server", EXAMPLES)
    add_address(ledger)
    ledger.add_argument(
        "--wait",
        type=number(3600),
        metavar="SECONDS",
        help="until nothing is held; exit status 1 if something still is",
    )
    args = debug.parse_args(argv)
    with connect(args) as client:
        return show(client, args)


def show(client: Client, args: argparse.Namespace) -> int:
    """Print the ledger; return 1 if something is held that should not be."""
    response = client.ledger() if args.wait is None else wait_empty(client, args.wait)
    table = Table("held by calls", "")
    for name, value in sorted(response.held.items()):
        table.add_row(name, f"{value:g}")
    out.print(table)
    out.print("process: " + ", ".join(f"{name} {value:.0f}" for name, value in sorted(response.process.items())))
    return int(args.wait is not None and any(response.held.values()))


def wait_empty(client: Client, seconds: float) -> debug_pb2.GetLedgerResponse:
    """Return the first ledger in which nothing is held, or the last one after so many seconds."""
    deadline = time.monotonic() + seconds
    while any((response := client.ledger()).held.values()) and time.monotonic() < deadline:
        time.sleep(CHECK_S)
    return response
