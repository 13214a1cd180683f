"""Watched rows of a call, merged into the sites of its program."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from rudder.server.program import wire
from rudder.server.program.cache import ByteCache, rows_size
from rudder.server.program.gates import readable
from rudder.server.program.rows import Registry, site_number
from rudder.v1 import program_pb2


class Watched(NamedTuple):
    """A row whose activations are reported, at generated tokens and, with `prompt`, at prompt tokens too."""

    site: int
    row: wire.Row
    prompt: bool = False


def compile_watch(
    rows: Sequence[tuple[str, program_pb2.Row]], registry: Registry, field: str, *, prompt: bool = False
) -> tuple[Watched, ...]:
    """Resolve (site, row) pairs to watched rows. Raises ProgramError, which names `field`[i]."""
    return tuple(
        Watched(
            site_number(site, registry, f"{field}[{i}].site"),
            readable(row, site, registry, f"{field}[{i}].row").row,
            prompt,
        )
        for i, (site, row) in enumerate(rows)
    )


Merged = tuple[tuple[wire.Site, ...], tuple[int, ...]]
MERGED: ByteCache[Merged] = ByteCache(32 << 20)


def merge_watched(sites: tuple[wire.Site, ...], watched: tuple[Watched, ...]) -> Merged:
    """Add watched rows to the sites of stage 0; return the sites and the column of each watched row.

    A row watched twice has one column. A site that the program does not use is added without edits. Clients repeat
    their programs and reports, so results are cached.
    """
    cached = MERGED.get((sites, watched))
    if cached is not None:
        return cached
    merged = merge(sites, watched)
    size = rows_size(row for site in (*sites, *merged[0]) for row in site.rows) + rows_size(w.row for w in watched)
    return MERGED.put((sites, watched), merged, size)


def merge(sites: tuple[wire.Site, ...], watched: tuple[Watched, ...]) -> Merged:
    """Implement `merge_watched`."""
    merged = {site.site: site for site in sites}
    for number in {w.site for w in watched} - merged.keys():
        merged[number] = wire.Site(number)
    result = tuple(add_watched(merged[n], [w.row for w in watched if w.site == n]) for n in sorted(merged))
    columns = {pair: i for i, pair in enumerate((site.site, site.rows[row]) for site in result for row in site.watch)}
    return result, tuple(columns[w.site, w.row] for w in watched)


def add_watched(site: wire.Site, rows: Sequence[wire.Row]) -> wire.Site:
    """Watch `rows` at a site; rows that the site does not hold yet are appended."""
    numbers = {row: i for i, row in enumerate(site.rows)}
    for row in rows:
        numbers.setdefault(row, len(numbers))
    watch = tuple(dict.fromkeys(numbers[row] for row in rows))
    return msgspec.structs.replace(site, rows=tuple(numbers), watch=watch)
