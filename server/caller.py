"""The caller of a request: created by a door, read by limits, admission, cache salts, logs and audit."""

from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

# What each role may do is in `identity/roles.py` and `service/authorisation.py`.
ROLES = frozenset({"generate", "steer", "raw", "observe", "operate", "administer"})
MAX_RATE = 1e12
Rate = Annotated[float, Meta(gt=0, le=MAX_RATE)]


class Quotas(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Caps on what one caller uses of one server, per minute but for `streams` and `rows`, which are at once.

    None: no cap. `rows`: row places of the bank, counted once for each call that names them.
    """

    requests: Rate | None = None
    request_bytes: Rate | None = None
    prompt_tokens: Rate | None = None
    generated_tokens: Rate | None = None
    streams: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    rows: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None


NO_QUOTAS = Quotas()


@dataclass(frozen=True)
class Caller:
    """Who sent a request. Callers of one tenant share prefix-cache entries; callers of different tenants never do.

    `origin`: the connection of a caller that did not authenticate, which tells it from others for fair shares alone.
    """

    id: str
    tenant: str
    roles: frozenset[str]
    quotas: Quotas = NO_QUOTAS
    origin: str = ""

    @property
    def anonymous(self) -> bool:
        """Whether nothing tells this caller from others."""
        return self.tenant == ANONYMOUS.tenant

    @property
    def share_key(self) -> str:
        """What is shared fairly is shared among these."""
        return f"{self.tenant} {self.id} {self.origin}"


def alone(caller: str) -> str:
    """Return the tenant of a caller that no file gives one. No file can name it: names have no space."""
    return f"caller {caller}"


# A caller without credentials, where the server asks for none.
ANONYMOUS = Caller("anonymous", "anonymous", ROLES)
