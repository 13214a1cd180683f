"""Which policies bind a caller, in which order they apply, and what they forbid together."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from google.protobuf.message import Message

from rudder.server.caller import Caller
from rudder.server.program.compile import NO_LIMITS, NOTHING, Compiled, EditLimits, compile_program
from rudder.server.program.errors import ProgramError, require
from rudder.server.program.rows import LockedRows, Registry, resolve
from rudder.server.safety.fields import is_set, submessages
from rudder.server.safety.policy import Policy
from rudder.v1 import inference_pb2, policy_pb2, program_pb2

ALL_RIGHTS = frozenset(policy_pb2.Rights.DESCRIPTOR.fields_by_name)
# The right that a row of a caller's own program needs, by the message that names it, and what these rows are called.
RIGHT_OF_ROW: dict[type[Message], tuple[str, str]] = {
    program_pb2.Feature: ("edit_latents", "latents"),
    program_pb2.Vector: ("raw_vectors", "vectors of its own"),
    program_pb2.Probe: ("raw_vectors", "probes of its own"),
}


def binding_policies(in_force: Iterable[Policy], caller: Caller) -> tuple[Policy, ...]:
    """Return the policies that bind a caller, in the order in which they apply.

    By name, those in shadow mode last: they count what they would do to what the others leave.
    """
    bound = (policy for policy in in_force if binds(policy, caller))
    return tuple(sorted(bound, key=lambda policy: (policy.shadow, policy.name)))


def binds(policy: Policy, caller: Caller) -> bool:
    """Return whether a policy binds a caller."""
    whom = policy.message.binds
    return whom.all or caller.id in whom.callers or not caller.roles.isdisjoint(whom.roles)


def stages_of(policies: Iterable[Policy], forced: Collection[str] = ()) -> tuple[Compiled, ...]:
    """Return the programs of these policies in the order of their stages, without the gate of those in `forced`.

    Every policy that has a program keeps its stage, whether or not it runs.
    """
    with_program = (policy for policy in policies if policy.programs)
    return tuple((p.forced if p.name in forced else p.program) or NOTHING for p in with_program)


def stages_needed(messages: Collection[policy_pb2.Policy]) -> int:
    """Return the most policies with a program that can bind one caller: it has one id, and may have every role."""
    programs = [message.binds for message in messages if message.HasField("program")]
    by_role = [whom for whom in programs if whom.all or whom.roles]
    by_id = [whom for whom in programs if not (whom.all or whom.roles)]
    callers = {caller for whom in by_id for caller in whom.callers}
    return len(by_role) + max((sum(caller in whom.callers for whom in by_id) for caller in callers), default=0)


@dataclass(frozen=True, eq=False)
class Binding:
    """What binds a caller. `policies`: in the order in which they apply; those in shadow mode forbid nothing.

    `named`: programs of the operator, as compiled within these limits. `trial`: policies in shadow mode forbid, too: of
    such a binding only what it would refuse is counted.
    """

    policies: tuple[Policy, ...] = ()
    named: dict[str, Compiled] = field(default_factory=dict)
    trial: bool = False

    @cached_property
    def enforced(self) -> tuple[Policy, ...]:
        """The policies that are not in shadow mode."""
        return tuple(policy for policy in self.policies if self.trial or not policy.shadow)

    @cached_property
    def trials(self) -> "tuple[Binding, ...]":
        """For each policy in shadow mode, what it would forbid if it were enforced."""
        return tuple(Binding((policy,), trial=True) for policy in self.policies if policy.shadow)

    @cached_property
    def rights(self) -> frozenset[str]:
        """The rights that all policies give."""
        given = ({right.name for right, _ in policy.message.rights.ListFields()} for policy in self.enforced)
        return ALL_RIGHTS.intersection(*given)

    @cached_property
    def forbidden(self) -> Mapping[str, str]:
        """The fields that one of the policies forbids, and the name of such a policy."""
        return {path: policy.name for policy in reversed(self.enforced) for path in policy.message.forbidden_fields}

    @cached_property
    def limits(self) -> EditLimits:
        """What the policies leave of what a program may do: every bound is the strictest, locked rows are the union."""
        if not self.enforced:
            return NO_LIMITS
        edited = [policy.first_edited_site for policy in self.enforced if policy.first_edited_site is not None]
        behind, before = "edit_behind_policy" in self.rights, "edit_before_guard" in self.rights
        return EditLimits(
            locked=frozenset().union(*(policy.locked for policy in self.enforced)),
            first_site=0 if before else max(policy.first_unread_site for policy in self.enforced),
            last_site=None if behind else min(edited, default=None),
            directions=np.concatenate([policy.directions for policy in self.enforced]),
            reads_locked="read_guards" in self.rights,
            max_displacement=min(policy.max_displacement for policy in self.enforced),
        )

    @property
    def hidden(self) -> LockedRows:
        """The latents that a report leaves out: those that a request must not name in one."""
        if self.limits.reads_locked:
            return frozenset()
        return frozenset().union(*(policy.hidden for policy in self.enforced))

    @property
    def stages_enforced(self) -> int:
        """How many of the stages, the first ones, must apply: those of policies in shadow mode come last."""
        return sum(bool(policy.programs) for policy in self.enforced)

    @property
    def reads_by_probes(self) -> bool:
        """Whether probes of its own tell a caller nothing that it may not read.

        None need be parallel to a locked row: of a few that are not, some combination is.
        """
        return self.limits.reads_locked or self.limits.directions is None or not len(self.limits.directions)

    @property
    def reads_scores(self) -> bool:
        """Whether refusals and annotations say the scores of guards."""
        return "read_guards" in self.rights

    def check_fields(self, request: Message) -> None:
        """Raise ProgramError POLICY_FORBIDS if a request sets a field that one of the policies forbids."""
        for path, name in self.forbidden.items():
            require(not is_set(request, path), path, f"policy {name!r} forbids it", "POLICY_FORBIDS")

    def compile_named(self, name: str, program: program_pb2.Program, registry: Registry, field: str) -> Compiled:
        """Compile a program of the operator within the limits. Raises ProgramError, with the field below `field`."""
        if name not in self.named:
            self.named[name] = compile_program(program, registry, limits=self.limits, field=field)
        return self.named[name]

    def compile_topic(self, program: program_pb2.Program, registry: Registry, field: str) -> Compiled:
        """Compile the program of a topic, whose doses vary with its strength. Raises ProgramError likewise."""
        return compile_program(program, registry, limits=self.limits, field=field)

    def compile_own(self, program: program_pb2.Program, registry: Registry, field: str) -> Compiled:
        """Compile a caller's own program within rights and limits. Raises ProgramError likewise."""
        self.require_rights(program, field)
        compiled = compile_program(program, registry, limits=self.limits, field=field)
        self.limits.check_writes(compiled, registry, f"{field}.sites")
        return compiled

    def require_rights(self, message: Message, field: str) -> None:
        """Raise ProgramError POLICY_FORBIDS if a latent, vector or probe in a message needs a right not given."""
        own_programs = bool(self.rights & {right for right, _ in RIGHT_OF_ROW.values()})
        if isinstance(message, program_pb2.Program):
            require(
                own_programs, field, f"{self.binder} binds this caller to programs that have names", "POLICY_FORBIDS"
            )
        for path, part in submessages(message, field):
            right, rows = RIGHT_OF_ROW.get(type(part), ("", ""))
            allowed = not right or right in self.rights
            require(allowed, path, f"{self.binder} binds this caller, which may not use {rows}", "POLICY_FORBIDS")
            blind = self.reads_by_probes or not isinstance(part, program_pb2.Probe)
            together = "which may not use probes of its own: together they read what guards read (read_guards)"
            require(blind, path, f"{self.binder} binds this caller, {together}", "POLICY_FORBIDS")

    def check_report(self, features: Sequence[inference_pb2.SiteFeature], registry: Registry, field: str) -> None:
        """Raise ProgramError if a report reads a locked row, or has probes without the right to them."""
        if not self.enforced:
            return
        for number, feature in enumerate(features):
            at = f"{field}[{number}].row"
            if not feature.row.HasField("feature"):
                self.require_rights(feature.row, at)
            if not self.limits.reads_locked:
                target = resolve(feature.row, feature.site, registry, at)
                self.limits.check_row(target.row, target.name, registry, at)

    def check_token_ids(self, field: str, ids: Sequence[int], written: Sequence[int]) -> None:
        """Raise ProgramError POLICY_FORBIDS unless token ids are those that the tokenizer writes for their text."""
        if self.enforced and tuple(ids) != tuple(written):
            problem = f"{self.binder} binds this caller: these are not the ids that the tokenizer writes for their text"
            raise ProgramError(field, problem, "POLICY_FORBIDS")

    @property
    def binder(self) -> str:
        """Name the first policy that is enforced."""
        return f"policy {self.enforced[0].name!r}" if self.enforced else "no policy"


UNBOUND = Binding()
