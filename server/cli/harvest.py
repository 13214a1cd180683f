"""`rudder harvest`: write the activation store of a training run with a vLLM engine."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from rudder.sae_models.training import config as configuration
from rudder.server.cli.arguments import add_fields, command, parse_fields

DESCRIPTION = """\
Write the activation store of a training run with a vLLM engine, through the hooks that serve.

`rudder train` of the same configuration then trains on this store; without it, it harvests with transformers.
"""
EXAMPLES = """\
examples:
  rudder harvest run.yaml --data.store STORE
  rudder train run.yaml --data.store STORE
"""


def main(argv: Sequence[str]) -> None:
    """Harvest, and print the store's folder and size."""
    parser = command("harvest", DESCRIPTION, EXAMPLES, "rudder harvest CONFIG.yaml [--field VALUE ...]")
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="of `rudder train`, with data.store")
    add_fields(parser, configuration.Config)
    args, fields = parse_fields(parser, argv)
    config = configuration.load(args.config, fields)

    from rudder.server.engine.harvest import harvest

    store = asyncio.run(harvest(config))
    print(f"{store.path}: {store.tokens} tokens at {', '.join(store.manifest.content.sites)}")
