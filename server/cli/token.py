"""`rudder token`: the file of tokens with which callers authenticate."""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from rich.table import Table

from rudder.sae_models.errors import UserError
from rudder.sae_models.files import lock_folder, write_atomically
from rudder.server.caller import ROLES, Quotas
from rudder.server.cli.arguments import add_subcommand, command, integer
from rudder.server.cli.output import out
from rudder.server.identity import tokens
from rudder.server.identity.tokens import TokenEntry, TokenFile

EXAMPLES = """\
examples:
  rudder token create --file tokens.yaml --caller dashboard --roles observe --days 90 --out dashboard.token
  rudder token list --file tokens.yaml
  rudder token revoke --file tokens.yaml 9f86d081884c7d65
  rudder serve --identity.tokens tokens.yaml --tls.certificate server.pem --tls.key server.key --listen.host 0.0.0.0
"""
QUOTAS = {
    "requests": "requests a minute",
    "request-bytes": "bytes of requests a minute",
    "prompt-tokens": "prompt tokens a minute",
    "generated-tokens": "generated tokens a minute",
    "streams": "streams at once",
    "rows": "row places at once",
}


def main(argv: Sequence[str]) -> None:
    """Create, list or revoke tokens."""
    args = parser().parse_args(argv)
    args.run(args)


def parser() -> argparse.ArgumentParser:
    """Build the parser."""
    token = command(
        "token", "Create, list and revoke the tokens of callers. A running server takes changes over.", EXAMPLES
    )
    group = token.add_subparsers(required=True, metavar="command")
    creating = add_subcommand(group, "create", "add a token to a file, and print it: it is stored nowhere", EXAMPLES)
    creating.set_defaults(run=create)
    creating.add_argument("--caller", required=True, help="name of the caller, in logs, policies and audit")
    creating.add_argument("--roles", required=True, help=f"separated by commas: {', '.join(sorted(ROLES))}")
    creating.add_argument("--tenant", help="callers of one tenant share a prefix cache (default: the caller alone)")
    creating.add_argument("--out", type=Path, help="file for the token, which only its owner reads (default: print it)")
    creating.add_argument("--days", type=integer(1, 36500), help="days until it expires (default: never)")
    for name, text in QUOTAS.items():
        creating.add_argument(f"--{name}", type=integer(1), help=f"cap on {text}, for each server (default: none)")
    listing = add_subcommand(group, "list", "print the tokens of a file, which holds none of their secrets", EXAMPLES)
    listing.set_defaults(run=show)
    revoking = add_subcommand(group, "revoke", "remove a token from a file", EXAMPLES)
    revoking.set_defaults(run=revoke)
    revoking.add_argument("id", help="the token's id: its second part")
    for action in (creating, listing, revoking):
        action.add_argument(
            "--file", type=Path, required=True, help="the file of tokens: identity.tokens of the server"
        )
    return token


def create(args: argparse.Namespace) -> None:
    """Add a token to the file and print it on standard output."""
    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=args.days) if args.days else None
    quotas = Quotas(**{key: getattr(args, key) for name in QUOTAS if getattr(args, key := name.replace("-", "_"))})
    try:
        token, entry = tokens.create(args.caller, args.roles.split(","), args.tenant, expires, quotas)
    except (ValueError, msgspec.ValidationError) as error:
        raise UserError(str(error)) from error
    with lock_folder(args.file.parent, wait=True):
        save(args.file, (*load(args.file, missing_ok=True).tokens, entry))
    if args.out:
        args.out.touch(mode=0o600)
        args.out.write_text(f"{token}\n", encoding="ascii")
    else:
        print(token)
    print(f"added {entry.id} for {entry.caller} to {args.file}; the token itself is not stored", file=sys.stderr)


def show(args: argparse.Namespace) -> None:
    """Print the tokens of a file."""
    table = Table()
    for column in ("id", "caller", "tenant", "roles", "expires", "quotas"):
        table.add_column(column)
    for entry in load(args.file).tokens:
        quotas = ", ".join(f"{name} {value:g}" for name, value in msgspec.to_builtins(entry.quotas).items())
        expires = entry.expires.isoformat() if entry.expires else "never"
        table.add_row(entry.id, entry.caller, entry.tenant or entry.caller, " ".join(entry.roles), expires, quotas)
    out.print(table)


def revoke(args: argparse.Namespace) -> None:
    """Remove a token from a file."""
    with lock_folder(args.file.parent, wait=True):
        entries = load(args.file).tokens
        kept = tuple(entry for entry in entries if entry.id != args.id)
        if len(kept) == len(entries):
            raise UserError(f"{args.file}: has no token {args.id}")
        save(args.file, kept)


def load(file: Path, missing_ok: bool = False) -> TokenFile:
    """Read a file of tokens. Raises UserError."""
    if missing_ok and not file.exists():
        return TokenFile()
    try:
        return tokens.read(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error


def save(file: Path, entries: tuple[TokenEntry, ...]) -> None:
    """Write a file of tokens, which only its owner reads."""
    file.touch(mode=0o600, exist_ok=True)
    mode = file.stat().st_mode
    write_atomically(file, tokens.write(TokenFile(entries)))
    file.chmod(mode)
