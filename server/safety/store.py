"""The policies in force: put in force, replaced, removed and read again from their folder, while calls run."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from rudder.sae_models.errors import UserError
from rudder.server import failpoints
from rudder.server.caller import Caller
from rudder.server.engine.engine import Engine
from rudder.server.engine.ledger import PINNED_HANDLE, BankFull
from rudder.server.monitoring.logs import fields
from rudder.server.program.named import program_files, read_policy
from rudder.server.safety import certificate as certificates
from rudder.server.safety.binding import Binding, binding_policies, stages_needed
from rudder.server.safety.certificate import Status, needs_certificate
from rudder.server.safety.memory import Memory
from rudder.server.safety.policy import Policy, compile_policy
from rudder.server.safety.problems import PolicyInvalid, Problem
from rudder.v1 import policy_pb2

# Bindings that are remembered, by caller.
MAX_BINDINGS = 1024
# Of a file: which one it is, when it was changed, and its size; None where it cannot be read.
Signature = tuple[int, int, int] | None
Outcome = Literal["applied", "unchanged", "removed", "refused"]
NO_FILE = (
    "no file has this policy any more, and it stays in force: a file with `removed: true` and a raised version ends it"
)

logger = logging.getLogger(__name__)


class Change(NamedTuple):
    """What became of a policy. `source`: a file, or who applied it; `policy`: None if what was refused has no name."""

    outcome: Outcome
    source: str
    policy: Policy | None = None
    problem: str = ""


@dataclass
class PolicyStore:
    """The policies in force.

    A call keeps the policies that bound it when it began. The rows of a policy are held before it is in force, and
    until the last call that it bound has ended. `files`: what each file of the folder held when it was last read, and
    the name of the policy that it put in force. `memory`: what has been in force. `certificate_key`: of the
    seal that certificates must have. `listeners` are told of every change.
    """

    engine: Engine
    folder: Path | None = None
    allow_uncertified: bool = False
    memory: Memory = field(default_factory=Memory)
    certificate_key: bytes | None = None
    in_force: Mapping[str, Policy] = field(default_factory=dict)
    handles: dict[Policy, int] = field(default_factory=dict)
    running: Counter[Policy] = field(default_factory=Counter)
    bindings: dict[tuple[str, frozenset[str]], Binding] = field(default_factory=dict)
    files: dict[Path, tuple[bytes, str]] = field(default_factory=dict)
    listeners: list[Callable[[Change], None]] = field(default_factory=list)
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    # The event loop itself keeps no task alive.
    changes: set["asyncio.Future[Policy]"] = field(default_factory=set)

    def binding(self, caller: Caller) -> Binding:
        """Return what binds a caller."""
        key = caller.id, caller.roles
        if key not in self.bindings:
            if len(self.bindings) >= MAX_BINDINGS:
                self.bindings.clear()
            self.bindings[key] = Binding(binding_policies(self.in_force.values(), caller))
        return self.bindings[key]

    def acquire(self, policies: Iterable[Policy]) -> None:
        """Note a call that these policies bind."""
        self.running.update(policies)

    def release(self, policies: Iterable[Policy]) -> None:
        """Note the end of a call that these policies bound. The last one of a replaced policy frees its rows."""
        for policy in policies:
            self.running[policy] -= 1
            if self.running[policy] <= 0:
                del self.running[policy]
                self.retire(policy)

    def retire(self, policy: Policy) -> None:
        """Free the rows of a policy that is not in force and binds no running call."""
        if policy in self.handles and policy not in self.running and self.in_force.get(policy.name) is not policy:
            self.engine.spawn(self.engine.drop(self.handles.pop(policy)))

    async def apply(self, message: policy_pb2.Policy, source: str) -> Policy:
        """Put a policy in force in place of the one of its name, or take that one out of force.

        Whoever waits may leave; the change is made whole. Raises PolicyInvalid, and nothing has changed.
        """
        change = asyncio.ensure_future(self.replace(message, source))
        self.changes.add(change)
        change.add_done_callback(self.changes.discard)
        return await asyncio.shield(change)

    async def replace(self, message: policy_pb2.Policy, source: str) -> Policy:
        """Implement `apply`."""
        async with self.changing:
            policy = await self.compile(message, source)
            old = self.in_force.get(policy.name)
            if old and old.digest == policy.digest:
                return old
            if problems := self.objections(policy):
                raise PolicyInvalid(source, problems)
            await self.hold(policy, source)
            self.remember(policy, source)
            removed = policy.message.removed
            others = {name: other for name, other in self.in_force.items() if name != policy.name}
            self.set_in_force(others if removed else {**self.in_force, policy.name: policy})
            if old:
                self.retire(old)
            if old or not removed:
                self.tell(Change("removed" if removed else "applied", source, policy))
            return policy

    def remember(self, policy: Policy, source: str) -> None:
        """Write down that a policy comes into force, or is removed. Raises PolicyInvalid if that cannot be written."""
        try:
            self.memory.note(policy, source)
        except OSError as error:
            self.retire(policy)
            raise PolicyInvalid(source, [Problem("version", f"cannot be remembered: {error}")]) from error

    async def compile(self, message: policy_pb2.Policy, source: str) -> Policy:
        """Compile a policy in a thread, since weights are compared. Raises PolicyInvalid."""
        folder, loop = self.folder or Path(), asyncio.get_running_loop()
        return await loop.run_in_executor(None, compile_policy, message, self.engine.registry, folder, source)

    async def problems(self, message: policy_pb2.Policy) -> list[Problem]:
        """Return all that is wrong with a policy on this server; empty if it can be applied."""
        try:
            policy = await self.compile(message, "")
        except PolicyInvalid as invalid:
            return [*invalid.problems, *self.conflicts(message)]
        return self.objections(policy)

    def objections(self, policy: Policy) -> list[Problem]:
        """Return why a policy that can be compiled cannot be put in force."""
        return [*self.conflicts(policy.message), *self.uncounted(policy), *self.uncertified(policy.message)]

    async def hold(self, policy: Policy, source: str) -> None:
        """Hold the rows of a policy. Raises PolicyInvalid if the bank has no room for them now."""
        if policy.rows:
            try:
                self.handles[policy] = await self.engine.hold(policy.rows)
            except BankFull as full:
                raise PolicyInvalid(source, [Problem("program", f"its rows cannot be held: {full}")]) from full

    def set_in_force(self, policies: Mapping[str, Policy]) -> None:
        """Replace all policies in force."""
        self.in_force = policies
        self.bindings.clear()
        self.engine.metrics.policies_in_force((p.name, p.version, mode_of(p)) for p in policies.values())

    def conflicts(self, message: policy_pb2.Policy) -> list[Problem]:
        """Return why a policy cannot follow the one of its name, or stand beside the others on this engine."""
        problems = self.memory.objections(message)
        others = [other.message for name, other in self.in_force.items() if name != message.name]
        stages, needed = self.engine.registry.layout.stages - 1, stages_needed([*others, message])
        if needed > stages:
            problem = f"{needed} policies with a program could bind one caller, and the server has room for {stages}"
            problems.append(Problem("program", f"{problem}: raise policies.stages and start it again"))
        return problems

    def uncounted(self, policy: Policy) -> list[Problem]:
        """Return which of the rows that a policy watches are not counted: they are chosen when the engine starts."""
        pinned = self.engine.admission.reservations.get(PINNED_HANDLE, frozenset())
        return [
            Problem(f"watch[{number}]", "is not counted since the start: start the server again")
            for number, row in enumerate(policy.watch)
            if (row.site, row.row) not in pinned
        ]

    def uncertified(self, message: policy_pb2.Policy) -> list[Problem]:
        """Return why a policy may act otherwise on this engine than where its evaluation was recorded."""
        if self.allow_uncertified or not needs_certificate(message):
            return []
        return certificates.objections(*self.certificate(message))

    def certificate(self, message: policy_pb2.Policy) -> tuple[Status, str]:
        """Return what the certificate beside a policy is worth here, and why it is no PASS."""
        return certificates.standing(self.engine, message, self.folder or Path(), self.certificate_key)

    async def reload(self) -> None:
        """Read the folder again. A file that is wrong is refused by name, and what it put in force before stays.

        So does a policy that no file has any more: only a removal takes it out of force.
        """
        if self.folder is None:
            return
        if not self.folder.is_dir():
            self.tell(Change("refused", str(self.folder), None, "is not a folder: every policy stays as it is"))
            return
        paths = program_files(self.folder)
        self.files = {path: state for path, state in self.files.items() if path in paths}
        for path in paths:
            await self.reload_file(path)
        for name in self.memory.missing({name for _, name in self.files.values()}):
            if name in self.in_force:
                self.tell(Change("refused", str(self.folder), self.in_force[name], NO_FILE))

    async def reload_file(self, path: Path) -> None:
        """Read one file again, unless it has not changed since it was last put in force."""
        former, others = self.files.get(path), {name for other, (_, name) in self.files.items() if other != path}
        try:
            failpoints.hit("policy.reload")
            content = await asyncio.to_thread(path.read_bytes)
            if former and content == former[0]:
                return
            message = read_policy(path)
            if message.name in others:
                raise PolicyInvalid(
                    str(path), [Problem("name", f"{message.name!r} is the policy of another file, too")]
                )
            before = self.in_force.get(message.name)
            policy = await self.apply(message, str(path))
        except (UserError, OSError) as error:
            self.tell(Change("refused", str(path), None, str(error)))
            return
        self.files[path] = content, policy.name
        if policy is before:
            self.tell(Change("unchanged", str(path), policy))

    async def watch_folder(self, interval_s: float) -> None:
        """Reload once a change of the folder has been there for one interval: until then a file may be half written."""
        loaded = seen = self.signatures()
        while True:
            await asyncio.sleep(interval_s)
            now = self.signatures()
            if now == seen and now != loaded:
                loaded = now
                await self.reload()
            seen = now

    def signatures(self) -> dict[Path, Signature]:
        """Return what tells whether a file of the folder has changed."""
        return {path: signature(path) for path in program_files(self.folder)} if self.folder else {}

    def tell(self, change: Change) -> None:
        """Log and count a change, and tell the listeners."""
        self.engine.metrics.policy_changed(change.outcome)
        values = fields(source=change.source, **describe(change.policy))
        if change.outcome == "refused":
            logger.error("policy refused, what was in force stays", extra=values | fields(problem=change.problem))
        else:
            logger.info("policy %s", change.outcome, extra=values)
        for listener in self.listeners:
            listener(change)


def signature(path: Path) -> Signature:
    """Return what tells whether a file has changed."""
    try:
        stat = path.stat()
    except OSError:
        return None
    # A link may come to name another file of the same time and size.
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def mode_of(policy: Policy) -> str:
    """Return the name of a policy's mode."""
    return "shadow" if policy.shadow else "enforce"


def describe(policy: Policy | None) -> dict[str, object]:
    """Return what a log line says of a policy."""
    if policy is None:
        return {}
    return {"policy": policy.name, "version": policy.version, "digest": policy.digest, "mode": mode_of(policy)}
