"""Read the files of an audit log, and verify that they are the whole chain that was written with a key."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rudder.sae_models.errors import UserError
from rudder.server.safety.audit import chain
from rudder.server.safety.audit.chain import Head, Line

# As `Place.file` writes it.
NAME = re.compile(r"audit-([0-9]{6}|[1-9][0-9]{6,17})\.jsonl")
FIRST_NUMBER = 1
HEAD = "head.json"


class Tampered(Exception):
    """A log is not the whole chain that was written. `place`: the file, and the line in it where there is one."""

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(f"{place}: {problem}")
        self.place, self.problem = place, problem


@dataclass(frozen=True)
class Place:
    """Where a log is: its folder, and the file of its head."""

    folder: Path
    head: Path

    @classmethod
    def of(cls, folder: str | Path, head: str | Path | None = None) -> "Place":
        """Return the place of a log; without a file for the head, `head.json` in its folder."""
        return cls(Path(folder), Path(head) if head else Path(folder) / HEAD)

    def file(self, number: int) -> Path:
        """Return the file of this number."""
        return self.folder / f"audit-{number:06}.jsonl"

    def files(self) -> list[Path]:
        """Return the files of the log that exist, in order. Others, whatever they are called, are none of it."""
        return sorted((path for path in self.folder.glob("audit-*") if NAME.fullmatch(path.name)), key=number_of)


def number_of(path: Path) -> int:
    """Return the number of a file of a log."""
    return int(path.stem.removeprefix("audit-"))


@dataclass(frozen=True)
class End:
    """Where a chain ends: `count` entries, the MAC of the last, the number of its file, and the bytes of that file up
    to there. `torn`: the file goes on with a line that is not whole.
    """

    count: int
    mac: bytes
    number: int
    size: int
    torn: bool = False


@dataclass(frozen=True)
class Verified:
    """A log that is whole. `anchored`: entries that the head vouches for; those behind them could be missing.

    `unended`: request ids of calls that began and have no end, in the order in which they began: they run, or the
    server was killed in them.
    """

    entries: int
    anchored: int
    files: int
    closed: bool
    torn: bool
    unended: tuple[str, ...] = ()


class Calls:
    """Calls that have begun and not ended, by request id."""

    def __init__(self) -> None:
        self.open: dict[str, None] = {}

    def heed(self, entry: Mapping[str, Any]) -> None:
        """Take in the next entry."""
        request_id = str(entry.get("request_id"))
        match entry.get("kind"):
            case "opened":
                self.open[request_id] = None
            case "call":
                self.open.pop(request_id, None)


def verify(place: Place, key: bytes) -> Verified:
    """Verify all files of a log. Raises Tampered, and UserError if there is no log."""
    # Before the files: a server may be writing them.
    head, files = chain.read_head(place.head), place.files()
    if not files and head is None:
        raise UserError(f"{place.folder}: holds no audit log")
    calls = Calls()
    end = walk(place, key, require_head(place, key, head), files, calls)
    assert head
    return Verified(end.count, head.count, len(files), head.closed, end.torn, tuple(calls.open))


def walk(place: Place, key: bytes, head: Head, files: list[Path], calls: Calls) -> End:
    """Follow the chain through all files; `calls` heeds their entries. Raises Tampered."""
    end = End(0, chain.ROOT, FIRST_NUMBER, 0)
    for number, path in enumerate(files, FIRST_NUMBER):
        if number_of(path) != number:
            raise Tampered(str(place.file(number)), "the file is missing")
        end = scan(path, key, replace(end, number=number, size=0), head, calls)
        if end.torn and path != files[-1]:
            raise Tampered(f"{path}:end", "its last line is not whole, and yet another file follows")
    require_reached(place, head, end)
    return end


def scan(path: Path, key: bytes, end: End, head: Head, calls: Calls) -> End:
    """Follow the chain through one file from `end`; return its new end. Raises Tampered."""
    with path.open("rb") as file:
        for number, content in enumerate(file, 1):
            if not content.endswith(b"\n"):
                return replace(end, torn=True)
            end = follow(f"{path}:{number}", key, end, content, head, calls)
    return end


def follow(place: str, key: bytes, end: End, content: bytes, head: Head, calls: Calls) -> End:
    """Return the end of the chain behind one more line. Raises Tampered."""
    line, expected = chain.parse_line(content), end.count + 1
    entry = chain.entry_of(line) if line else None
    if line is None or entry is None:
        raise Tampered(place, f"is not an entry, where entry {expected} must be")
    if entry.get("sequence") != expected:
        problem = f"holds entry {entry.get('sequence')} where entry {expected} must be"
        raise Tampered(place, f"{problem}: entries are missing, moved or inserted")
    if chain.mac_of(key, end.mac, line.entry) != line.mac:
        raise Tampered(place, f"entry {expected} was changed, or written without this key: its MAC does not follow")
    if expected == head.count and line.mac.hex() != head.mac:
        raise Tampered(place, f"entry {expected} is not the one that the head vouches for")
    if expected == 1 and entry.get("chain") != head.chain:
        raise Tampered(place, "the log is not the one that the head is of")
    calls.heed(entry)
    return End(expected, line.mac, end.number, end.size + len(content))


def require_head(place: Place, key: bytes, head: Head | None) -> Head:
    """Return the head if it was written with this key. Raises Tampered."""
    if head is None:
        raise Tampered(str(place.head), "the head is missing: nothing says how many entries there must be")
    if not chain.is_sealed(key, head):
        raise Tampered(str(place.head), "the head was changed, or written without this key")
    return head


def require_reached(place: Place, head: Head, end: End) -> None:
    """Raise Tampered if the chain does not end where its head says."""
    if end.count < head.count:
        first, last = end.count + 1, head.count
        missing = f"entry {last} is" if first == last else f"entries {first} to {last} are"
        raise Tampered(f"{place.file(end.number)}:end", f"{missing} missing: the head vouches for {last}")
    if head.closed and (end.count > head.count or end.torn):
        problem = f"says that the log was closed with entry {head.count}, but it goes on: the head is an older one"
        raise Tampered(str(place.head), problem)


def recovered_end(place: Place, key: bytes, head: Head | None) -> End:
    """Return where a log ends that is to be continued. Its last file and its head are verified. Raises Tampered."""
    head, files = require_head(place, key, head), place.files()
    end = scan(files[-1], key, end_before(files), head, Calls()) if files else End(0, chain.ROOT, FIRST_NUMBER, 0)
    require_reached(place, head, end)
    return end


def end_before(files: list[Path]) -> End:
    """Return where the chain ends before the last of the files begins: the line before it, not verified."""
    number = number_of(files[-1])
    if len(files) == 1:
        return End(0, chain.ROOT, number, 0)
    *_, last = files[-2].read_bytes().splitlines(keepends=True) or [b""]
    line = chain.parse_line(last)
    entry = chain.entry_of(line) if line else None
    if line is None or entry is None or not isinstance(entry.get("sequence"), int):
        raise Tampered(str(files[-2]), "its last line is not an entry")
    return End(entry["sequence"], line.mac, number, 0)


def lines(place: Place) -> Iterator[Line]:
    """Read the entries of a log, unverified; what is no entry is left out."""
    for path in place.files():
        with path.open("rb") as file:
            yield from filter(None, map(chain.parse_line, file))
