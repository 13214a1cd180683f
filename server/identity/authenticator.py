"""From the credentials of a call to its caller, whatever the door."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from rudder.server.caller import ANONYMOUS, NO_QUOTAS, Caller, Quotas
from rudder.server.config import ConfigError, Identity, RoleQuotas
from rudder.server.identity import certificates, tokens, web_tokens
from rudder.server.identity.certificates import Certificates
from rudder.server.identity.errors import CredentialError
from rudder.server.identity.tokens import Tokens
from rudder.server.identity.watched_file import WatchedFile
from rudder.server.identity.web_tokens import Keys, Provider, WebTokens

SCHEME = "bearer "
T = TypeVar("T")


@dataclass(frozen=True)
class Credentials:
    """What a door found with a call.

    `authorization`: values of that header. `certificate_names`: of the client's verified certificate, best first.
    `origin`: the connection.
    """

    authorization: tuple[str, ...] = ()
    certificate_names: tuple[str, ...] = ()
    origin: str = ""


@dataclass(frozen=True)
class Authenticator:
    """The sources of callers. A token decides where a call has both a token and a certificate."""

    tokens: WatchedFile[Tokens] | None = None
    keys: WatchedFile[Keys] | None = None
    web_tokens: WebTokens | None = None
    certificates: WatchedFile[Certificates] | None = None
    quotas: tuple[RoleQuotas, ...] = ()

    @property
    def required(self) -> bool:
        """Whether calls need credentials."""
        return bool(self.tokens or self.keys or self.certificates)

    def caller(self, credentials: Credentials) -> Caller:
        """Return the caller, with the quotas of the configuration where its credentials name none.

        Raises CredentialError.
        """
        caller = self.authenticated(credentials)
        return caller if caller.quotas != NO_QUOTAS else replace(caller, quotas=self.quotas_of(caller))

    def quotas_of(self, caller: Caller) -> Quotas:
        """Return the quotas of the first entry of the configuration that fits a caller."""
        fitting = (entry.quotas for entry in self.quotas if entry.role is None or entry.role in caller.roles)
        return next(fitting, NO_QUOTAS)

    def authenticated(self, credentials: Credentials) -> Caller:
        """Return the caller of these credentials. Raises CredentialError."""
        if not self.required:
            return replace(ANONYMOUS, origin=credentials.origin)
        if credentials.authorization:
            return self.bearer(credentials.authorization)
        if credentials.certificate_names and self.certificates:
            return certificates.caller(credentials.certificate_names, self.certificates.current())
        raise CredentialError("the call has no credentials")

    def bearer(self, authorization: tuple[str, ...]) -> Caller:
        """Return the caller of a token."""
        if len(authorization) > 1:
            raise CredentialError("the call has several authorization headers")
        scheme, token = authorization[0][: len(SCHEME)], authorization[0][len(SCHEME) :].strip()
        if scheme.lower() != SCHEME:
            raise CredentialError("the authorization header is no bearer token")
        if token.startswith(tokens.PREFIX) and self.tokens:
            return self.tokens.current().caller(token)
        if self.web_tokens and self.keys:
            return self.web_tokens.caller(token, self.keys.current())
        raise CredentialError("the token is not one of this server's")


def authenticator_of(config: Identity, failed: Callable[[str], None]) -> Authenticator:
    """Read the configured sources. `failed`: called with the field of a file that changed and is not accepted.

    Raises ConfigError.
    """
    web = None
    for name in ("issuer", "audience"):
        if config.jwks and not getattr(config, name):
            raise ConfigError(f"identity.{name}", "is empty: with identity.jwks it must name whose tokens count")
        if getattr(config, name) and not config.jwks:
            raise ConfigError(f"identity.{name}", "belongs to identity.jwks, which names no file")
    if config.jwks:
        provider = Provider(config.issuer, config.audience, config.algorithms, config.roles_claim, config.tenant_claim)
        web = WebTokens(provider)
    return Authenticator(
        watched("identity.tokens", config.tokens, tokens.parse, failed),
        watched("identity.jwks", config.jwks, web_tokens.parse_keys, failed),
        web,
        watched("identity.certificates", config.certificates, certificates.parse, failed),
        config.quotas,
    )


def watched(
    field: str, path: str | None, parse: Callable[[bytes], T], failed: Callable[[str], None]
) -> WatchedFile[T] | None:
    """Begin to watch a configured file; None without one. Raises ConfigError, which names the field."""
    if path is None:
        return None
    try:
        # A device or a pipe would never end.
        if not Path(path).is_file():
            raise ConfigError(field, f"{path!r} is not a file")
        return WatchedFile(field, (Path(path),), parse, failed)
    except (OSError, ValueError) as error:
        raise ConfigError(field, f"{path}: {error}") from error
