"""`rudder train`: train SAEs on text, images or stored activations."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rudder.sae_models.architectures import ARCHITECTURES
from rudder.sae_models.training import config as configuration
from rudder.sae_models.training import memory
from rudder.sae_models.training.run import run
from rudder.server.cli.arguments import add_fields, command, parse_fields

USAGE = """\
rudder train CONFIG.yaml [--field VALUE ...]
       rudder train --example [ARCHITECTURE]"""
DESCRIPTION = """\
Train SAEs as a configuration file says, or resume a run that was stopped: on text, images, or stored activations.

The run is a folder: config.yaml, metrics.jsonl, report.html, and a bundle for each SAE, which `rudder serve` loads.
"""
EXAMPLES = """\
examples:
  rudder train --example > run.yaml             a configuration to begin with
  rudder train --example adaptive_k > run.yaml  the same for another architecture, with its settings explained
  rudder train run.yaml
  rudder train run.yaml --tokens 1e6 --sae.k 64 --sweep.k '[16,32]'
  torchrun --nproc-per-node 2 --no-python rudder train run.yaml
  torchrun --nproc-per-node 2 -m rudder.server train run.yaml

Fields have the names and the YAML syntax of the configuration file and override it. Fields of the architecture are
`--sae.NAME`.
"""


def parser() -> argparse.ArgumentParser:
    """Build the parser."""
    train = command(
        "train",
        DESCRIPTION,
        EXAMPLES,
        USAGE,
    )
    train.add_argument("config", type=Path, nargs="?", metavar="CONFIG.yaml", help="configuration of the run")
    train.add_argument(
        "--example",
        nargs="?",
        const="batch_topk",
        choices=ARCHITECTURES,
        metavar="ARCHITECTURE",
        help=f"print a configuration with help texts; for one of {', '.join(ARCHITECTURES)}",
    )
    add_fields(train, configuration.Config)
    return train


def main(argv: Sequence[str]) -> None:
    """Train, and print the bundles' folders."""
    train = parser()
    args, fields = parse_fields(train, argv)
    if args.example:
        sys.stdout.write(configuration.example(args.example))
        return
    if args.config is None:
        train.error("CONFIG.yaml is missing; --example prints one")
    memory.keep_freed()
    try:
        bundles = run(configuration.load(args.config, fields))
    except KeyboardInterrupt:
        print("stopped; the same command resumes from the last checkpoint", file=sys.stderr)
        raise
    if os.environ.get("RANK", "0") == "0":
        print(*bundles, sep="\n")
