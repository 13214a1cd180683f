"""TLS of the gRPC door, and the credentials that a call brings."""

from collections.abc import Iterable, Mapping
from typing import Any

import grpc

from rudder.server.config import Tls
from rudder.server.grpc.status import Context
from rudder.server.identity.authenticator import Credentials
from rudder.server.identity.certificates import ranked_names
from rudder.server.identity.watched_file import watched_pair
from rudder.server.monitoring.metrics import Metrics

AUTHORIZATION = "authorization"
# Names of a peer in `auth_context`, by their kind.
URIS, DNS_NAMES, COMMON_NAME = "peer_uri", "peer_dns", "x509_common_name"


def credentials_of(context: Context) -> Credentials:
    """Return what the call and its connection say of who calls."""
    metadata: Any = context.invocation_metadata() or ()
    authorization = tuple(str(value) for key, value in metadata if key == AUTHORIZATION)
    return Credentials(authorization, certificate_names(context), context.peer())


def certificate_names(context: Context) -> tuple[str, ...]:
    """Return the names in the client's certificate, which TLS has verified, best first."""
    peer: Mapping[str, Iterable[bytes]] = context.auth_context()
    uris, dns, common = (
        [name.decode(errors="replace") for name in peer.get(kind, ())] for kind in (URIS, DNS_NAMES, COMMON_NAME)
    )
    return ranked_names(uris, dns, common)


def server_credentials(tls: Tls, metrics: Metrics) -> grpc.ServerCredentials | None:
    """Return the door's TLS, which reads changed files at the next handshake; None without TLS. Raises ConfigError."""

    def parse(certificate: bytes, key: bytes, client_ca: bytes | None = None) -> Any:
        configuration = certificate_configuration(certificate, key, client_ca)
        metrics.certificate_expires(expiry_of(certificate))
        return configuration

    pair = watched_pair(tls, parse, metrics.reload_failed)
    if pair is None:
        return None
    served = pair.content

    def changed() -> Any:
        nonlocal served
        current = pair.current()
        if current is served:
            return None
        served = current
        return current

    return grpc.dynamic_ssl_server_credentials(pair.content, changed, require_client_authentication=bool(tls.client_ca))


def expiry_of(certificate: bytes) -> float:
    """Return when the first certificate of a PEM file expires, in Unix time."""
    from cryptography.x509 import load_pem_x509_certificates

    return load_pem_x509_certificates(certificate)[0].not_valid_after_utc.timestamp()


def certificate_configuration(certificate: bytes, key: bytes, client_ca: bytes | None = None) -> Any:
    """Return gRPC's form of a key pair. ValueError: the files do not belong together, as while one is replaced."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
    from cryptography.x509 import load_pem_x509_certificates

    try:
        leaf = load_pem_x509_certificates(certificate)[0]
        private = load_pem_private_key(key, None)
        if client_ca is not None:
            load_pem_x509_certificates(client_ca)
    except (TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(f"tls.key: {error}") from error
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    if leaf.public_key().public_bytes(*form) != private.public_key().public_bytes(*form):
        raise ValueError("tls.key is not that of tls.certificate")
    return grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca)
