"""`rudder sae`: compare SAEs."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from rudder.sae_models.analysis import compare
from rudder.server.cli.arguments import add_subcommand, command

EXAMPLES = """\
examples:
  rudder sae compare BUNDLE1 BUNDLE2
  rudder sae compare BUNDLE CHECKPOINT --mapping pairs.json
"""


def main(argv: Sequence[str]) -> None:
    """Print how many latents two SAEs share, and write the pairs."""
    parser = command("sae", "Compare SAEs.", EXAMPLES)
    group = parser.add_subparsers(required=True, metavar="command")
    arguments = add_subcommand(group, "compare", f"match the latents of two SAEs. {compare.__doc__}", EXAMPLES)
    arguments.add_argument("one", type=Path, help="folder of a bundle, or a checkpoint in a published format")
    arguments.add_argument("other", type=Path, help="the same of another SAE at the same site")
    arguments.add_argument("--json", action="store_true", help="print everything, the pairs too, as JSON")
    arguments.add_argument("--mapping", type=Path, metavar="FILE", help="write the shared pairs here, to port policies")
    args = parser.parse_args(argv)
    result = compare.compare(args.one, args.other)
    if args.mapping:
        args.mapping.write_bytes(msgspec.json.encode(result) + b"\n")
    print(msgspec.json.encode(result).decode() if args.json else compare.format_report(result))
