"""`rudder policy certify`: rerun a policy's stored evaluation against the engine as it is configured now."""

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from rudder.sae_models.errors import UserError
from rudder.server import config as configuration
from rudder.server.cli.arguments import add_fields, command, parse_fields
from rudder.server.cli.output import out

if TYPE_CHECKING:
    from rudder.server.safety.certificate import Certificate

DESCRIPTION = """\
Rerun a policy's stored evaluation against the engine as it is configured now, and write NAME.certificate.json beside
the policy: PASS, or DEGRADED where a guard, an edit or a gate acts otherwise than recorded in more than --max-flips of
the texts. Exit status: 0 PASS, 1 DEGRADED, 2 the evaluation cannot be run.
"""
EXAMPLES = """\
examples:
  rudder policy certify policies/forget.yaml --config reference.yaml --record --texts texts.jsonl
  rudder policy certify policies/forget.yaml --config server.yaml
"""
USAGE = "rudder policy certify POLICY.yaml [--config FILE] [--record --texts FILE] [--section.field VALUE ...]"
DEGRADED = 1


def main(argv: Sequence[str]) -> int:
    """Certify a policy; print a line for each guard, edit and gate."""
    args, fields = parse_fields(parser(), argv)
    if args.record != (args.texts is not None):
        raise UserError("texts: --record and --texts FILE go together")
    if not 0 <= args.max_flips < 1:
        raise UserError(f"max-flips: {args.max_flips:g} is not in [0, 1)")
    config = configuration.load(args.config, fields | {"policies.folder": str(args.policy.parent)})

    from rudder.server.safety.certify import certify

    certificate = asyncio.run(certify(config, args.policy, args.texts, args.max_flips))
    out.print(table_of(certificate))
    return DEGRADED if certificate.result == "DEGRADED" else 0


def parser() -> argparse.ArgumentParser:
    """Build the parser."""
    certifying = command("policy certify", DESCRIPTION, EXAMPLES, USAGE)
    certifying.add_argument("policy", type=Path, metavar="POLICY.yaml", help="file of the policy")
    certifying.add_argument("--config", type=Path, metavar="FILE", help="YAML file of the server's configuration")
    certifying.add_argument(
        "--record", action="store_true", help="first make the evaluation: this configuration becomes the reference"
    )
    certifying.add_argument(
        "--texts", type=Path, metavar="FILE.jsonl", help="with --record: lines with `text` or `messages`, and `answer`"
    )
    certifying.add_argument(
        "--max-flips", type=float, default=0.01, metavar="SHARE", help="of the texts, up to which a part passes (0.01)"
    )
    add_fields(certifying, configuration.Config)
    return certifying


def table_of(certificate: "Certificate") -> Table:
    """Build the table of guards, edits and gates."""
    title = f"{certificate.policy} version {certificate.version}: {certificate.result}"
    table = Table("part", "result", "acted in", "flips", title=escape(title))
    for part in certificate.parts:
        acted, flips = f"{part.acted} of {part.texts} texts", f"{part.flips}"
        table.add_row(escape(part.name), part.result, acted, flips)
    return table
