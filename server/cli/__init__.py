"""The `rudder` command: one module of this package per command, imported when it is called."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from rudder import server
from rudder.sae_models.errors import UserError
from rudder.server.cli.output import print_error
from rudder_client import RudderError

COMMANDS = {
    "serve": "start a server",
    "config": "show the configuration of a server",
    "generate": "generate from a prompt, streamed",
    "inspect": "show the features of each token of a text",
    "features": "look up features by index or label",
    "model": "show the served model: sites, bundles, programs, limits; download or convert one",
    "bundle": "import, check and label SAE bundles",
    "train": "train SAEs",
    "answer": "write a chat corpus with a model's own answers",
    "harvest": "write the activation store of a training run with a vLLM engine",
    "report": "write the HTML report of a training run",
    "sae": "compare SAEs",
    "program": "derive and evaluate the programs of a bundle",
    "token": "create, list and revoke the tokens of callers",
    "policy": "write, check and apply policies",
    "debug": "look into a running server",
    "audit": "verify and show the audit log",
    "eval": "measure what steering, policies and guards do",
    "probe": "train the scores of guards",
    "classify": "train and measure classifiers of texts by latents",
    "steer": "calibrate steering towards topics",
    "bench": "run benchmarks",
    "demo": "start a server, run the client's tour, stop the server",
    "console": "start a server and open its console in the browser",
}
EXAMPLES = """\
examples:
  rudder demo
  rudder serve --engine.model MODEL --engine.bundles BUNDLE
  rudder generate "The night sky" --max-tokens 40
  rudder train --example > run.yaml
  rudder COMMAND --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 2 for an error that the user can correct, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in COMMANDS:
            status: int | None = importlib.import_module(f"rudder.server.cli.{arguments[0]}").main(arguments[1:])
            return status or 0
        parser().parse_args(arguments)
        return 0
    except (UserError, RudderError, OSError) as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """Build the parser that lists the commands."""
    top = argparse.ArgumentParser(
        prog="rudder",
        description="Steer, watch and unlearn inside a vLLM engine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=server.__version__)
    subparsers = top.add_subparsers(required=True, metavar="command")
    for name, text in COMMANDS.items():
        subparsers.add_parser(name, help=text, add_help=False)
    return top
