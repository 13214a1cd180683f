"""Attacks on files: the policy's, and the audit log's."""

import tempfile
from collections.abc import Callable
from statistics import fmean

from rudder.server.bench.redteam import policies
from rudder.server.bench.redteam.attack import Attack
from rudder.server.bench.redteam.target import Refused, Target
from rudder.server.safety.audit import chain
from rudder.server.safety.audit.log import AuditLog
from rudder.server.safety.audit.verify import Place, Tampered, verify
from rudder.server.service.errors import refusal_of

ENTRIES = 12
Tamper = Callable[[list[bytes]], list[bytes]]


def recomputed(lines: list[bytes]) -> list[bytes]:
    """Change an entry and compute all MACs again, with a key that is not the log's."""
    mac, key, written = chain.ROOT, bytes(32), []
    for content in lines:
        line = chain.parse_line(content)
        assert line
        entry = line.entry.replace(b'"n":5', b'"n":9')
        mac = chain.mac_of(key, mac, entry)
        written.append(chain.Line(entry, mac).bytes)
    return written


TAMPERINGS: dict[str, Tamper] = {
    "edit": lambda lines: [line.replace(b'"n":5', b'"n":9') for line in lines],
    "delete": lambda lines: lines[:4] + lines[5:],
    "reorder": lambda lines: [*lines[:4], lines[5], lines[4], *lines[6:]],
    "cut": lambda lines: lines[:-3],
    "recompute": recomputed,
}


async def tamper(_: Target, guarded: bool) -> float:
    """Edit, delete, reorder, cut or recompute an audit log: the share of these that goes unnoticed.

    Without the guard the log is read as lines of JSON with consistent numbers, as a plain log would be.
    """
    return fmean([unnoticed(change, keyed=guarded) for change in TAMPERINGS.values()])


def unnoticed(change: Tamper, *, keyed: bool) -> bool:
    """Return whether a change of a log is not noticed."""
    with tempfile.TemporaryDirectory() as folder:
        place, key = Place.of(folder), bytes(range(32))
        log = AuditLog.open(place, key, 1 << 20, "never")
        log.append([{"kind": "call", "n": number} for number in range(ENTRIES)])
        log.close()
        (path,) = place.files()
        changed = change(path.read_bytes().splitlines(keepends=True))
        path.write_bytes(b"".join(changed))
        if not keyed:
            return all(chain.parse_line(line) for line in changed)
        try:
            verify(place, key)
        except Tampered:
            return False
        return True


async def swap_bundle(target: Target, guarded: bool) -> float:
    """Put a policy in force that was written for other weights."""
    sha256 = "0" * 64 if guarded else target.bundle_sha256
    await apply(target, sha256)
    return 1


async def downgrade(target: Target, guarded: bool) -> float:
    """Put an older version of a policy in force, that is weaker."""
    weaker = {"version": 2 if guarded else 4, "program": policies.blend(0.1)}
    await apply(target, target.bundle_sha256, {"version": 3}, weaker)
    return 1


async def apply(target: Target, sha256: str, *versions: policies.Document) -> None:
    """Apply versions of a policy one after the other, then remove it. Raises Refused."""
    store = target.serving.policies
    try:
        for document in versions or ({},):
            message = policies.policy(sha256, **{"program": policies.blend()} | document)
            await store.apply(message, "red team")
    except Exception as error:
        refusal = refusal_of(error)
        raise Refused(refusal.reason, str(refusal)) from error
    finally:
        if policies.NAME in store.in_force:
            await store.remove(policies.NAME, "red team")


ATTACKS = (
    Attack("A26", "tampering with the audit log", "L3", tamper, "unnoticed", "the key", 0.5, holds=0),
    Attack("A26", "policy of another bundle", "L3", swap_bundle, "applied", "the pin", 1, refused="POLICY_INVALID"),
    Attack("A26", "older version", "L3", downgrade, "applied", "a rising version", 1, refused="POLICY_INVALID"),
)
