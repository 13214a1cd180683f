"""Which role a method needs, in one table. Methods that are not in it need none."""

from rudder.server.caller import Caller
from rudder.server.service.errors import Refusal

ADMINISTER = "administer"
# Definitions of guards would tell an attacker how to stay below them.
ROLE_OF_METHOD = {
    "PolicyService.Get": ADMINISTER,
    "PolicyService.Validate": ADMINISTER,
    "PolicyService.Apply": ADMINISTER,
}


def require_role(method: str, caller: Caller) -> None:
    """Refuse a caller who lacks the role that a method needs."""
    role = ROLE_OF_METHOD.get(method)
    if role is not None and role not in caller.roles:
        raise Refusal("NOT_ALLOWED", f"{method} needs the role {role}")
