"""An audit log in a folder, for tests."""

from pathlib import Path
from typing import Any

from rudder.server.config import Audit
from rudder.server.safety.audit import chain
from rudder.server.safety.audit.log import AuditLog, Fsync
from rudder.server.safety.audit.verify import Place

KEY = bytes(range(32))


def call_entry(number: int) -> dict[str, Any]:
    """An entry as the server writes it."""
    return {
        "kind": "call",
        "request_id": f"{number:024x}",
        "caller": "anna",
        "outcome": "OK",
        "generated_tokens": number,
    }


def open_log(folder: Path, max_bytes: int = 1 << 20, fsync: Fsync = "never") -> AuditLog:
    return AuditLog.open(Place.of(folder), KEY, max_bytes, fsync)


def written_log(folder: Path, entries: int, max_bytes: int = 1 << 20, anchor_every: int = 5) -> Place:
    """Write a log of the first entry and so many more, and close it."""
    log = open_log(folder, max_bytes)
    for number in range(entries):
        log.append([call_entry(number)])
        if number % anchor_every == 0:
            log.anchor()
    log.close()
    return log.place


def key_file(folder: Path) -> Path:
    path = folder / "audit.key"
    chain.create_key(path)
    return path


def settings(folder: Path, **fields: Any) -> Audit:
    return Audit(folder=str(folder / "log"), key_file=str(key_file(folder)), **fields)
