"""Callers by their client certificate: a file that maps the names in certificates to callers."""

from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from rudder.server.caller import NO_QUOTAS, Caller, Quotas, alone
from rudder.server.identity.errors import CredentialError
from rudder.server.identity.tokens import Name, check_names, check_roles, converted

SPIFFE = "spiffe://"


class CertificateEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a certificate stands for. `name`: its SPIFFE URI, else a DNS name, else the common name."""

    name: Annotated[str, Meta(min_length=1)]
    caller: Name
    roles: tuple[str, ...]
    tenant: Name | None = None
    quotas: Quotas = NO_QUOTAS


class CertificateFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file of callers by certificate."""

    certificates: tuple[CertificateEntry, ...] = ()


Certificates = Mapping[str, CertificateEntry]


def parse(content: bytes) -> Certificates:
    """Parse a file of callers by certificate. ValueError: it is not one."""
    file = converted(content, CertificateFile)
    names = [entry.name for entry in file.certificates]
    for number, entry in enumerate(file.certificates):
        field = f"certificates[{number}]"
        if names.index(entry.name) != number:
            raise ValueError(f"{field}.name: {entry.name!r} is there twice")
        check_roles(entry.roles, f"{field}.roles")
        check_names(entry.caller, entry.tenant, field)
    return {entry.name: entry for entry in file.certificates}


def ranked_names(uris: Sequence[str], dns: Sequence[str], common: Sequence[str]) -> tuple[str, ...]:
    """Return the names of a certificate, best first: SPIFFE URIs, then DNS names.

    The common name, which is free text, counts only where there is neither (RFC 9525), and no other kind of name passes
    for a SPIFFE URI: each kind is vouched for by rules of its own.
    """
    others = dns or ([] if uris else common)
    return (
        *(name for name in uris if name.startswith(SPIFFE)),
        *(name for name in others if not name.startswith(SPIFFE)),
    )


def caller(names: Sequence[str], certificates: Certificates) -> Caller:
    """Return the caller of a verified certificate with these names, best first. Raises CredentialError: nobody's."""
    entry = next((certificates[name] for name in names if name in certificates), None)
    if entry is None:
        raise CredentialError("the client certificate is mapped to no caller")
    return Caller(entry.caller, entry.tenant or alone(entry.caller), frozenset(entry.roles), entry.quotas)
