"""`rudder model`: show what a server serves."""

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from rudder.server.cli.arguments import add_address, command
from rudder.server.cli.output import optional, out
from rudder_client import Client


def main(argv: Sequence[str]) -> None:
    """Print the model, the bundles, the programs and the limits of a server."""
    parser = command(
        "model",
        "Show the served model: sites, bundles, programs, limits.",
        "example:\n  rudder model --address localhost:50052",
    )
    add_address(parser)
    args = parser.parse_args(argv)
    with Client(args.address) as client:
        model, programs = client.model(), client.programs()
    out.print(f"[bold]{model.model}[/], {model.layers} layers of {model.hidden_size}, {model.max_model_len} tokens")
    out.print(f"server {model.server_version}, vLLM {model.engine_version}, engine {model.engine_epoch}")
    bundles = Table("bundle", "site", "latents", "L0", "FVU", "sha256")
    for b in model.bundles:
        figures = optional(b, "l0", "{:.1f}"), optional(b, "fvu", "{:.3f}")
        bundles.add_row(b.name, b.site, str(b.latents), *figures, b.sha256[:12])
    out.print(bundles)
    table = Table("program", "applies", "digest", "description")
    for p in programs:
        table.add_row(p.name, "always" if p.always else "when named", p.digest[:12], escape(p.description))
    out.print(table)
    limits = Table("limit", "maximum")
    for field, value in model.limits.ListFields():
        limits.add_row(field.name, str(value))
    out.print(limits)
