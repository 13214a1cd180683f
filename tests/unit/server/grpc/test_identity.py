"""Who may call what: every method of the contract, with every kind of credentials, through a door with TLS."""

import asyncio
import datetime
import ipaddress
import socket
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from rudder.server.caller import ROLES, Quotas
from rudder.server.grpc.server import SERVICES
from rudder.server.identity import tokens, watched_file
from rudder.server.identity.roles import METHODS
from rudder.server.identity.tokens import TokenFile
from rudder.v1 import catalogue_pb2, debug_pb2, inference_pb2, policy_pb2
from rudder_client import AsyncClient, Client, Program, Report, RudderError
from rudder_client.errors import error_of
from tests.unit.server.grpc.test_server import Fixture, access_fields

FILES = (inference_pb2.DESCRIPTOR, catalogue_pb2.DESCRIPTOR, policy_pb2.DESCRIPTOR, debug_pb2.DESCRIPTOR)
CONTRACT = [method for file in FILES for service in file.services_by_name.values() for method in service.methods]
ALLOWED_NAMES = sorted(ROLES)


def name_of(method: MethodDescriptor) -> str:
    return f"{method.containing_service.name}.{method.name}"


@dataclass
class Authority:
    """A certificate authority and what it signs."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def create(cls) -> "Authority":
        key = ec.generate_private_key(ec.SECP256R1())
        return cls(key, certificate("authority", key, key, "authority", ca=True))

    def issue(self, common_name: str, spiffe: str = "") -> tuple[bytes, bytes]:
        key = ec.generate_private_key(ec.SECP256R1())
        signed = certificate(common_name, key, self.key, "authority", spiffe=spiffe)
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return signed.public_bytes(Encoding.PEM), private

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)


def certificate(
    subject: str, key: ec.EllipticCurvePrivateKey, signer: ec.EllipticCurvePrivateKey, issuer: str, *, ca: bool = False,
    spiffe: str = "",
) -> x509.Certificate:  # fmt: skip
    now = datetime.datetime.now(datetime.UTC)
    names: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    names += [x509.UniformResourceIdentifier(spiffe)] if spiffe else []
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(signer, SHA256())
    )


class SafeDoor:
    """A door with TLS, a file of tokens with one caller per role, and what clients need."""

    def __init__(self, folder: Path, *, mutual: bool = False) -> None:
        self.folder, self.authority = folder, Authority.create()
        self.tokens: dict[str, str] = {}
        entries = []
        for role in ALLOWED_NAMES:
            self.tokens[role], entry = tokens.create(f"caller-{role}", [role])
            entries.append(entry)
        (folder / "tokens.yaml").write_bytes(tokens.write(TokenFile(tuple(entries))))
        self.write_certificate()
        overrides = {
            "identity.tokens": str(folder / "tokens.yaml"),
            "tls.certificate": str(folder / "server.pem"),
            "tls.key": str(folder / "server.key"),
        }
        if mutual:
            (folder / "ca.pem").write_bytes(self.authority.pem)
            (folder / "callers.yaml").write_text(
                "certificates: [{name: 'spiffe://acme/app', caller: app, roles: [generate]}]"
            )
            overrides |= {
                "tls.client_ca": str(folder / "ca.pem"),
                "identity.certificates": str(folder / "callers.yaml"),
            }
        self.fixture = Fixture(**overrides)
        self.address = ""

    def write_certificate(self) -> None:
        chain, key = self.authority.issue("localhost")
        (self.folder / "server.key").write_bytes(key)
        (self.folder / "server.pem").write_bytes(chain)

    async def start(self) -> None:
        port = (await self.fixture.doors[0].start()).rpartition(":")[2]
        self.address = f"localhost:{port}"

    async def stop(self) -> None:
        await self.fixture.doors[0].stop(0)

    async def reason(self, method: MethodDescriptor, authorization: str | None) -> str:
        """Call a method with an empty request and this header; return the reason of its failure, or OK."""
        async with grpc.aio.secure_channel(self.address, self.credentials()) as channel:
            kind = channel.unary_stream if method.server_streaming else channel.unary_unary
            call = kind(f"/{method.containing_service.full_name}/{method.name}", bytes, bytes)
            metadata = () if authorization is None else (("authorization", authorization),)
            return await reason_of(call(b"", metadata=metadata, timeout=10))

    def credentials(self, pair: tuple[bytes, bytes] | None = None) -> grpc.ChannelCredentials:
        chain, key = pair or (None, None)
        return grpc.ssl_channel_credentials(self.authority.pem, key, chain)

    def client(self, token: str = "", pair: tuple[bytes, bytes] | None = None) -> AsyncClient:
        return AsyncClient(self.address, credentials=self.credentials(pair), token=token, timeout=10)


async def reason_of(call: Any) -> str:
    """Return the reason with which a call fails; OK if it does not."""
    try:
        if isinstance(call, grpc.aio.UnaryStreamCall | grpc.aio.StreamStreamCall):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error_of(error).reason
    return "OK"


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[SafeDoor]:
    safe = SafeDoor(tmp_path)
    await safe.start()
    yield safe
    await safe.stop()


def test_every_method_of_the_contract_has_its_roles() -> None:
    beside = {"ServerReflection.ServerReflectionInfo", "Live.Watch"}
    assert {name_of(method) for method in CONTRACT} | beside == METHODS.keys()
    assert all(roles and roles <= ROLES for roles in METHODS.values())


async def test_each_method_with_each_kind_of_credentials(door: SafeDoor) -> None:
    served = [method for method in CONTRACT if method.containing_service.full_name in SERVICES]
    for method in served:
        for authorization, reason in WRONG.items():
            assert await door.reason(method, authorization) == reason, (method.name, authorization)
        for role in ALLOWED_NAMES:
            reason = await door.reason(method, f"Bearer {door.tokens[role]}")
            allowed = role in METHODS[name_of(method)]
            assert (reason == "ROLE_MISSING") is not allowed, (method.name, role)
            assert reason != "UNAUTHENTICATED"


WRONG = {
    None: "UNAUTHENTICATED",
    "": "UNAUTHENTICATED",
    "Bearer ": "UNAUTHENTICATED",
    "Bearer rudder.0000000000000000." + "A" * 43: "UNAUTHENTICATED",
    "Basic YTpi": "UNAUTHENTICATED",
    "Bearer a.b.c": "UNAUTHENTICATED",
    "Bearer " + "x" * 4096: "UNAUTHENTICATED",
}


async def test_reflection_needs_a_role_and_health_needs_none(door: SafeDoor) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    async with grpc.aio.secure_channel(door.address, door.credentials()) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]
        for token, answers in ((None, False), (door.tokens["generate"], False), (door.tokens["observe"], True)):
            metadata = (("authorization", f"Bearer {token}"),) if token else ()
            call = stub.ServerReflectionInfo(iter([request]), metadata=metadata, timeout=10)
            if answers:
                assert (await call.read()).list_services_response.service
            else:
                assert await reason_of(call) in ("UNAUTHENTICATED", "ROLE_MISSING")


async def test_client_with_a_token_generates_and_its_name_is_logged(
    door: SafeDoor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "rudder")
    async with door.client(door.tokens["generate"]) as client:
        completion = await client.complete([5, 6], max_tokens=3)
    assert completion.choices[0].token_ids == (1, 2, 3)
    (line,) = access_fields(caplog)
    assert line["caller"] == "caller-generate"


@pytest.mark.parametrize(
    ("role", "field", "arguments"),
    [
        ("generate", "report", {"report": Report(top_k=3)}),
        ("generate", "steering.program", {"steer": Program().at("layers.1.resid_post").clamp(feature=1, to=-1)}),
        (
            "steer",
            "InferenceService.Complete",
            {"steer": Program().at("layers.1.resid_post").clamp(feature=1, to=-1)},
        ),
    ],
)
async def test_fields_need_roles_of_their_own(door: SafeDoor, role: str, field: str, arguments: dict[str, Any]) -> None:
    async with door.client(door.tokens[role]) as client:
        with pytest.raises(RudderError, match=field) as caught:
            await client.complete([5, 6], max_tokens=3, **arguments)
    assert caught.value.reason == "ROLE_MISSING"


async def test_revoked_token_and_new_one_take_effect_without_a_restart(
    door: SafeDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched_file, "CHECK_S", 0.0)
    new, entry = tokens.create("late", ["generate"])
    (door.folder / "tokens.yaml").write_bytes(tokens.write(TokenFile((entry,))))
    async with door.client(new) as client:
        assert (await client.complete([5], max_tokens=1)).choices[0].token_ids == (1,)
    async with door.client(door.tokens["generate"]) as client:
        with pytest.raises(RudderError) as caught:
            await client.complete([5], max_tokens=1)
    assert caught.value.reason == "UNAUTHENTICATED"
    (door.folder / "tokens.yaml").write_text("tokens: [")
    async with door.client(new) as client:
        assert (await client.complete([5], max_tokens=1)).choices[0].token_ids == (1,)
    failures = door.fixture.registry.get_sample_value("rudder_reload_failures_total", {"what": "identity.tokens"})
    assert failures
    expiry = door.fixture.registry.get_sample_value("rudder_tls_certificate_expiry_timestamp_seconds")
    certificate = x509.load_pem_x509_certificate((door.folder / "server.pem").read_bytes())
    assert expiry == certificate.not_valid_after_utc.timestamp() > time.time()


async def test_new_certificate_serves_new_handshakes_and_running_streams_go_on(
    door: SafeDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watched_file, "CHECK_S", 0.0)
    before = served_serial(door)
    door.fixture.engine.stall_after = 1
    async with door.client(door.tokens["generate"]) as client:
        stream = client.generate([5], max_tokens=3)
        await anext(aiter(stream))
        (door.folder / "server.key").write_bytes(door.authority.issue("localhost")[1])
        assert await asyncio.to_thread(served_serial, door) == before, "a key without its certificate"
        door.write_certificate()
        assert await asyncio.to_thread(served_serial, door) != before
        door.fixture.engine.stall_after = None
        stream.cancel()
    failures = door.fixture.registry.get_sample_value("rudder_reload_failures_total", {"what": "tls.certificate"})
    assert failures


def served_serial(door: SafeDoor) -> int:
    """Return the serial number of the certificate that a new handshake shows."""
    host, _, port = door.address.rpartition(":")
    context = ssl.create_default_context(cadata=door.authority.pem.decode())
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port)), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname=host) as secure,
    ):
        shown = x509.load_der_x509_certificate(secure.getpeercert(binary_form=True) or b"")
        return shown.serial_number


async def test_client_certificate_is_the_caller(tmp_path: Path) -> None:
    door = SafeDoor(tmp_path, mutual=True)
    await door.start()
    known = door.authority.issue("x", "spiffe://acme/app")
    async with door.client(pair=known) as client:
        assert (await client.complete([5], max_tokens=1)).choices[0].token_ids == (1,)
        with pytest.raises(RudderError) as caught:
            await client.inspect([5])
        assert caught.value.reason == "ROLE_MISSING"
    # A common name is free text.
    for other in (("x", "spiffe://acme/other"), ("spiffe://acme/app",)):
        async with door.client(pair=door.authority.issue(*other)) as client:
            with pytest.raises(RudderError) as caught:
                await client.complete([5], max_tokens=1)
            assert caught.value.reason == "UNAUTHENTICATED"
    for pair in (None, Authority.create().issue("x", "spiffe://acme/app")):
        async with door.client(pair=pair) as client:
            with pytest.raises(RudderError) as caught:
                await client.complete([5], max_tokens=1)
            assert caught.value.code == "UNAVAILABLE"
    await door.stop()


async def test_quotas_of_a_token_hold_at_the_door(tmp_path: Path) -> None:
    door = SafeDoor(tmp_path)
    token, entry = tokens.create("limited", ["generate"], quotas=Quotas(requests=2))
    (tmp_path / "tokens.yaml").write_bytes(tokens.write(TokenFile((entry,))))
    door.fixture = Fixture(
        **{
            "identity.tokens": str(tmp_path / "tokens.yaml"),
            "tls.certificate": str(tmp_path / "server.pem"),
            "tls.key": str(tmp_path / "server.key"),
        }
    )
    await door.start()
    async with door.client(token) as client:
        for _ in range(2):
            await client.complete([5], max_tokens=1)
        with pytest.raises(RudderError) as caught:
            await client.complete([5], max_tokens=1)
    assert (caught.value.code, caught.value.reason) == ("RESOURCE_EXHAUSTED", "QUOTA_REQUESTS")
    assert caught.value.retry_after
    await door.stop()


@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_token_does_not_leave_this_machine_without_tls(
    client: type[Client] | type[AsyncClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc, "insecure_channel", None)
    monkeypatch.setattr(grpc.aio, "insecure_channel", None)
    with pytest.raises(ValueError, match="TLS"):
        client("server.example:50051", token="rudder.a.b")
