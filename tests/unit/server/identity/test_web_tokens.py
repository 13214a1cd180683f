"""JSON web tokens: what is accepted, and each known way around the signature."""

import base64
import hmac
import json
import time
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from rudder.server.identity import web_tokens
from rudder.server.identity.errors import CredentialError
from rudder.server.identity.web_tokens import ALGORITHMS, Provider, WebTokens

PROVIDER = Provider("https://issuer.example", "rudder", ALGORITHMS, "roles", "tenant")
KEY = ec.generate_private_key(ec.SECP256R1())
OTHER = ec.generate_private_key(ec.SECP256R1())
PUBLIC_PEM = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
Change = Callable[[], str]


def jwks(*keys: tuple[str, Any, str]) -> web_tokens.Keys:
    described = [
        json.loads(jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key())) | {"kid": kid, "alg": algorithm}
        for kid, key, algorithm in keys
    ]
    return web_tokens.parse_keys(json.dumps({"keys": described}).encode())


KEYS = jwks(("k1", KEY, "ES256"))


def signed(key: Any = KEY, algorithm: str = "ES256", headers: dict[str, Any] | None = None, **changed: Any) -> str:
    now = int(time.time())
    claims = {
        "iss": PROVIDER.issuer, "aud": "rudder", "sub": "alice", "exp": now + 300, "roles": ["generate", "billing"],
    } | changed  # fmt: skip
    claims = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(claims, key, algorithm, headers={"kid": "k1"} | (headers or {}))


def forged(header: dict[str, Any]) -> str:
    parts = [json.dumps(header).encode(), jwt.utils.base64url_decode(signed().split(".")[1])]
    return ".".join([*(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts), ""])


def hmac_with_public_key() -> str:
    header, claims = {"alg": "HS256", "kid": "k1", "typ": "JWT"}, jwt.utils.base64url_decode(signed().split(".")[1])
    parts = json.dumps(header).encode(), claims
    message = ".".join(jwt.utils.base64url_encode(part).decode() for part in parts)
    signature = hmac.digest(PUBLIC_PEM, message.encode(), "sha256")
    return f"{message}.{jwt.utils.base64url_encode(signature).decode()}"


def without_kid() -> str:
    return jwt.encode({"sub": "alice"}, KEY, "ES256")


def test_right_token_is_the_caller_with_the_roles_that_are_known() -> None:
    caller = WebTokens(PROVIDER).caller(signed(tenant="acme"), KEYS)
    assert (caller.id, caller.tenant, caller.roles) == ("jwt:alice", "jwt-tenant:acme", frozenset({"generate"}))
    assert WebTokens(PROVIDER).caller(signed(roles="steer observe"), KEYS).roles == {"steer", "observe"}
    assert WebTokens(PROVIDER).caller(signed(roles=None), KEYS).roles == frozenset()


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (rsa.generate_private_key(65537, 2048), "RS256"),
        (ed25519.Ed25519PrivateKey.generate(), "EdDSA"),
    ],
    ids=["RS256", "EdDSA"],
)
def test_each_algorithm(key: Any, algorithm: str) -> None:
    keys = jwks(("k1", key, algorithm))
    assert WebTokens(PROVIDER).caller(signed(key, algorithm), keys).id == "jwt:alice"
    only = Provider(PROVIDER.issuer, "rudder", ("ES256",), "roles", "tenant")
    with pytest.raises(CredentialError):
        WebTokens(only).caller(signed(key, algorithm), keys)


WRONG: dict[str, Change] = {
    "malformed": lambda: "a.b.c",
    "empty": lambda: "",
    "wrong key": lambda: signed(OTHER),
    "unknown kid": lambda: signed(headers={"kid": "k2"}),
    "no kid": without_kid,
    "wrong audience": lambda: signed(aud="another"),
    "wrong issuer": lambda: signed(iss="https://elsewhere.example"),
    "not yet valid": lambda: signed(nbf=int(time.time()) + 300),
    "without expiry": lambda: signed(exp=None),
    "without subject": lambda: signed(sub=None),
    "without audience": lambda: signed(aud=None),
    "alg none": lambda: forged({"alg": "none", "kid": "k1"}),
    "alg None": lambda: forged({"alg": "None", "kid": "k1"}),
    "HS256 with the public key": hmac_with_public_key,
    "unknown crit": lambda: signed(headers={"crit": ["b64"]}),
    "16 KiB": lambda: signed(padding="x" * 16384),
    "signature cut": lambda: signed()[:-8],
}


@pytest.mark.parametrize("token", WRONG.values(), ids=WRONG)
def test_wrong_token_is_refused_without_being_quoted(token: Change) -> None:
    text = token()
    with pytest.raises(CredentialError) as caught:
        WebTokens(PROVIDER).caller(text, KEYS)
    assert caught.value.reason == "UNAUTHENTICATED"
    assert not text or text not in str(caught.value)


def test_expired_token_says_so_beyond_the_leeway() -> None:
    assert WebTokens(PROVIDER).caller(signed(exp=int(time.time()) - 5), KEYS).id == "jwt:alice"
    with pytest.raises(CredentialError) as caught:
        WebTokens(PROVIDER).caller(signed(exp=int(time.time()) - 300), KEYS)
    assert caught.value.reason == "TOKEN_EXPIRED"


def test_verified_token_is_verified_again_with_other_keys() -> None:
    verifier, token = WebTokens(PROVIDER), signed()
    assert verifier.caller(token, KEYS) == verifier.caller(token, KEYS)
    with pytest.raises(CredentialError):
        verifier.caller(token, jwks(("k1", OTHER, "ES256")))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "."),
        (b"[]", "no JWKS"),
        (b'{"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "k1"}]}', "shared secret"),
    ],
)
def test_file_of_keys_that_is_wrong(content: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        web_tokens.parse_keys(content)


def test_subject_is_not_among_the_callers_of_a_tenant_of_its_name() -> None:
    alone, member = (WebTokens(PROVIDER).caller(token, KEYS) for token in (signed(sub="acme"), signed(tenant="acme")))
    assert alone.tenant != member.tenant


def test_header_that_is_nested_too_deeply_is_no_token() -> None:
    header = base64.urlsafe_b64encode(b"[" * 6000).decode()
    with pytest.raises(CredentialError) as caught:
        WebTokens(PROVIDER).caller(f"{header}.e30.e30", KEYS)
    assert caught.value.reason == "UNAUTHENTICATED"
