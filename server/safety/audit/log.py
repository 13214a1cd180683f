"""The files of an audit log: append, rotate, anchor the head, and go on after a crash.

`audit-000001.jsonl` and so on hold the chain; one process writes them. Failures raise OSError, and leave the log as it
was before the call: what half an append has written is cut off again.
"""

import hashlib
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from rudder.sae_models.errors import UserError
from rudder.sae_models.files import lock_folder, naming_file_in_errors, write_atomically
from rudder.server import failpoints
from rudder.server.safety.audit import chain
from rudder.server.safety.audit.chain import Head
from rudder.server.safety.audit.verify import FIRST_NUMBER, End, Place, Tampered, recovered_end

Fsync = Literal["always", "interval", "never"]
PRIVATE_FOLDER, PRIVATE_FILE = 0o700, 0o600


class AuditLog:
    """A log that is open for appending. Not thread-safe."""

    def __init__(
        self, place: Place, key: bytes, identifier: str, end: End, max_bytes: int, fsync: Fsync, lock: ExitStack
    ) -> None:
        self.place, self.key, self.identifier, self.end = place, key, identifier, end
        self.max_bytes, self.fsync, self.lock = max_bytes, fsync, lock
        self.anchored = -1
        self.descriptor = open_file(place.file(end.number))
        # The file may hold anything. After a failed fsync, too: the kernel may have dropped pages, and the next fsync
        # would succeed without them.
        self.broken = False

    @classmethod
    def open(cls, place: Place, key: bytes, max_bytes: int, fsync: Fsync) -> "AuditLog":
        """Open a log, or begin one, and anchor its head as open. A torn last line is kept aside, and an entry says so.

        UserError: another process writes it, or it is not what its head vouches for.
        """
        with ExitStack() as stack:
            lock_log(place, stack)
            identifier, end = continued(place, key)
            log = cls(place, key, identifier, end, max_bytes, fsync, stack)
            stack.callback(lambda: os.close(log.descriptor))
            # First the head: files without one are never the rest of a start that failed.
            log.anchor()
            begin = [{"kind": "begin", "time": chain.now(), "chain": identifier}] if end.count == 0 else []
            if entries := [*begin, *log.set_torn_line_aside()]:
                log.append(entries)
                log.anchor()
            log.lock = stack.pop_all()
            return log

    def append(self, entries: Sequence[Mapping[str, Any]]) -> list[bytes]:
        """Append entries, each with its number as `sequence`; return their lines. Raises OSError: then none is."""
        self.require_known()
        if self.end.size >= self.max_bytes:
            self.rotate()
        mac, lines = self.end.mac, []
        for number, entry in enumerate(entries, self.end.count + 1):
            line = chain.seal_entry(self.key, mac, {**entry, "sequence": number})
            mac = line.mac
            lines.append(line.bytes)
        self.write(b"".join(lines))
        size = self.end.size + sum(map(len, lines))
        self.end = End(self.end.count + len(lines), mac, self.end.number, size)
        if self.fsync == "always":
            self.synchronise()
        return lines

    def write(self, content: bytes) -> None:
        """Write at the end of the file, or cut it back to what it was."""
        path = self.place.file(self.end.number)
        try:
            with naming_file_in_errors(path):
                failpoints.hit("audit.write")
                write_all(self.descriptor, content)
        except OSError:
            self.broken = True
            os.ftruncate(self.descriptor, self.end.size)
            self.broken = False
            raise

    def require_known(self) -> None:
        """Raise OSError if nobody knows what the file holds: nothing may be appended, and no head vouch for it."""
        if self.broken:
            raise OSError("the log failed in a way that only a restart of the server mends")

    def synchronise(self) -> None:
        """Flush the file to the disk."""
        try:
            with naming_file_in_errors(self.place.file(self.end.number)):
                os.fsync(self.descriptor)
        except OSError:
            self.broken = True
            raise

    def anchor(self, closed: bool = False) -> None:
        """Write the head, behind the entries that it vouches for."""
        if self.end.count == self.anchored and not closed:
            return
        self.require_known()
        if self.fsync != "never":
            self.synchronise()
        head = Head(chain=self.identifier, count=self.end.count, mac=self.end.mac.hex(), closed=closed)
        write_privately(self.place.head, msgspec.json.encode(chain.seal_head(self.key, head)) + b"\n")
        self.anchored = self.end.count

    def rotate(self) -> None:
        """Go on in a new file."""
        self.anchor()
        number = self.end.number + 1
        descriptor = open_file(self.place.file(number))
        os.close(self.descriptor)
        self.descriptor = descriptor
        self.end = replace(self.end, number=number, size=0)

    def set_torn_line_aside(self) -> list[dict[str, Any]]:
        """Move what follows the last whole line to a file of its own; return the entry that says so."""
        if not self.end.torn:
            return []
        path = self.place.file(self.end.number)
        torn = path.read_bytes()[self.end.size :]
        kept = path.with_name(f"torn-{self.end.count + 1}.txt")
        write_privately(kept, torn)
        os.ftruncate(self.descriptor, self.end.size)
        self.end = replace(self.end, torn=False)
        digest = hashlib.sha256(torn).hexdigest()
        entry = {"kind": "recovered", "time": chain.now(), "bytes": len(torn), "sha256": digest, "kept": kept.name}
        return [entry]

    def close(self) -> None:
        """Anchor the head as closed, and release the log in whatever way that ends."""
        with self.lock:
            self.anchor(closed=True)


def lock_log(place: Place, stack: ExitStack) -> None:
    """Create the folder of a log and hold its lock on `stack`. UserError: another process writes the log."""
    place.folder.mkdir(mode=PRIVATE_FOLDER, parents=True, exist_ok=True)
    try:
        stack.enter_context(lock_folder(place.folder))
    except BlockingIOError as error:
        raise UserError(f"audit.folder: {error}") from error


def continued(place: Place, key: bytes) -> tuple[str, End]:
    """Return the identifier and the end of the log that is there, or of a new one. UserError: it was tampered with."""
    head = chain.read_head(place.head)
    if head is None and not place.files():
        return secrets.token_hex(16), End(0, chain.ROOT, FIRST_NUMBER, 0)
    try:
        end = recovered_end(place, key, head)
    except Tampered as error:
        hint = f"see `rudder audit verify {place.folder}`; to begin a new log, move this one away"
        raise UserError(f"audit.folder: {error}; {hint}") from error
    assert head
    return head.chain, end


def open_file(path: Path) -> int:
    """Open a file of the log for appending, readable by its owner alone, and make its name durable."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
    return descriptor


def write_all(descriptor: int, content: bytes) -> None:
    """Write all bytes: a full disk may take some of them before it refuses."""
    while content:
        content = content[os.write(descriptor, content) :]


def write_privately(path: Path, content: bytes) -> None:
    """Write a file atomically, readable by its owner alone."""
    write_atomically(path, content)
    path.chmod(PRIVATE_FILE)
