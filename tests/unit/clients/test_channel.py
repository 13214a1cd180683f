"""The client's channel: no proxy to this machine, TLS, metadata and options; and its end in a forked process."""

import asyncio
import datetime
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from rudder.v1 import catalogue_pb2, catalogue_pb2_grpc, inference_pb2, inference_pb2_grpc
from rudder_client import AsyncClient, Client, RudderError
from rudder_client.channel import OPTIONS, options_for

PROXY = "http://127.0.0.1:9"
LOCAL = (
    "localhost:1", "LOCALHOST", "127.0.0.1:50051", "127.1.2.3:1", "[::1]:50051", "unix:/tmp/x", "unix:///tmp/x",
    "unix-abstract:x", "dns:///localhost:1", "ipv4:127.0.0.1:1",
)  # fmt: skip
REMOTE = ("example.org:1", "localhost.example.org:1", "10.0.0.1:1", "127.example.org:1", "dns:///example.org:1")


class Models(catalogue_pb2_grpc.ModelServiceServicer):
    """Keeps the metadata of its calls."""

    def __init__(self) -> None:
        self.metadata: list[dict[str, Any]] = []

    def Get(self, _: Any, context: Any) -> catalogue_pb2.ModelServiceGetResponse:  # noqa: N802
        self.metadata.append({item.key: item.value for item in context.invocation_metadata()})
        return catalogue_pb2.ModelServiceGetResponse(model="m" * 1000)


class Endless(inference_pb2_grpc.InferenceServiceServicer):
    """A stream without an end."""

    def Generate(self, _: Any, context: Any) -> Iterator[inference_pb2.GenerateResponse]:  # noqa: N802
        while context.is_active():
            yield inference_pb2.GenerateResponse(choices=[inference_pb2.ChoiceDelta(text="x")])


@pytest.fixture
def models() -> Iterator[tuple[Models, Callable[[Any], int]]]:
    """The service, and a function that serves it on a port of this machine, with credentials or without."""
    service, server = Models(), grpc.server(futures.ThreadPoolExecutor(2))
    catalogue_pb2_grpc.add_ModelServiceServicer_to_server(service, server)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Endless(), server)

    def serve(credentials: Any = None) -> int:
        add = server.add_insecure_port if credentials is None else server.add_secure_port
        arguments = () if credentials is None else (credentials,)
        port: int = add("localhost:0", *arguments)
        server.start()
        return port

    yield service, serve
    server.stop(None)


@pytest.mark.parametrize("address", LOCAL)
def test_local_server_is_reached_without_a_proxy(address: str) -> None:
    assert dict(options_for(address, ()))["grpc.enable_http_proxy"] == 0


@pytest.mark.parametrize("address", REMOTE)
def test_remote_server_is_reached_as_the_environment_says(address: str) -> None:
    assert dict(options_for(address, ())) == dict(OPTIONS)


def test_options_of_the_caller_take_precedence() -> None:
    options = {"grpc.enable_http_proxy": 1, "grpc.max_receive_message_length": 7}
    assert dict(options_for("localhost", options)).items() >= options.items()
    assert options_for("localhost", tuple(options.items())) == options_for("localhost", options)


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "all_proxy", "grpc_proxy", "HTTP_PROXY"])
def test_call_of_both_clients_with_a_proxy_that_is_none(
    variable: str, models: tuple[Models, Callable[[Any], int]]
) -> None:
    port = models[1](None)
    script = (
        "import asyncio, sys; from rudder_client import AsyncClient, Client\n"
        "async def main():\n"
        "    async with AsyncClient(sys.argv[1], timeout=10) as client: print(len((await client.model()).model))\n"
        "for host in ('localhost', '127.0.0.1'):\n"
        "    with Client(sys.argv[1], timeout=10) as client: print(len(client.model().model))\n"
        "asyncio.run(main())"
    )
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    result = subprocess.run(
        [sys.executable, "-c", script, f"localhost:{port}"],
        capture_output=True, text=True, timeout=60, check=False, env=environment | {variable: PROXY},
    )  # fmt: skip
    assert result.stdout.split() == ["1000"] * 3, result.stderr


class Recorder(grpc.GenericRpcHandler):
    """Answers every method with UNIMPLEMENTED, and keeps each call's tenant by method."""

    def __init__(self) -> None:
        self.tenants: dict[str, set[str]] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> None:
        """Note a call; None: no such method."""
        metadata = dict(handler_call_details.invocation_metadata)
        method = handler_call_details.method.removeprefix("/")
        self.tenants.setdefault(method, set()).add(str(metadata.get("x-tenant")))


METHODS = {
    f"{service.full_name}/{method.name}"
    for file in (catalogue_pb2, inference_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
} | {"grpc.health.v1.Health/Check"}
CALLS: tuple[Callable[[Any], Any], ...] = (
    lambda client: client.generate("x"), lambda client: client.complete("x"), lambda client: client.inspect("x"),
    lambda client: client.tokenize("x"), lambda client: client.feature(0), lambda client: client.features(),
    lambda client: client.search("x"), lambda client: client.model(), lambda client: client.programs(),
    lambda client: client.wait_ready(0.05),
)  # fmt: skip


def test_metadata_is_sent_with_every_call() -> None:
    recorder, server = Recorder(), grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((recorder,))
    address = f"localhost:{server.add_insecure_port('localhost:0')}"
    server.start()

    async def read(result: Any) -> None:
        await anext(result) if hasattr(result, "__anext__") else await result

    async def call_all() -> None:
        async with AsyncClient(address, metadata={"x-tenant": "b"}, timeout=10) as client:
            for call in CALLS:
                with pytest.raises(RudderError):
                    await read(call(client))

    with Client(address, metadata=[("x-tenant", "a")], timeout=10) as client:
        for call in CALLS:
            with pytest.raises(RudderError):
                list(call(client))
    asyncio.run(call_all())
    server.stop(None)
    assert recorder.tenants == {method: {"a", "b"} for method in METHODS}


def test_channel_options_reach_grpc(models: tuple[Models, Callable[[Any], int]]) -> None:
    address, small = f"localhost:{models[1](None)}", {"grpc.max_receive_message_length": 100}
    with Client(address, options=small, timeout=10) as client, pytest.raises(RudderError) as caught:
        client.model()
    assert caught.value.code == "RESOURCE_EXHAUSTED"


def test_tls(models: tuple[Models, Callable[[Any], int]]) -> None:
    key, certificate = self_signed()
    address = f"localhost:{models[1](grpc.ssl_server_credentials([(key, certificate)]))}"
    credentials = grpc.ssl_channel_credentials(certificate)

    async def call() -> str:
        async with AsyncClient(address, credentials=credentials, timeout=10) as client:
            return (await client.model()).model

    with Client(address, credentials=credentials, timeout=10) as client:
        assert client.model().model == asyncio.run(call())
    with Client(address, timeout=2) as plain, pytest.raises(RudderError):
        plain.model()


def self_signed() -> tuple[bytes, bytes]:
    """Return a key and a certificate of localhost."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "localhost")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(pem, *plain), certificate.public_bytes(pem)


FORK = """
import os, sys
from rudder_client import AsyncClient, Client

client = Client(sys.argv[1], timeout=10)
print(len(client.model().model), flush=True)
stream = client.generate("x")
next(stream)
child = os.fork()
if child == 0:
    for use in (client.model, lambda: client.generate("x"), lambda: next(stream), lambda: client.wait_ready(1)):
        try:
            use()
        except RuntimeError as error:
            print(error, flush=True)
    stream.cancel()
    client.close()
    os._exit(0)
os.waitpid(child, 0)
next(stream)
print(len(client.model().model), flush=True)
"""


def test_forked_process_is_told_and_the_first_one_goes_on(
    models: tuple[Models, Callable[[Any], int]], tmp_path: Path
) -> None:
    (tmp_path / "fork.py").write_text(FORK)
    result = subprocess.run(
        [sys.executable, str(tmp_path / "fork.py"), f"localhost:{models[1](None)}"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    refused = "this client belongs to the process that was forked: create a Client after the fork"
    assert result.stdout.splitlines() == ["1000", *[refused] * 4, "1000"], result.stderr
