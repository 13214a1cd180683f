"""Attacks on files: the policy's, and the audit log's."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from rudder.server.bench.redteam import policies
from rudder.server.bench.redteam.attack import Attack
from rudder.server.bench.redteam.target import Refused, Target
from rudder.server.safety.audit import chain
from rudder.server.safety.audit.log import AuditLog
from rudder.server.safety.audit.verify import Place, Tampered, verify
from rudder.server.safety.store import PolicyStore
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
    older, newer, newest = (next(policies.VERSIONS) for _ in range(3))
    weaker = {"version": older if guarded else newest, "program": policies.blend(0.1)}
    await apply(target, target.bundle_sha256, {"version": newer}, weaker)
    return 1


async def remove_first(target: Target, guarded: bool) -> float:
    """Have a policy removed, and put an older version of it in force that is weaker."""
    older, newer, _ = (next(policies.VERSIONS) for _ in range(3))
    await apply(target, target.bundle_sha256, {"version": newer})
    weaker = {"version": older if guarded else next(policies.VERSIONS), "program": policies.blend(0.1)}
    await apply(target, target.bundle_sha256, weaker)
    return 1


async def empty_folder(target: Target, guarded: bool) -> float:
    """Empty the folder of policies: the share of its policies that are in force no more.

    The control removes the policy by a file that says so.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = PolicyStore(target.serving.engine, Path(folder), allow_uncertified=True)
        path = Path(folder) / "forget.yaml"
        document = {"name": policies.NAME, "version": 1, "binds": {"all": True}}
        path.write_text(json.dumps(document))
        await store.reload()
        assert store.in_force
        path.unlink()
        if not guarded:
            path.write_text(json.dumps({"name": policies.NAME, "version": 2, "removed": True}))
        await store.reload()
        return float(policies.NAME not in store.in_force)


async def apply(target: Target, sha256: str, *versions: policies.Document) -> None:
    """Apply versions of a policy one after the other, then remove it. Raises Refused."""
    store = target.serving.policies
    try:
        for document in versions or ({},):
            raised = {"version": next(policies.VERSIONS), "program": policies.blend()}
            message = policies.policy(sha256, **raised | document)
            await store.apply(message, "red team")
    except Exception as error:
        refusal = refusal_of(error)
        raise Refused(refusal.reason, str(refusal)) from error
    finally:
        if policies.NAME in store.in_force:
            await store.apply(policies.removal(), "red team")


RISING = "a rising version"
ATTACKS = (
    Attack("A26", "tampering with the audit log", "L3", tamper, "unnoticed", "the key", 0.5, holds=0),
    Attack("A26", "policy of another bundle", "L3", swap_bundle, "applied", "the pin", 1, refused="POLICY_INVALID"),
    Attack("A26", "older version", "L3", downgrade, "applied", RISING, 1, refused="POLICY_INVALID"),
    Attack("A26", "removed, then older", "L3", remove_first, "applied", RISING, 1, refused="POLICY_INVALID"),
    Attack("A26", "empty folder", "L3", empty_folder, "gone", "no removal", 1, holds=0),
)
