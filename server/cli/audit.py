"""`rudder audit`: make the key of an audit log, verify the log, and show its entries."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from rudder.sae_models.errors import UserError
from rudder.server.cli.arguments import add_subcommand, command, integer
from rudder.server.cli.output import err, out
from rudder.server.monitoring.collectors import printable
from rudder.server.safety.audit import chain
from rudder.server.safety.audit.verify import Place, Tampered, Verified, lines, verify

EXAMPLES = """\
examples:
  rudder audit key audit.key
  rudder audit verify LOG --key-file audit.key
  rudder audit show LOG --policy forget-microbiology --rule topic
"""
TAMPERED = 1
# Calls without an end whose request ids `verify` prints.
NAMED_CALLS = 10
Entry = Mapping[str, Any]


def main(argv: Sequence[str]) -> int:
    """Run a command. The status of `verify` is 0 if the log is whole, 1 if it is not, 2 if it cannot be read."""
    args = parser().parse_args(argv)
    status: int = args.run(args)
    return status


def parser() -> argparse.ArgumentParser:
    """Build the parser."""
    audit = command("audit", "Make the key of an audit log, verify the log, and show its entries.", EXAMPLES)
    group = audit.add_subparsers(required=True, metavar="command")
    making = add_subcommand(group, "key", "write a new random key, which only you can read")
    making.set_defaults(run=make_key)
    making.add_argument("file", type=Path, metavar="FILE", help="file to write; it must not exist")
    verifying = add_subcommand(
        group, "verify", "find what was changed, removed, moved or added; status 1 if anything was"
    )
    verifying.set_defaults(run=verify_log)
    verifying.add_argument("--key-file", type=Path, required=True, help="audit.key_file of the server")
    verifying.add_argument(
        "--head", type=Path, help="audit.head of the server, or a copy of it; default: head.json in it"
    )
    showing = add_subcommand(group, "show", "print entries as a table, without verifying them")
    showing.set_defaults(run=show_log)
    for name in ("caller", "policy", "rule"):
        showing.add_argument(f"--{name}", help=f"only entries of this {name}")
    showing.add_argument("--limit", type=integer(1), default=1000, help="maximum number of entries (%(default)s)")
    for action in (verifying, showing):
        action.add_argument("folder", type=Path, metavar="FOLDER", help="audit.folder of the server")
    return audit


def make_key(args: argparse.Namespace) -> int:
    """Write a key. It is never printed."""
    chain.create_key(args.file)
    print(f"{args.file}: a new key; keep it where who can write the log cannot read it")
    return 0


def verify_log(args: argparse.Namespace) -> int:
    """Verify a log, and print what it holds or where it is wrong first."""
    key = chain.read_key(args.key_file)
    try:
        result = verify(Place.of(args.folder, args.head), key)
    except Tampered as problem:
        err.print(f"[bold red]tampered:[/] {escape(str(problem))}")
        return TAMPERED
    print(summary(result))
    return 0


def summary(result: Verified) -> str:
    """Say what was verified, and what was not."""
    parts = [
        f"whole: {result.entries} entries in {result.files} files, {result.anchored} of them vouched for by the head"
    ]
    if not result.closed:
        parts.append("the server is running, or was killed: entries behind these could be missing")
    if result.torn:
        parts.append("the last line is not whole yet; a server that starts keeps such a line aside")
    if calls := result.unended:
        more = f" and {len(calls) - NAMED_CALLS} more" if len(calls) > NAMED_CALLS else ""
        named = f"{', '.join(calls[:NAMED_CALLS])}{more}"
        parts.append(f"{len(calls)} calls began and have no end: they run, or the server was killed in them: {named}")
    return "; ".join(parts)


def show_log(args: argparse.Namespace) -> int:
    """Print the entries that the filters leave."""
    place = Place.of(args.folder)
    if not place.files():
        raise UserError(f"{args.folder}: holds no audit log")
    table = Table("entry", "time", "kind", "caller", "what", "outcome", "policies", "verdicts", "tokens")
    for entry in islice(selected(place, args.caller, args.policy, args.rule), args.limit):
        table.add_row(*(escape(printable(cell)) for cell in cells(entry)))
    out.print(table)
    return 0


def selected(place: Place, caller: str | None, policy: str | None, rule: str | None) -> Iterator[Entry]:
    """Yield the entries of a log of this caller, under this policy, and with a verdict of this rule."""
    for line in lines(place):
        entry = chain.entry_of(line)
        if entry is None or (caller and entry.get("caller") != caller):
            continue
        if (not policy or policy in policies_of(entry)) and (not rule or rule in rules_of(entry)):
            yield entry


def policies_of(entry: Entry) -> list[str]:
    """Return the names of the policies of an entry."""
    return [policy["name"] for policy in (*entry.get("policies", ()), *filter(None, [entry.get("policy")]))]


def rules_of(entry: Entry) -> list[str]:
    """Return the rules that held in a call."""
    return [verdict["rule"] for choice in entry.get("choices", ()) for verdict in choice["verdicts"]]


def cells(entry: Entry) -> tuple[str, ...]:
    """Return an entry as the cells of the table."""
    choices = entry.get("choices", ())
    verdicts = [f"{v['rule']}@{v['position']}" for choice in choices for v in choice["verdicts"]]
    tokens = [f"{entry['prompt_tokens']} + {sum(choice['generated_tokens'] for choice in choices)}"] if choices else []
    what = entry.get("method") or entry.get("change") or entry.get("entries") or entry.get("kept") or ""
    return (
        str(entry["sequence"]), entry.get("time", ""), entry["kind"], entry.get("caller", ""), str(what),
        entry.get("outcome", ""), ", ".join(policies_of(entry)), ", ".join(verdicts), *(tokens or [""]),
    )  # fmt: skip
