"""Callers by client certificate: what the file may say, and which names of a certificate count."""

from types import SimpleNamespace
from typing import Any

import pytest

from rudder.server.grpc.credentials import certificate_names
from rudder.server.identity import certificates

APP = "spiffe://acme/app"


@pytest.mark.parametrize(
    ("entries", "field"),
    [
        ("{name: x, caller: a, roles: [root]}", r"certificates\[0\].roles"),
        ("{name: '', caller: a, roles: []}", "name"),
        ("{name: x, caller: anonymous, roles: []}", r"certificates\[0\]"),
        ("{name: x, caller: a, tenant: anonymous, roles: []}", r"certificates\[0\]"),
        ("{name: x, caller: 'jwt:alice', roles: []}", r"certificates\[0\]"),
        (
            "{name: x, caller: a, roles: []}, {name: x, caller: b, roles: []}",
            r"certificates\[1\].name: 'x' is there twice",
        ),
    ],
)
def test_file_that_is_wrong_names_the_field(entries: str, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        certificates.parse(f"certificates: [{entries}]".encode())


def names(**peer: list[str]) -> tuple[str, ...]:
    context: Any = SimpleNamespace(auth_context=lambda: {k: [n.encode() for n in peer[k]] for k in peer})
    return certificate_names(context)


def test_spiffe_uris_count_before_dns_names() -> None:
    assert names(peer_dns=["app.acme"], peer_uri=["https://acme/app", APP], x509_common_name=["app"]) == (
        APP,
        "app.acme",
    )


def test_common_name_counts_where_there_is_no_other() -> None:
    assert names(x509_common_name=["app"]) == ("app",)
    assert names(x509_common_name=["app"], peer_uri=["https://acme/app"]) == ()
    assert names(x509_common_name=["app"], peer_dns=["other"]) == ("other",)


@pytest.mark.parametrize("kind", ["x509_common_name", "peer_dns", "peer_email", "x509_subject_alternative_name"])
def test_no_other_kind_of_name_passes_for_a_spiffe_uri(kind: str) -> None:
    assert names(**{kind: [APP]}) == ()
