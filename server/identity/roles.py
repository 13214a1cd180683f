"""Which roles each method of the contract needs. A method that is not here is refused to everybody."""

from collections.abc import Mapping

from rudder.server.caller import Caller
from rudder.server.identity.errors import CredentialError

ANY = frozenset({"generate", "steer", "raw", "observe", "operate", "administer"})
READS_POLICIES = frozenset({"observe", "operate", "administer"})
# One of them suffices. What a request's fields need besides is in `service/authorisation.py`.
METHODS: Mapping[str, frozenset[str]] = {
    "InferenceService.Generate": frozenset({"generate"}),
    "InferenceService.Complete": frozenset({"generate"}),
    "InferenceService.Inspect": frozenset({"observe"}),
    "InferenceService.Tokenize": frozenset({"generate", "observe"}),
    "FeatureService.Get": frozenset({"observe", "steer"}),
    "FeatureService.List": frozenset({"observe", "steer"}),
    "FeatureService.Search": frozenset({"observe", "steer"}),
    "ModelService.Get": ANY,
    "ModelService.ListPrograms": ANY,
    "PolicyService.List": READS_POLICIES,
    # The definition of a guard would tell how to stay below it.
    "PolicyService.Get": frozenset({"administer"}),
    "PolicyService.Validate": frozenset({"administer"}),
    "PolicyService.Apply": frozenset({"administer"}),
    "PolicyService.Explain": ANY,
    "DebugService.GetLedger": frozenset({"administer"}),
    # Of the HTTP door alone: load, watched features, how calls ended.
    "Live.Watch": frozenset({"observe", "operate", "administer"}),
    "ServerReflection.ServerReflectionInfo": frozenset({"observe"}),
}


def require_method(caller: Caller, method: str) -> None:
    """Raise CredentialError ROLE_MISSING unless one of the caller's roles allows `method` (`Service.Method`)."""
    allowed = METHODS.get(method, frozenset())
    if not caller.roles & allowed:
        needed = f"the role {' or '.join(sorted(allowed))}" if allowed else "a role that nobody has"
        raise CredentialError(f"{method} needs {needed}", "ROLE_MISSING")


def require_role(caller: Caller, role: str, field: str) -> None:
    """Raise CredentialError ROLE_MISSING, naming `field`, unless the caller has the role."""
    if role not in caller.roles:
        raise CredentialError(f"{field}: needs the role {role}", "ROLE_MISSING")
