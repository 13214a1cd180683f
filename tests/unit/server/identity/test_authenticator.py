"""Quotas of the configuration are those of callers whose credentials name none."""

from pathlib import Path

import pytest

from rudder.server.caller import NO_QUOTAS, Quotas
from rudder.server.config import Identity, RoleQuotas
from rudder.server.identity import tokens
from rudder.server.identity.authenticator import Credentials, authenticator_of
from rudder.server.identity.tokens import TokenFile

STEERERS, EVERYBODY, OWN = Quotas(rows=8), Quotas(requests=60), Quotas(requests=1)
CONFIGURED = (
    RoleQuotas(role="administer"),
    RoleQuotas(role="steer", quotas=STEERERS),
    RoleQuotas(quotas=EVERYBODY),
)


@pytest.mark.parametrize(
    ("roles", "quotas", "expected"),
    [
        (["administer", "steer"], NO_QUOTAS, NO_QUOTAS),
        (["generate", "steer"], NO_QUOTAS, STEERERS),
        (["generate"], NO_QUOTAS, EVERYBODY),
        (["generate"], OWN, OWN),
        (["administer"], OWN, OWN),
    ],
)
def test_first_entry_that_fits_counts_unless_the_token_names_quotas(
    roles: list[str], quotas: Quotas, expected: Quotas, tmp_path: Path
) -> None:
    token, entry = tokens.create("a", roles, quotas=quotas)
    (tmp_path / "tokens.yaml").write_bytes(tokens.write(TokenFile((entry,))))
    identity = Identity(tokens=str(tmp_path / "tokens.yaml"), quotas=CONFIGURED)
    caller = authenticator_of(identity, lambda _: None).caller(Credentials((f"Bearer {token}",)))
    assert caller.quotas == expected


def test_without_credentials_all_callers_together_have_those_for_everybody() -> None:
    found = authenticator_of(Identity(quotas=CONFIGURED[2:]), lambda _: None).caller(Credentials(origin="ipv4:1"))
    assert (found.quotas, found.origin) == (EVERYBODY, "ipv4:1")
