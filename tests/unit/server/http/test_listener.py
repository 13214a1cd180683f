"""TLS of the HTTP door: certificates of the server and of clients, and what changes while it runs."""

import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from rudder.server import config, preflight
from rudder.server.config import ConfigError, Tls
from rudder.server.http.listener import certificate_names, server_context
from rudder.server.identity import watched_file
from rudder.server.process import require_free
from tests.unit.server.grpc.test_identity import Authority
from tests.unit.server.http.rig import Rig

CERTIFICATES = """
certificates:
- {name: "spiffe://example.org/app", caller: app, roles: [generate]}
- {name: "other", caller: other, roles: [observe]}
"""


@pytest.fixture
def authority() -> Authority:
    return Authority.create()


def write_pair(folder: Path, authority: Authority) -> dict[str, str]:
    """Write certificate and key of the server; return the fields that name them."""
    certificate, key = authority.issue("localhost")
    (folder / "certificate.pem").write_bytes(certificate)
    (folder / "key.pem").write_bytes(key)
    (folder / "ca.pem").write_bytes(authority.pem)
    return {"tls.certificate": str(folder / "certificate.pem"), "tls.key": str(folder / "key.pem")}


def client(authority: Authority, rig: Rig, folder: Path, *, spiffe: str | None = None) -> httpx.AsyncClient:
    """Return a client that trusts the authority, with a certificate of its own if it is to have a name."""
    context = ssl.create_default_context(cadata=authority.pem.decode())
    if spiffe is not None:
        certificate, key = authority.issue("other", spiffe)
        (folder / "client.pem").write_bytes(certificate + key)
        context.load_cert_chain(folder / "client.pem")
    return httpx.AsyncClient(base_url=rig.address.replace("127.0.0.1", "localhost"), verify=context)


async def test_a_door_with_tls_serves_over_it_alone(tmp_path: Path, authority: Authority) -> None:
    async with Rig(write_pair(tmp_path, authority)) as rig:
        assert rig.address.startswith("https://")
        async with client(authority, rig, tmp_path) as connected:
            assert (await connected.get("/v1/models")).status_code == 200
        with pytest.raises(httpx.HTTPError):
            await httpx.AsyncClient(base_url=rig.address.replace("https", "http")).get("/v1/models")


async def test_a_certificate_that_changes_is_served_to_the_next_connection(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched_file, "CHECK_S", 0.0)
    async with Rig(write_pair(tmp_path, authority)) as rig:
        another = Authority.create()
        write_pair(tmp_path, another)
        async with client(another, rig, tmp_path) as connected:
            assert (await connected.get("/health")).status_code == 503
        # A key of another pair changes nothing, and is counted.
        (tmp_path / "key.pem").write_bytes(Authority.create().issue("localhost")[1])
        async with client(another, rig, tmp_path) as connected:
            assert (await connected.get("/health")).status_code == 503
        assert rig.registry.get_sample_value("rudder_reload_failures_total", {"what": "tls.certificate"}) == 1


async def test_callers_are_known_by_their_certificates(tmp_path: Path, authority: Authority) -> None:
    (tmp_path / "callers.yaml").write_text(CERTIFICATES)
    fields = write_pair(tmp_path, authority) | {
        "tls.client_ca": str(tmp_path / "ca.pem"), "identity.certificates": str(tmp_path / "callers.yaml"),
    }  # fmt: skip
    async with Rig(fields) as rig:
        request = {"model": "m", "prompt": [5], "max_tokens": 1}
        async with client(authority, rig, tmp_path, spiffe="spiffe://example.org/app") as app:
            assert (await app.post("/v1/completions", json=request)).status_code == 200
        # Its common name is `other`, and it has a DNS name, which no file maps: the common name does not count.
        async with client(authority, rig, tmp_path, spiffe="") as unmapped:
            response = await unmapped.post("/v1/completions", json=request)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "UNAUTHENTICATED")
        with pytest.raises(httpx.HTTPError):
            async with client(authority, rig, tmp_path) as unknown:
                await unknown.get("/health")


class Peer:
    """A connection whose certificate is as Python's ssl shows it."""

    def __init__(self, certificate: dict[str, Any] | None) -> None:
        self.certificate = certificate

    def get_extra_info(self, _: str) -> Any:
        return self.certificate


def test_names_of_a_certificate() -> None:
    subject = ((("commonName", "common"),),)
    uri, dns = ("URI", "spiffe://a/b"), ("DNS", "host")
    for certificate, names in (
        ({"subject": subject, "subjectAltName": (dns, uri)}, ("spiffe://a/b", "host")),
        ({"subject": subject}, ("common",)),
        ({"subject": ((("commonName", "spiffe://a/b"),),)}, ()),
        ({"subject": subject, "subjectAltName": (("URI", "https://a"),)}, ()),
        (None, ()),
    ):
        assert certificate_names(Peer(certificate)) == names  # type: ignore[arg-type]


def test_a_pair_that_does_not_match_is_refused(tmp_path: Path, authority: Authority) -> None:
    write_pair(tmp_path, authority)
    (tmp_path / "key.pem").write_bytes(Authority.create().issue("localhost")[1])
    tls = Tls(certificate=str(tmp_path / "certificate.pem"), key=str(tmp_path / "key.pem"))
    with pytest.raises(ConfigError, match=r"tls\.certificate"):
        server_context(tls, CollectorRegistry)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"tls\.key"):
        server_context(Tls(certificate="x"), CollectorRegistry)  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["listen.port", "listen.metrics_port"])
def test_a_port_of_another_is_refused_before_the_start(field: str) -> None:
    ports = {"listen.port": "0", "listen.metrics_port": "0", field: "9", "listen.http_port": "9"}
    with pytest.raises(ConfigError, match=rf"listen\.http_port: 9 is {field} too"):
        require_free(config.load(overrides=ports).listen)


def test_an_open_door_needs_tls_and_credentials() -> None:
    """The check is the address's, which both doors share."""
    opened = config.load(overrides={"listen.host": "0.0.0.0", "listen.http_port": "0"})
    with pytest.raises(ConfigError, match=r"tls\.certificate"):
        preflight.check_door(opened)
