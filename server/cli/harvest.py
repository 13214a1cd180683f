"""`rudder harvest`: write the activation store of a training run."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from rudder.sae_models.activations.store import Store
from rudder.sae_models.training import config as configuration
from rudder.sae_models.training import data
from rudder.server.cli.arguments import add_fields, command, parse_fields

DESCRIPTION = """\
Write the activation store of a training run with a vLLM engine, through the hooks that serve.

`rudder train` of the same configuration then trains on this store; without it, it harvests with transformers. One that
was stopped goes on with the same command. With a smaller data.tokens, `rudder train` begins before the harvest ends.
"""
EXAMPLES = """\
examples:
  rudder harvest run.yaml --data.store STORE
  rudder harvest run.yaml --data.store STORE --by transformers
  rudder train run.yaml --data.store STORE
"""
BY = "what runs the model; transformers leaves out the layers above the sites, which on a CPU is faster"


def main(argv: Sequence[str]) -> None:
    """Harvest, and print the store's folder and size."""
    parser = command("harvest", DESCRIPTION, EXAMPLES, "rudder harvest CONFIG.yaml [--field VALUE ...]")
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="of `rudder train`, with data.store")
    parser.add_argument("--by", choices=("vllm", "transformers"), default="vllm", help=BY)
    add_fields(parser, configuration.Config)
    args, fields = parse_fields(parser, argv)
    config = configuration.load(args.config, fields)

    store = harvest(config, args.by)
    print(f"{store.path}: {store.tokens} tokens at {', '.join(store.manifest.content.sites)}")


def harvest(config: configuration.Config, by: str) -> Store:
    """Write the store of a run. Raises ConfigError if it has none."""
    if config.data.store is None:
        raise configuration.ConfigError("data.store", "is null: there is no store to write to")
    if by == "transformers":
        return data.harvest_stores(config, data.load_inputs(config))[0]

    from rudder.server.engine.harvest import harvest as harvest_with_engine

    return asyncio.run(harvest_with_engine(config))
