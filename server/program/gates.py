"""Compile a program's gate to the bank's token and sequence conditions.

To add a statistic, add it to `sae_models.operations.STATISTICS` and its check to `checked_parameter`.
"""

from typing import Any

import msgspec

from rudder.sae_models.operations import STATISTICS
from rudder.server.program import wire
from rudder.server.program.errors import ProgramError, number, require
from rudder.server.program.rows import Registry, Resolved, resolve
from rudder.v1 import policy_pb2, program_pb2


def with_gate(site: wire.Site, gate: program_pb2.Gate, registry: Registry, field: str) -> wire.Site:
    """Add a gate to the site that it reads. Its rows are appended to the site's rows."""
    require(gate.any_of or gate.HasField("sequence"), field, "has no condition")
    rows = {row: i for i, row in enumerate(site.rows)}
    triggers: dict[int, float] = {}
    for i, trigger in enumerate(gate.any_of):
        target = readable(trigger.row, gate.site, registry, f"{field}.any_of[{i}].row")
        row = rows.setdefault(target.row, len(rows))
        above = number(trigger.above, f"{field}.any_of[{i}].above")
        triggers[row] = min(above, triggers.get(row, above))
    sequence = None
    if gate.HasField("sequence"):
        sequence = compile_sequence(gate.sequence, gate.site, rows, registry, f"{field}.sequence")
    return msgspec.structs.replace(site, rows=tuple(rows), gate=wire.Gate(tuple(triggers.items()), sequence))


def compile_sequence(
    message: program_pb2.SequenceCondition, site: str, rows: dict[wire.Row, int], registry: Registry, field: str
) -> wire.Sequence:
    """Compile a sequence condition. New rows are added to `rows`."""
    require(registry.layout.keeps_sequences(site), field, f"{site} keeps no sequence state: see sequence_sites")
    target = readable(message.score, site, registry, f"{field}.score")
    level = number(message.level, f"{field}.level")
    parameters = {"level": level} | statistic(message, registry.layout.window, field)
    row = rows.setdefault(target.row, len(rows))
    return wire.Sequence(row, **parameters, min_tokens=message.min_tokens, latch=message.latch)


def statistic(message: program_pb2.SequenceCondition, max_window: int, field: str) -> dict[str, Any]:
    """Return the fields of wire.Sequence that define this statistic."""
    name = message.WhichOneof("statistic") or ""
    parameter = checked_parameter(name, message, max_window, field)
    level = {"level": 0.0, "level_rate": message.level} if name == "share" else {}
    return STATISTICS[name](parameter) | level


def checked_parameter(
    name: str, message: program_pb2.SequenceCondition | policy_pb2.Guard, max_window: int, field: str
) -> float:
    """Return the parameter of a statistic of a gate or a guard; raises ProgramError if it is out of range."""
    match name:
        case "share":
            require(0 <= message.level < 1, f"{field}.level", f"{message.level:g}: a share to exceed must be in [0, 1)")
            return number(message.share.above, f"{field}.share.above")
        case "moving_average":
            decay = message.moving_average.decay
            require(0 < decay < 1, f"{field}.moving_average.decay", f"{decay:g} is not between 0 and 1")
            return decay
        case "window":
            tokens = message.window.tokens
            require(1 <= tokens <= max_window, f"{field}.window.tokens", f"{tokens} is not in [1, {max_window}]")
            return tokens
        case "cusum":
            return number(message.cusum.drift, f"{field}.cusum.drift")
    raise ProgramError(f"{field}.statistic", "names no statistic")


def readable(row: program_pb2.Row, site: str, registry: Registry, field: str) -> Resolved:
    """Resolve a row. Raises ProgramError if it has no activation."""
    target = resolve(row, site, registry, field)
    require(target.reads, field, f"{target.name} has no activation to read")
    return target
