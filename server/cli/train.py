"""Trains SAEs as a file says, or goes on with a run that was stopped: on text, images, or vectors that are kept.

    rudder train run.yaml tokens=1e6 sae.k=64     keys of the file, in place of what it says
    rudder train --example > run.yaml             a file to begin with
    rudder train --example adaptive_k > run.yaml  the same for another architecture, with its settings explained
    torchrun --nproc-per-node 2 -m sae_models.training run.yaml

What it makes is a folder: config.yaml, metrics.jsonl, report.html, and a bundle for each SAE, which the server loads.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rudder.sae_models.activations.corpus import CorpusError
from rudder.sae_models.activations.store import StoreError
from rudder.sae_models.architectures import ARCHITECTURES
from rudder.sae_models.bundle.bundle import BundleError
from rudder.sae_models.training import config, memory
from rudder.sae_models.training.checkpoint import CheckpointError
from rudder.sae_models.training.run import run


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    found = argparse.ArgumentParser(
        prog="rudder train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("config", type=Path, nargs="?", metavar="CONFIG.yaml", help="what to train")
    found.add_argument("overrides", nargs="*", metavar="key=value", help="such as tokens=2e6 or sweep.k=[16,32]")
    found.add_argument(
        "--example",
        nargs="?",
        const="batch_topk",
        choices=ARCHITECTURES,
        metavar="ARCHITECTURE",
        help=f"print a file with every key explained; for one of {', '.join(ARCHITECTURES)}",
    )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 2 with the reason on stderr, or 130 when interrupted."""
    commands = parser()
    options = commands.parse_args(argv)
    if options.example:
        sys.stdout.write(config.example(options.example))
        return 0
    if options.config is None:
        commands.error("give a CONFIG.yaml, or --example to see one")
    memory.keep_freed()
    try:
        bundles = run(config.load(options.config, options.overrides))
    except (CorpusError, StoreError, CheckpointError, BundleError, ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    if os.environ.get("RANK", "0") == "0":
        print(*bundles, sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
