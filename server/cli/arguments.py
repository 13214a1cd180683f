"""Parsers that several commands share: fields of a configuration, the address of a server, a prompt, groups."""

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import msgspec

from rudder.sae_models import settings
from rudder.sae_models.errors import UserError
from rudder_client import Client
from rudder_client.requests import Steer, Topic

# In the order in which `connect` reads them.
CREDENTIAL_FILES = {
    "token-file": "file of the token of `rudder token create`",
    "ca": "PEM file of the authorities that signed the server's certificate; implies --tls",
    "client-certificate": "PEM file of this client's certificate; implies --tls",
    "client-key": "PEM file of its private key",
}
MAX_UINT32, MAX_UINT64 = (1 << 32) - 1, (1 << 64) - 1
# More than those of any bound; Python refuses to convert thousands of digits.
MAX_DIGITS = 100
# Keeps the values of fields apart from a command's other arguments.
FIELD = "field "


def command(name: str, description: str, examples: str = "", usage: str | None = None) -> argparse.ArgumentParser:
    """Create the parser of `rudder NAME`; `examples` are printed below the options."""
    return argparse.ArgumentParser(
        prog=f"rudder {name}",
        usage=usage,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def run_module(
    package: str, modules: Mapping[str, str], argv: Sequence[str], description: str, examples: str, metavar: str
) -> int:
    """Run a subcommand of `rudder NAME` that is a module of `package` (rudder.server.cli.NAME); `modules`: its help."""
    if argv and argv[0] in modules:
        status: int | None = importlib.import_module(f"{package}.{argv[0]}").main(argv[1:])
        return status or 0
    parser = command(package.rpartition(".")[2], description, examples)
    group = parser.add_subparsers(required=True, metavar=metavar)
    for name, text in modules.items():
        group.add_parser(name, help=text, add_help=False)
    parser.parse_args(argv)
    return 0


def add_subcommand(group: Any, name: str, description: str, examples: str = "") -> argparse.ArgumentParser:
    """Add a command to a group created by `add_subparsers`."""
    subcommand: argparse.ArgumentParser = group.add_parser(
        name,
        help=description,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return subcommand


def add_fields(parser: argparse.ArgumentParser, kind: type[msgspec.Struct]) -> None:
    """Add each field of a configuration as an option `--section.field`, one group of options per section."""
    groups: dict[str, Any] = {}
    sections = {field.name: field.type for field in settings.own_fields(kind) if settings.is_section(field.type)}
    for field in settings.fields(kind):
        section = field.name.rpartition(".")[0]
        if section not in groups:
            title = section or "fields"
            groups[section] = parser.add_argument_group(title, settings.summary(sections.get(section, kind)))
        default = "" if field.default is msgspec.NODEFAULT else f" ({default_text(field.default)})"
        groups[section].add_argument(
            f"--{field.name}",
            dest=f"{FIELD}{field.name}",
            metavar=settings.type_name(field.type),
            help=f"{field.help}{default}".replace("%", "%%"),
        )


def default_text(value: Any) -> str:
    """Write a default as YAML."""
    return settings.line_of("", value, "").removeprefix(": ")


def parse_fields(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Parse a command line whose other options are fields: the arguments, and the text of each field.

    Options that the parser does not know, such as keys below a mapping field (`--sae.k 64`), are taken as fields too:
    the configuration then names the field that does not exist.
    """
    for name in (argument.partition("=")[0] for argument in argv):
        if name.startswith("--") and name != "--":
            with suppress(argparse.ArgumentError):
                parser.add_argument(name, dest=f"{FIELD}{name[2:]}", help=argparse.SUPPRESS)
    values = vars(parser.parse_args(argv))
    texts = {name.removeprefix(FIELD): values.pop(name) for name in list(values) if name.startswith(FIELD)}
    return argparse.Namespace(**values), {name: text for name, text in texts.items() if text is not None}


def add_address(parser: argparse.ArgumentParser) -> None:
    """Add the address of a running server, and the files of the credentials that it asks for."""
    parser.add_argument("--address", type=utf8, default="localhost:50051", help="of the server (%(default)s)")
    files = parser.add_argument_group("credentials")
    for name, text in CREDENTIAL_FILES.items():
        files.add_argument(f"--{name}", type=Path, metavar="FILE", help=text)
    files.add_argument("--tls", action="store_true", help="use TLS with the authorities that this machine trusts")


def connect(args: argparse.Namespace) -> Client:
    """Return a client of the server that a command line names. Raises UserError."""
    token, ca, certificate, key = (
        file.read_bytes() if (file := getattr(args, name.replace("-", "_"))) else None for name in CREDENTIAL_FILES
    )
    if bool(certificate) != bool(key):
        raise UserError("--client-certificate and --client-key belong together")
    secure = ca or certificate or args.tls
    credentials = grpc.ssl_channel_credentials(ca, key, certificate) if secure else None
    try:
        return Client(args.address, credentials=credentials, token=token.decode("ascii").strip() if token else "")
    except ValueError as error:
        raise UserError(str(error)) from error


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """Add the address of a running server, a text, and a program or a topic."""
    add_address(parser)
    parser.add_argument("text", type=utf8, help="the prompt; -: read it from standard input")
    steering = parser.add_mutually_exclusive_group()
    steering.add_argument(
        "--program", type=utf8, help="name of a program of the server, or a YAML file (.yaml, .yml) of a program"
    )
    steering.add_argument("--topic", type=utf8, help="topic to steer towards: a concept of a served bundle")
    strength = "of --topic: share, at most 1, of the largest dose that keeps texts fluent (1)"
    parser.add_argument("--strength", type=float, help=strength)


def utf8(text: str) -> str:
    """Accept text that is valid UTF-8: gRPC cannot send other text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError("is not UTF-8") from error
    return text


def integer(minimum: int = 0, maximum: int = MAX_UINT32) -> Callable[[str], int]:
    """Create the type of an argument that is a whole number within bounds."""

    def parse(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or not minimum <= int(text[:MAX_DIGITS]) <= maximum:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number between {minimum} and {maximum}")
        return int(text)

    return parse


def number(maximum: float) -> Callable[[str], float]:
    """Create the type of an argument that is a number above 0 and at most `maximum`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text} is not a number") from error
        if not 0 < value <= maximum:
            raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most {maximum:g}")
        return value

    return parse


def prompt_of(args: argparse.Namespace) -> str:
    """Return the text of a command line, or that of standard input."""
    if args.text != "-":
        return str(args.text)
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: {error}") from error


def program_of(args: argparse.Namespace) -> Steer:
    """Return what a command line steers by: a topic, the program of a YAML file, or the name of one of the server's."""
    if args.topic:
        return Topic(args.topic, args.strength)
    if args.strength is not None:
        raise UserError("--strength: needs --topic")
    if args.program and Path(args.program).suffix in (".yaml", ".yml"):
        from rudder.server.program.named import read_program

        return read_program(Path(args.program))
    return args.program or None
