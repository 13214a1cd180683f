"""Bearer tokens `rudder.ID.SECRET`, stored as SHA-256: a file of them, and the caller that a token stands for."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import msgspec
import yaml
from msgspec import Meta

from rudder.server.caller import ANONYMOUS, NO_QUOTAS, ROLES, Caller, Quotas, alone
from rudder.server.identity.errors import CredentialError

T = TypeVar("T")
PREFIX = "rudder."
TOKEN = re.compile(r"rudder\.([0-9a-f]{16})\.([A-Za-z0-9_-]{43})", re.ASCII)
SECRET_BYTES = 32
# What the callers and tenants of JSON web tokens begin with: no file names one of them.
WEB_CALLER, WEB_TENANT = "jwt:", "jwt-tenant:"
Name = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[!-~]+$")]


class TokenEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A token of the file. `tenant`: that of the caller's prefix cache; by default the caller alone."""

    id: Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    caller: Name
    roles: tuple[str, ...]
    tenant: Name | None = None
    expires: datetime | None = None
    quotas: Quotas = NO_QUOTAS


class TokenFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file of tokens."""

    tokens: tuple[TokenEntry, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """The tokens of a file, by id."""

    entries: Mapping[str, TokenEntry]

    def caller(self, token: str) -> Caller:
        """Return the caller of a token. Raises CredentialError.

        The secret's hash is compared in constant time, and for an id that nobody has, too.
        """
        match = TOKEN.fullmatch(token)
        entry = self.entries.get(match[1]) if match else None
        stored = entry.sha256 if entry else digest("")
        right = hmac.compare_digest(digest(match[2] if match else ""), stored)
        if not (match and entry and right):
            raise CredentialError("the token is not one of this server's")
        if entry.expires and entry.expires <= datetime.now(UTC):
            raise CredentialError("the token has expired", "TOKEN_EXPIRED")
        return Caller(entry.caller, entry.tenant or alone(entry.caller), frozenset(entry.roles), entry.quotas)


def parse(content: bytes) -> Tokens:
    """Parse a file of tokens. ValueError: it is not one, which names the field at fault."""
    return Tokens({entry.id: entry for entry in read(content).tokens})


def read(content: bytes) -> TokenFile:
    """Parse a file of tokens as it is written."""
    file = converted(content, TokenFile)
    ids = [entry.id for entry in file.tokens]
    repeated = next((id_ for id_ in ids if ids.count(id_) > 1), None)
    if repeated:
        raise ValueError(f"tokens: {repeated} is there twice")
    for number, entry in enumerate(file.tokens):
        check(entry, f"tokens[{number}]")
    return file


def converted(content: bytes, kind: type[T]) -> T:
    """Convert YAML to a struct. ValueError: it is not one, which names the field at fault."""
    try:
        return msgspec.convert(yaml.safe_load(content) or {}, kind)
    except (yaml.YAMLError, msgspec.ValidationError) as error:
        raise ValueError(str(error)) from error


def check(entry: TokenEntry, field: str) -> None:
    """Raise ValueError where an entry cannot be meant so."""
    check_roles(entry.roles, f"{field}.roles")
    check_names(entry.caller, entry.tenant, field)
    if entry.expires and entry.expires.tzinfo is None:
        raise ValueError(f"{field}.expires: has no time zone")


def check_roles(roles: Iterable[str], field: str) -> None:
    """Raise ValueError if one is no role."""
    unknown = [role for role in roles if role not in ROLES]
    if unknown:
        raise ValueError(f"{field}: {unknown[0]!r} is not one of {', '.join(sorted(ROLES))}")


def check_names(caller: str, tenant: str | None, field: str) -> None:
    """Raise ValueError if caller or tenant has a name of those that no file names."""
    for name in (caller, tenant or caller):
        if name == ANONYMOUS.tenant:
            raise ValueError(f"{field}: {name!r} is the name of callers without credentials")
        if name.startswith((WEB_CALLER, WEB_TENANT)):
            raise ValueError(f"{field}: {name!r} is a name of callers with JSON web tokens")


def create(
    caller: str, roles: Iterable[str], tenant: str | None = None, expires: datetime | None = None,
    quotas: Quotas = NO_QUOTAS,
) -> tuple[str, TokenEntry]:  # fmt: skip
    """Return a new token, which is stored nowhere, and its entry. Raises ValueError, msgspec.ValidationError."""
    id_, secret = secrets.token_hex(8), secrets.token_urlsafe(SECRET_BYTES)
    entry = TokenEntry(id_, digest(secret), caller, tuple(sorted(roles)), tenant, expires, quotas)
    entry = msgspec.convert(msgspec.to_builtins(entry), TokenEntry)
    check(entry, "token")
    return f"{PREFIX}{id_}.{secret}", entry


def write(file: TokenFile) -> bytes:
    """Write a file of tokens, which `read` reads back."""
    content: Any = msgspec.to_builtins(file)
    return yaml.safe_dump(content, sort_keys=False).encode()


def digest(secret: str) -> str:
    """Return SHA-256 of a secret. It has 256 random bits, so it needs no salt and no slow hash."""
    return hashlib.sha256(secret.encode()).hexdigest()
