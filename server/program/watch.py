"""Rows that a request wants reported, merged into the sites of its own program."""

from collections.abc import Sequence
from functools import lru_cache

import msgspec

from rudder.server.program import wire
from rudder.server.program.gates import readable
from rudder.server.program.rows import Registry, site_number
from rudder.v1 import program_pb2

Watched = tuple[int, wire.Row]


def compile_watch(rows: Sequence[tuple[str, program_pb2.Row]], registry: Registry, field: str) -> tuple[Watched, ...]:
    """(site number, row) of each (site, row); ProgramError names `field`[i]."""
    return tuple(
        (
            site_number(site, registry, f"{field}[{i}].site"),
            readable(row, site, registry, f"{field}[{i}].row").row,
        )
        for i, (site, row) in enumerate(rows)
    )


@lru_cache(256)
def with_watch(
    sites: tuple[wire.Site, ...], watched: tuple[Watched, ...]
) -> tuple[tuple[wire.Site, ...], tuple[int, ...]]:
    """The sites of stage 0 with `watched` added, and for each of `watched` its column in the telemetry's `active`.

    A row watched twice has one column. A site that the program does not use becomes one with no edits.
    """
    merged = {site.site: site for site in sites}
    for number in {number for number, _ in watched} - merged.keys():
        merged[number] = wire.Site(number)
    result = tuple(watching(merged[n], [row for at, row in watched if at == n]) for n in sorted(merged))
    numbers = {pair: i for i, pair in enumerate((site.site, site.rows[row]) for site in result for row in site.watch)}
    return result, tuple(numbers[pair] for pair in watched)


def watching(site: wire.Site, rows: Sequence[wire.Row]) -> wire.Site:
    """`site` with `rows` watched."""
    numbers = {row: i for i, row in enumerate(site.rows)}
    for row in rows:
        numbers.setdefault(row, len(numbers))
    watch = tuple(dict.fromkeys(numbers[row] for row in rows))
    return msgspec.structs.replace(site, rows=tuple(numbers), watch=watch)
