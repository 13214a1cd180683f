"""Tokens: what is stored, who a token stands for, and what is no token."""

from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from rudder.server.caller import Quotas
from rudder.server.identity import tokens
from rudder.server.identity.errors import CredentialError
from rudder.server.identity.tokens import TokenEntry, TokenFile


def entry(fields: str) -> str:
    return f"tokens: [{{id: {'a' * 16}, sha256: {'b' * 64}, {fields}}}]"


def file_of(*entries: TokenEntry) -> tokens.Tokens:
    return tokens.parse(tokens.write(TokenFile(entries)))


def test_token_stands_for_its_caller_and_its_secret_is_not_stored() -> None:
    token, entry = tokens.create("dashboard", ["observe", "generate"], "acme", quotas=Quotas(streams=3))
    caller = file_of(entry).caller(token)
    assert (caller.id, caller.tenant, caller.roles) == ("dashboard", "acme", frozenset({"observe", "generate"}))
    assert caller.quotas == Quotas(streams=3)
    assert token.rpartition(".")[2].encode() not in tokens.write(TokenFile((entry,)))


def test_without_a_tenant_a_caller_is_alone() -> None:
    token, entry = tokens.create("a", ["generate"])
    assert file_of(entry).caller(token).tenant == "caller a"


@pytest.mark.parametrize(
    "change",
    [
        lambda token: token[:0],
        lambda token: token[:-1],
        lambda token: token + "A",
        lambda token: token[:-4] + ("AAAA" if token[-4:] != "AAAA" else "BBBB"),
        lambda token: token.replace(token[7:23], "0" * 16),
        lambda token: token.upper(),
        lambda token: f"{token}\n",
        lambda token: token[:6] + "..",
    ],
)
def test_anything_else_is_no_token(change: "object") -> None:
    token, entry = tokens.create("a", ["generate"])
    with pytest.raises(CredentialError) as caught:
        file_of(entry).caller(change(token))  # type: ignore[operator]
    assert caught.value.reason == "UNAUTHENTICATED"


def test_expired_token_says_so_only_to_who_has_the_secret() -> None:
    token, entry = tokens.create("a", ["generate"], expires=datetime.now(UTC) - timedelta(seconds=1))
    with pytest.raises(CredentialError) as caught:
        file_of(entry).caller(token)
    assert caught.value.reason == "TOKEN_EXPIRED"
    with pytest.raises(CredentialError) as caught:
        file_of(entry).caller(token[:-4] + "----")
    assert caught.value.reason == "UNAUTHENTICATED"


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ("tokens: [{id: 1}]", "id"),
        ("tokens: 3", "tokens"),
        ("[", "while parsing"),
        (entry("caller: a, roles: [root]"), r"tokens\[0\].roles"),
        (entry("caller: anonymous, roles: []"), r"tokens\[0\]"),
        (entry("caller: a, tenant: anonymous, roles: []"), r"tokens\[0\]"),
        (entry("caller: 'jwt:alice', roles: []"), r"tokens\[0\]"),
        (entry("caller: a, tenant: 'jwt-tenant:acme', roles: []"), r"tokens\[0\]"),
        (entry("caller: a, role: []"), "role"),
    ],
)
def test_file_that_is_wrong_names_the_field(content: str, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        tokens.parse(content.encode())


def test_id_that_is_there_twice_is_refused() -> None:
    _, entry = tokens.create("a", ["generate"])
    with pytest.raises(ValueError, match="twice"):
        file_of(entry, entry)


@pytest.mark.parametrize(("caller", "roles"), [("a", ["root"]), ("", ["generate"]), ("a b", []), ("anonymous", [])])
def test_token_that_cannot_be_meant_is_not_created(caller: str, roles: list[str]) -> None:
    with pytest.raises(ValueError, match=r"."):
        tokens.create(caller, roles)


def test_a_caller_without_a_tenant_shares_no_cache_with_a_tenant_of_its_name() -> None:
    lone, member = tokens.create("acme", ["generate"]), tokens.create("other", ["generate"], tenant="acme")
    callers = [file_of(entry).caller(token) for token, entry in (lone, member)]
    assert callers[0].tenant != callers[1].tenant
    # No file can name what stands for being alone.
    with pytest.raises(msgspec.ValidationError):
        tokens.create("mallory", ["generate"], tenant=callers[0].tenant)
