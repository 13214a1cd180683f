"""`rudder config`: show a server's configuration."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rudder.sae_models import settings
from rudder.server import config as configuration
from rudder.server.cli.arguments import add_fields, add_subcommand, command, parse_fields

EXAMPLES = """\
examples:
  rudder config example > server.yaml
  rudder config show --config server.yaml --engine.rows 512
"""


def main(argv: Sequence[str]) -> None:
    """Print the configuration of a command line, or an example with help texts."""
    parser = command("config", "Show the configuration of a server.", EXAMPLES)
    group = parser.add_subparsers(required=True, metavar="command", dest="action")
    show = add_subcommand(group, "show", "print the configuration that a file and fields give, as a file")
    show.usage = "rudder config show [--config FILE] [--section.field VALUE ...]"
    show.add_argument("--config", type=Path, metavar="FILE", help="YAML file of the configuration")
    add_fields(show, configuration.Config)
    add_subcommand(group, "example", "print a configuration file with the defaults and the help text of each field")
    if argv[:1] == ["show"]:
        args, fields = parse_fields(show, argv[1:])
        sys.stdout.write(configuration.show(configuration.load(args.config, fields)))
        return
    parser.parse_args(argv)
    lines = ["# rudder serve --config FILE", *settings.example(configuration.Config)]
    sys.stdout.write("\n".join(lines) + "\n")
