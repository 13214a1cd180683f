"""Which policy binds a caller, and what it forbids the caller's programs."""

from rudder.server.caller import Caller
from rudder.server.config import Policies
from rudder.server.engine.engine import Engine
from rudder.server.program.compile import Compiled, EditLimits, compile_program
from rudder.server.program.rows import Registry
from rudder.v1 import program_pb2


def binding_policy(engine: Engine, caller: Caller) -> Compiled | None:  # noqa: ARG001
    """Return the policy that binds `caller`; None: no policy does. The default policy binds every caller."""
    return engine.default_policy


def compile_bound(
    program: program_pb2.Program, registry: Registry, policy: Compiled | None, settings: Policies, field: str
) -> Compiled:
    """Compile a program of a request that `policy` binds.

    The policy is the second stage of each site that it edits, so no edit at these or earlier sites acts on its result.
    An edit behind its first site would: it is refused with POLICY_FORBIDS, unless `settings.allow_later_edits`. A gate
    of the policy reads what the request's edits leave at its site and at earlier ones, where an edit could close it: it
    is refused likewise, unless `settings.allow_edits_before_gate`. The latents that the policy edits, or reads for its
    gate, are locked: ROW_LOCKED. Raises ProgramError, which names the field below `field`.
    """
    if policy is None:
        return compile_program(program, registry, field=field)
    limits = EditLimits(
        locked=policy.edited_latents | policy.gate_latents,
        first_site=0 if settings.allow_edits_before_gate else policy.site_behind_gate,
        last_site=None if settings.allow_later_edits else policy.first_edited_site,
    )
    return compile_program(program, registry, limits=limits, field=field)
