"""`rudder eval redteam`: attacks on a server that policies protect, each with the attack that its guard would stop."""

import asyncio
import json
import os
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from rudder.sae_models.errors import UserError
from rudder.sae_models.files import write_atomically
from rudder.server.cli.arguments import command
from rudder.server.cli.output import err, out

DESCRIPTION = """\
Attack a server of the demo model in this process, under the shipped program that makes it forget microbiology.

Each attack has a control: the same attack without the guard that it meets must succeed. Status 1: an attack, or a
control, did not end as it must.
"""
EXAMPLES = """\
examples:
  rudder eval redteam --json redteam.json
  rudder eval redteam --only A7 --only A12
"""


def main(argv: Sequence[str]) -> int:
    """Carry out the attacks; print and write what came of them."""
    parser = command("eval redteam", DESCRIPTION, EXAMPLES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--only", action="append", metavar="ID", help="this attack, such as A7; may be repeated")
    parser.add_argument("--quick", action="store_true", help="leave out attacks that take more than some seconds")
    options = parser.parse_args(argv)
    # Before vLLM is imported: the engine runs in this process, and says no more than it must.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    return asyncio.run(evaluate(options.json, options.only, quick=options.quick))


async def evaluate(path: Path | None, only: Sequence[str] | None, *, quick: bool) -> int:
    """Carry out attacks, and return the exit status. Raises UserError if one is not known."""
    from rudder.server.bench.redteam import material, run, target

    if unknown := {*(only or ())} - {attack.id for attack in run.ATTACKS}:
        raise UserError(f"only: there is no attack {sorted(unknown)[0]}")
    chosen = [a for a in run.ATTACKS if (not only or a.id in only) and not (quick and a.long)]
    attacked = await target.start(material.load())
    try:
        figures, results = await run.baseline(attacked), []
        async for result in run.carried_out(attacked, chosen):
            results.append(result)
            err.print(f"{'[dim]' if result.passed else '[red]FAILED '}{result.outcome}[/] {result.attack.key}")
            if path:
                # After each: what has been measured stays if the next attack does not end.
                write_atomically(path, json.dumps(run.report(figures, results), indent=1).encode() + b"\n")
    finally:
        await attacked.stop()
    report = run.report(figures, results)
    table = Table("attack", "grade", "expected", "outcome", "figure", "without the guard")
    for each in results:
        control = value_text(each.control, each.control_outcome)
        table.add_row(
            each.attack.key, each.attack.grade, each.attack.expected, each.outcome, value_text(each.value, "-"), control
        )
    out.print(table)
    out.print(", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    counts = ", ".join(f"{report[name]} {name}" for name in ("held", "failed", "reported"))
    out.print(f"{counts}; not built, in whole or in part: {', '.join(run.NOT_BUILT)}")
    return 1 if report["failed"] else 0


def value_text(value: float | None, otherwise: str) -> str:
    """Write a figure."""
    return otherwise if value is None else f"{value:.3f}"
