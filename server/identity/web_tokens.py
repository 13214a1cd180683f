"""JSON web tokens (RFC 7519) of an identity provider, verified with the keys of a JWKS file (RFC 7517)."""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jwt

from rudder.server.caller import ROLES, Caller
from rudder.server.identity.errors import CredentialError
from rudder.server.identity.tokens import WEB_CALLER, WEB_TENANT

MAX_TOKEN_BYTES = 8192
LEEWAY_S = 30
# A verified token is not verified again for this time: a signature costs more than a call's other checks together.
CACHE_S, MAX_CACHED = 60.0, 4096
REQUIRED_CLAIMS = ["exp", "iss", "aud", "sub"]
# Never an algorithm with a shared secret: a public key would pass for the secret.
ALGORITHMS = ("RS256", "ES256", "EdDSA")

Keys = Mapping[str, jwt.PyJWK]


@dataclass(frozen=True)
class Provider:
    """Whose tokens are accepted. `roles_claim`, `tenant_claim`: claims with the caller's roles and tenant."""

    issuer: str
    audience: str
    algorithms: tuple[str, ...]
    roles_claim: str
    tenant_claim: str


@dataclass
class WebTokens:
    """Verifies tokens of a provider; `verified`: by SHA-256 of the token, until when which caller."""

    provider: Provider
    verified: dict[bytes, tuple[float, Keys, Caller]] = field(default_factory=dict)

    def caller(self, token: str, keys: Keys) -> Caller:
        """Return the caller of a token, or raise CredentialError. What was verified with other keys does not count."""
        digest, now = hashlib.sha256(token.encode()).digest(), time.time()
        cached = self.verified.get(digest)
        if cached and now < cached[0] and cached[1] is keys:
            return cached[2]
        claims = verified_claims(token, keys, self.provider)
        caller = caller_of(claims, self.provider)
        if len(self.verified) >= MAX_CACHED:
            self.verified.clear()
        self.verified[digest] = (min(now + CACHE_S, claims["exp"]), keys, caller)
        return caller


def parse_keys(content: bytes) -> Keys:
    """Parse a JWKS file into keys by `kid`. Raises ValueError."""
    try:
        keys = jwt.PyJWKSet.from_dict(json.loads(content)).keys
    except (jwt.PyJWTError, AttributeError, TypeError) as error:
        raise ValueError(f"is no JWKS: {error}") from error
    unnamed = [key for key in keys if not key.key_id]
    if unnamed:
        raise ValueError("keys: one has no kid")
    secret = [key.key_id for key in keys if key.key_type == "oct"]
    if secret:
        raise ValueError(f"keys: {secret[0]} is a shared secret: only public keys can be given to a server")
    return {str(key.key_id): key for key in keys}


def verified_claims(token: str, keys: Keys, provider: Provider) -> dict[str, Any]:
    """Return the claims of a token. Raises CredentialError."""
    if len(token) > MAX_TOKEN_BYTES:
        raise CredentialError(f"the token has more than {MAX_TOKEN_BYTES} bytes")
    try:
        header = jwt.get_unverified_header(token)
        key = keys.get(str(header.get("kid")))
        if key is None or "crit" in header or header.get("alg") not in provider.algorithms:
            raise CredentialError("the token was not signed as this server requires")
        claims: dict[str, Any] = jwt.decode(
            token, key, algorithms=[header["alg"]], audience=provider.audience, issuer=provider.issuer,
            leeway=LEEWAY_S, options={"require": REQUIRED_CLAIMS},
        )  # fmt: skip
    except jwt.ExpiredSignatureError as error:
        raise CredentialError("the token has expired", "TOKEN_EXPIRED") from error
    except (jwt.PyJWTError, ValueError, RecursionError) as error:
        # Its text may quote the token.
        raise CredentialError(f"the token is not valid: {type(error).__name__}") from error
    return claims


def caller_of(claims: Mapping[str, Any], provider: Provider) -> Caller:
    """Return the caller of verified claims. Roles that Rudder does not know belong to other services.

    A subject without a tenant is alone, also if a tenant has its name.
    """
    roles = claims.get(provider.roles_claim, ())
    roles = roles.split() if isinstance(roles, str) else roles
    known = frozenset(role for role in roles if role in ROLES) if isinstance(roles, list | tuple) else frozenset()
    tenant = claims.get(provider.tenant_claim)
    caller = f"{WEB_CALLER}{claims['sub']}"
    return Caller(caller, f"{WEB_TENANT}{tenant}" if isinstance(tenant, str) and tenant else caller, known)
