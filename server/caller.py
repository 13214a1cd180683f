"""The caller of a request: created by a door, read by limits, admission, cache salts, logs and audit."""

from dataclasses import dataclass

ROLES = frozenset({"generate", "observe", "administer"})


@dataclass(frozen=True)
class Quotas:
    """Caps on what one caller uses; None: no cap."""

    concurrent_requests: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True)
class Caller:
    """Who sent a request. Callers of one tenant share prefix-cache entries; callers of different tenants never do.

    `origin`: the connection of a caller that did not authenticate, which tells it from others for fair shares alone.
    """

    id: str
    tenant: str
    roles: frozenset[str]
    quotas: Quotas | None = None
    origin: str = ""

    @property
    def anonymous(self) -> bool:
        """Whether nothing tells this caller from others."""
        return self.tenant == ANONYMOUS.tenant

    @property
    def share_key(self) -> str:
        """What is shared fairly is shared among these."""
        return f"{self.tenant} {self.id} {self.origin}"


# Every request until doors authenticate.
ANONYMOUS = Caller("anonymous", "anonymous", ROLES)
