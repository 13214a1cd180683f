"""Which policy binds a caller, and the rows that it locks."""

from rudder.server.caller import Caller
from rudder.server.engine.engine import Engine
from rudder.server.program.compile import Compiled
from rudder.server.program.rows import NO_LOCKED_ROWS, LockedRows


def binding_policy(engine: Engine, caller: Caller) -> Compiled | None:  # noqa: ARG001
    """Return the policy that binds `caller`; None: no policy does. The default policy binds every caller."""
    return engine.default_policy


def locked_rows(policy: Compiled | None) -> LockedRows:
    """Return the rows that a caller bound by `policy` must not edit."""
    return policy.locks if policy else NO_LOCKED_ROWS
