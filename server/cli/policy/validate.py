"""`rudder policy validate`: check a policy file against a configuration or a running server."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from rudder.server import config as configuration
from rudder.server.cli.arguments import add_fields, command, parse_fields, utf8
from rudder.server.cli.output import err, out
from rudder.server.cli.policy.files import add_file
from rudder.server.program.named import read_policy
from rudder.v1 import policy_pb2

DESCRIPTION = """\
Name every problem of a policy file: with --address those that it has on that server, else those that it would have on
one with this configuration, whose bundles are loaded and whose model is not.
"""
EXAMPLES = """\
examples:
  rudder policy validate POLICY.yaml --config server.yaml
  rudder policy validate POLICY.yaml --address localhost:50051
"""
Problems = Sequence[tuple[str, str]]


def main(argv: Sequence[str]) -> int:
    """Print all problems; return 0 if there is none, else 1."""
    usage = "rudder policy validate POLICY.yaml [--address HOST:PORT | --config FILE] [--section.field VALUE ...]"
    parser = command("policy validate", DESCRIPTION, EXAMPLES, usage)
    add_file(parser)
    parser.add_argument("--address", type=utf8, help="of a running server")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of a configuration")
    add_fields(parser, configuration.Config)
    args, fields = parse_fields(parser, argv)
    policy = read_policy(args.file)
    problems = on_server(args.address, policy) if args.address else offline(args, fields, policy)
    for field, text in problems:
        err.print(f"[bold red]{escape(str(args.file))}:[/] {escape(field)}: {escape(text)}")
    if not problems:
        out.print(f"{escape(policy.name)}, version {policy.version}: no problem")
    return int(bool(problems))


def on_server(address: str, policy: policy_pb2.Policy) -> Problems:
    """Return the problems that a policy has on a running server."""
    from rudder_client import Client

    with Client(address) as client:
        return [(problem.field, problem.description) for problem in client.validate(policy)]


def offline(args: argparse.Namespace, fields: dict[str, str], policy: policy_pb2.Policy) -> Problems:
    """Return the problems that a policy would have on a server of a configuration."""
    from rudder.server.preflight import check
    from rudder.server.safety.offline import problems_offline

    config = check(configuration.load(args.config, fields))
    return problems_offline(policy, config, args.file.parent)
