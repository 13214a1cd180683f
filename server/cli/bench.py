"""`rudder bench`: benchmarks of the engine and of the trainer."""

from collections.abc import Sequence
from pathlib import Path

from rudder.sae_models import settings
from rudder.server.cli.arguments import add_fields, command, parse_fields

EXAMPLES = """\
examples:
  rudder bench engine --starts 5 --pairs 2 --json engine.json
  rudder bench engine --cases idle,64_programs
  rudder bench load --peers PEERS --json load.json
  rudder bench http --streams 64 --json http.json
  rudder bench train --peers-python PEERS/bin/python --json train.json
"""


def main(argv: Sequence[str]) -> None:
    """Run a benchmark."""
    parser = command("bench", "Run benchmarks.", EXAMPLES)
    group = parser.add_subparsers(required=True, metavar="benchmark", dest="benchmark")
    group.add_parser("engine", help="Rudder against plain vLLM", add_help=False)
    group.add_parser("load", help="Rudder against stock vLLM's own servers", add_help=False)
    group.add_parser("http", help="the HTTP door against vLLM's own app", add_help=False)
    group.add_parser("train", help="the trainer against other SAE libraries", add_help=False)
    if argv[:1] == ["engine"]:
        bench_engine(argv[1:])
    elif argv[:1] == ["load"]:
        bench_load(argv[1:])
    elif argv[:1] == ["http"]:
        bench_http(argv[1:])
    elif argv[:1] == ["train"]:
        from rudder.sae_models.bench import train

        train.main(argv[1:])
    else:
        parser.parse_args(argv)


def bench_engine(argv: Sequence[str]) -> None:
    """Compare Rudder with plain vLLM under a load."""
    from rudder.server.bench import engine

    parser = command(
        "bench engine", str(engine.__doc__), EXAMPLES, "rudder bench engine [--json FILE] [--field VALUE ...]"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    add_fields(parser, engine.Load)
    args, fields = parse_fields(parser, argv)
    engine.run(settings.load(engine.Load, overrides=fields), args.json)


def bench_load(argv: Sequence[str]) -> None:
    """Compare servers under a load."""
    from rudder.server.bench.serving import run
    from rudder.server.bench.serving.offered import Offered

    parser = command(
        "bench load", str(run.__doc__), EXAMPLES, "rudder bench load [--peers FOLDER] [--json FILE] [--field VALUE ...]"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    parser.add_argument(
        "--peers", type=Path, metavar="FOLDER", help="packages of vLLM's gRPC server: pip install --target FOLDER"
    )
    add_fields(parser, Offered)
    args, fields = parse_fields(parser, argv)
    run.run(settings.load(Offered, overrides=fields), args.peers, args.json)


def bench_http(argv: Sequence[str]) -> None:
    """Compare the HTTP door with vLLM's own app."""
    from rudder.server.bench import http

    parser = command("bench http", str(http.__doc__), EXAMPLES, "rudder bench http [--json FILE] [--field VALUE ...]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    add_fields(parser, http.HttpLoad)
    args, fields = parse_fields(parser, argv)
    http.run(settings.load(http.HttpLoad, overrides=fields), args.json)
