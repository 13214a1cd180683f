"""`rudder serve`: start a server and run it until a signal ends it."""

import logging
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from rudder.sae_models.errors import UserError
from rudder.server import config as configuration
from rudder.server.cli.arguments import add_fields, command, parse_fields
from rudder.server.cli.output import err
from rudder.server.models import served

EXAMPLES = """\
examples:
  rudder serve
  rudder serve --model auto
  rudder serve --config server.yaml --listen.port 50052
  rudder serve --engine.model MODEL --engine.bundles BUNDLE1,BUNDLE2 --engine.dtype=bfloat16

Fields have the names and the YAML syntax of the configuration file (`rudder config example`) and override it. Lists of
text may also be separated by commas.
"""

# With `--model`, which is for a first look, the OpenAI-compatible endpoint is there too.
HTTP = {"listen.http_port": "8000"}


def main(argv: Sequence[str]) -> int:
    """Start a server and run it until SIGTERM or SIGINT."""
    parser = command("serve", "Start a server.", EXAMPLES, "rudder serve [--config FILE] [--section.field VALUE ...]")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file of the configuration")
    model_help = "sets engine.model, engine.bundles, engine.enforce_eager, programs.folder and listen.http_port"
    parser.add_argument("--model", choices=served.NAMES, help=f"{model_help}; {served.HELP}")
    add_fields(parser, configuration.Config)
    args, fields = parse_fields(parser, argv)
    if args.model:
        fields = served.fields_of(args.model, lambda line: err.print(escape(line))) | HTTP | fields
    config = configuration.load(args.config, fields)
    try:
        return run(config)
    except UserError:
        raise
    # vLLM refuses arguments with a bare ValueError.
    except ValueError as error:
        logging.getLogger(__name__).debug("the server did not start", exc_info=error)
        raise UserError(str(error)) from error


def run(config: configuration.Config) -> int:
    """Check the configuration and the ports, then import vLLM and serve."""
    from rudder.server import unsafe
    from rudder.server.preflight import check
    from rudder.server.process import FIRST_SIGNAL_STATUS, leave, require_free

    require_free(config.listen)
    config = check(config)
    unsafe.check(config)

    import asyncio

    from rudder.server.follow import follow
    from rudder.server.serve import serve

    async def run_then_leave() -> int:
        if config.engine.node_rank:
            leave(await follow(config))
        status = await serve(config)
        if status > FIRST_SIGNAL_STATUS:
            leave(status)
        return status

    return asyncio.run(run_then_leave())
