"""The format of the audit log: lines of JSON in a keyed chain, and the head that says how long the chain is.

    mac_i = HMAC-SHA256(key, mac_(i-1) || entry_i)        mac_0 = 32 zero bytes

A line is the entry with `mac` as its last member. What is authenticated are the bytes of the line, so that no reader
has to write an entry as this program did. The head is authenticated too: the MACs of a log are no secret, so without
that a log could be cut and given the head of its rest.
"""

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from rudder.sae_models.errors import UserError

ROOT = bytes(32)
MEMBER, END = b',"mac":"', b'"}\n'
MAC_CHARS = 64
KEY_BYTES = 32
# Nobody but the owner and his group, as whom a secret is mounted.
OTHERS = 0o007


class Head(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far the chain goes: `count` entries, the last of which has `mac`. `closed`: no entry follows.

    `chain`: identifies the chain, as its first entry does. `seal`: HMAC of the other fields.
    """

    chain: str
    count: int
    mac: str
    closed: bool
    seal: str = ""


@dataclass(frozen=True)
class Line:
    """A line of the log: the bytes of its entry, and its MAC."""

    entry: bytes
    mac: bytes

    @property
    def bytes(self) -> bytes:
        """The line as it stands in the file."""
        return self.entry[:-1] + MEMBER + self.mac.hex().encode() + END


def mac_of(key: bytes, previous: bytes, entry: bytes) -> bytes:
    """Return the MAC of an entry that follows the one with MAC `previous`."""
    return hmac.digest(key, previous + entry, hashlib.sha256)


def seal_entry(key: bytes, previous: bytes, entry: Mapping[str, Any]) -> Line:
    """Write an entry, which is not empty, as the line that follows MAC `previous`. Infinite numbers are null."""
    encoded = msgspec.json.encode(entry, order="sorted")
    return Line(encoded, mac_of(key, previous, encoded))


def parse_line(line: bytes) -> Line | None:
    """Split a line into entry and MAC; None if it is no line of an audit log."""
    entry, member, tail = line.rpartition(MEMBER)
    digits, end = tail[:MAC_CHARS], tail[MAC_CHARS:]
    if not (member and end == END and set(digits) <= set(b"0123456789abcdef") and len(digits) == MAC_CHARS):
        return None
    return Line(entry + b"}", bytes.fromhex(digits.decode()))


def entry_of(line: Line) -> dict[str, Any] | None:
    """Return the members of an entry; None if it is not a JSON object."""
    try:
        return msgspec.json.decode(line.entry, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def now() -> str:
    """Return the time in UTC, RFC 3339 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def seal_head(key: bytes, head: Head) -> Head:
    """Return the head with its seal."""
    text = msgspec.json.encode((head.chain, head.count, head.mac, head.closed))
    return msgspec.structs.replace(head, seal=hmac.new(key, b"head" + text, hashlib.sha256).hexdigest())


def read_head(path: Path) -> Head | None:
    """Read a head file; None if there is none. UserError: it is no head."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Head)
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not the head of an audit log: {error}") from error


def is_sealed(key: bytes, head: Head) -> bool:
    """Whether the head was written with this key."""
    return hmac.compare_digest(seal_head(key, head).seal, head.seal)


def create_key(path: Path) -> None:
    """Write a new random key that only its owner can read. UserError: the file exists."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise UserError(
            f"{path}: exists already; a log can be verified only with the key that it was begun with"
        ) from error
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(KEY_BYTES) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_key(path: Path) -> bytes:
    """Read a key: hexadecimal digits of at least 32 bytes. UserError: it is none, or others may read the file."""
    try:
        text, mode = path.read_text(encoding="ascii"), path.stat().st_mode
        key = bytes.fromhex(text)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such key file; `rudder audit key {path}` writes one") from error
    except ValueError as error:
        raise UserError(f"{path}: is not a key: {2 * KEY_BYTES} or more hexadecimal digits") from error
    if len(key) < KEY_BYTES:
        raise UserError(f"{path}: is not a key: {2 * KEY_BYTES} or more hexadecimal digits")
    if mode & OTHERS:
        raise UserError(f"{path}: others may read or write the key: `chmod o= {path}`")
    return key
