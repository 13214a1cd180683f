"""Which versions of policies have been in force: none is replaced by an older one, and none vanishes unnoticed.

Kept in a file, it holds over restarts: a server does not start without a policy that a file put in force before and
that nobody has removed.
"""

import hashlib
import hmac
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from rudder.sae_models.errors import UserError
from rudder.sae_models.files import write_atomically
from rudder.server.config import Config
from rudder.server.safety.audit import chain
from rudder.server.safety.audit.verify import Place, lines
from rudder.server.safety.policy import Policy, digest_of_message
from rudder.server.safety.problems import Problem
from rudder.v1 import policy_pb2

FILE = "policies.json"
# Before the source of a change that a caller has asked for, in place of a file.
CALLER = "caller "


class Known(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last version of a policy, and its digest. `removed`: that version took it out of force.

    `from_file`: a file of the folder has put it in force, and not only a caller, until the server stops.
    """

    version: int
    digest: str
    removed: bool = False
    from_file: bool = False


class Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file. `seal`: HMAC of the policies under the key of the audit log; empty without one."""

    policies: dict[str, Known]
    seal: str = ""


@dataclass
class Memory:
    """The policies that have been in force, by name. `path`: the file; None: they are forgotten with the process."""

    path: Path | None = None
    key: bytes | None = None
    known: Mapping[str, Known] = field(default_factory=dict)

    @classmethod
    def open(cls, config: Config) -> "Memory":
        """Read what the file and the audit log of a configuration say, of each policy the later.

        UserError: the file was changed.
        """
        audit = config.audit
        folder = Path(audit.folder) if audit.folder else None
        path = Path(config.policies.state) if config.policies.state else folder and folder / FILE
        key = chain.read_key(Path(audit.key_file)) if folder and audit.key_file else None
        kept = read(path, key) if path is not None and path.exists() else {}
        return cls(path, key, later(kept, told_by(Place.of(folder)) if folder else {}))

    def objections(self, message: policy_pb2.Policy) -> list[Problem]:
        """Return why a policy cannot follow what was in force under its name."""
        known = self.known.get(message.name)
        if known is None:
            unknown = "no policy of this name has been in force"
            return [Problem("name", unknown)] if message.removed else []
        same = message.version == known.version and digest_of_message(message) == known.digest
        if same or message.version > known.version:
            return []
        what = "has removed it" if known.removed else "with another content has been in force"
        return [Problem("version", f"is {message.version}, and version {known.version} {what}: raise it")]

    def note(self, policy: Policy, source: str) -> None:
        """Remember that a policy comes into force, or is removed. Raises OSError: then it is not remembered."""
        known = self.known.get(policy.name)
        from_file = not source.startswith(CALLER) or bool(known and known.from_file and not known.removed)
        removed = policy.message.removed
        self.write({**self.known, policy.name: Known(policy.version, policy.digest, removed, from_file)})

    def write(self, known: Mapping[str, Known]) -> None:
        """Replace what is known, in the file first."""
        if self.path is not None:
            kept = Kept(dict(known), seal_of(known, self.key))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, msgspec.json.format(msgspec.json.encode(kept)) + b"\n")
        self.known = known

    def removes(self, message: policy_pb2.Policy) -> bool:
        """Return whether a policy was removed, in this version or a later one."""
        known = self.known.get(message.name)
        return bool(known and known.removed and not message.removed and message.version <= known.version)

    def missing(self, names: Collection[str]) -> dict[str, int]:
        """Return the policies, with their versions, that files put in force, nobody has removed, and `names` lacks."""
        kept = {name: known.version for name, known in self.known.items() if known.from_file and not known.removed}
        return {name: version for name, version in kept.items() if name not in names}


def read(path: Path, key: bytes | None) -> dict[str, Known]:
    """Read the file of a memory. UserError: it cannot be read, or was written without the key."""
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=Kept)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: does not say which policies have been in force: {error}") from error
    if not hmac.compare_digest(seal_of(kept.policies, key), kept.seal):
        problem = "was changed, or written with another audit.key_file: an older policy could come back unnoticed"
        raise UserError(f"{path}: {problem}; put the right one back")
    return kept.policies


def later(one: Mapping[str, Known], other: Mapping[str, Known]) -> dict[str, Known]:
    """Return what is known of each policy by the source that has its later version; of one version, by `one`."""
    newer = {name: known for name, known in other.items() if name not in one or known.version > one[name].version}
    return {**one, **newer}


def seal_of(known: Mapping[str, Known], key: bytes | None) -> str:
    """Return the seal of what is known; empty without a key."""
    content = b"policies" + msgspec.json.encode(known, order="sorted")
    return hmac.new(key, content, hashlib.sha256).hexdigest() if key else ""


def told_by(place: Place) -> dict[str, Known]:
    """Return what the entries of an audit log say of policies."""
    known: dict[str, Known] = {}
    for entry in changes(place):
        policy, source = entry.get("policy"), str(entry.get("source"))
        if policy and entry.get("change") in ("applied", "removed"):
            name, removed = policy["name"], entry["change"] == "removed"
            before = known.get(name)
            from_file = not source.startswith(CALLER) or bool(before and before.from_file and not before.removed)
            known[name] = Known(policy["version"], policy["digest"], removed, from_file)
    return known


def changes(place: Place) -> Iterable[dict[str, Any]]:
    """Yield the entries of changes of policies."""
    for line in lines(place):
        entry = chain.entry_of(line) if b'"kind":"policy"' in line.entry else None
        if entry and entry.get("kind") == "policy":
            yield entry
