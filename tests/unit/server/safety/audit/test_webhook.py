"""Copies of the audit log at a web server that is slow, refuses, or is not there."""

import hashlib
import hmac
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from rudder.server.config import ConfigError
from rudder.server.monitoring.metrics import Metrics
from rudder.server.safety.audit.trail import open_trail
from rudder.server.safety.audit.webhook import Webhook
from tests.unit.server.safety.audit.trails import call_entry, settings

SECRET = b"s" * 32


class Receiver(ThreadingHTTPServer):
    """A web server that answers with the statuses of a list, then 200, once `gate` is set."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.statuses, self.gate = list[int](), threading.Event()
        self.bodies, self.signatures, self.paths = list[bytes](), list[str](), list[str]()
        self.gate.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/audit"


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.gate.wait(10)
        self.server.paths.append(self.path)
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        if status == 200:
            self.server.bodies.append(body)
            self.server.signatures.append(self.headers["Rudder-Signature"])
        self.send_response(status)
        self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.gate.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def make(registry: CollectorRegistry) -> Iterator[Callable[..., Webhook]]:
    metrics, made = Metrics.create(registry), list[Webhook]()

    def webhook(url: str, size: int = 100) -> Webhook:
        made.append(Webhook(url, SECRET, size, metrics))
        return made[-1]

    yield webhook
    for each in made:
        each.deadline = 0
        each.closing.set()


def counted(registry: CollectorRegistry, outcome: str) -> float:
    return registry.get_sample_value("rudder_audit_webhook_records_total", {"outcome": outcome}) or 0


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_receiver_gets_the_lines_of_the_log_with_a_signature(
    tmp_path: Path, receiver: Receiver, registry: CollectorRegistry
) -> None:
    fields = settings(tmp_path, webhook=receiver.url, webhook_secret_file=str(tmp_path / "audit.key"))
    trail = open_trail(fields, Metrics.create(registry))
    assert trail
    assert trail.webhook
    for number in range(10):
        trail.submit(call_entry(number)).result()
    trail.close()
    first, _, rest = trail.log.place.file(1).read_bytes().partition(b"\n")
    assert b"begin" in first
    assert b"".join(receiver.bodies) == rest
    expected = [hmac.new(trail.webhook.secret, body, hashlib.sha256).hexdigest() for body in receiver.bodies]
    assert receiver.signatures == [f"sha256={digest}" for digest in expected]
    assert (counted(registry, "sent"), counted(registry, "dropped")) == (10, 0)


def test_failed_batch_is_repeated_in_order(
    make: Callable[..., Webhook], receiver: Receiver, registry: CollectorRegistry
) -> None:
    receiver.statuses = [503, 429]
    webhook = make(receiver.url)
    webhook.put([b"1\n"])
    until(lambda: len(receiver.paths) == 1)
    webhook.put([b"2\n"])
    until(lambda: counted(registry, "sent") == 2)
    assert b"".join(receiver.bodies) == b"1\n2\n"


@pytest.mark.parametrize("status", [400, 401, 404, 302, 307])
def test_refused_batch_is_dropped_and_no_redirect_followed(
    make: Callable[..., Webhook], receiver: Receiver, registry: CollectorRegistry, status: int
) -> None:
    receiver.statuses = [status]
    webhook = make(receiver.url)
    webhook.put([b"1\n"])
    until(lambda: counted(registry, "dropped") == 1)
    webhook.put([b"2\n"])
    until(lambda: counted(registry, "sent") == 1)
    assert receiver.paths == ["/audit", "/audit"]


def test_slow_receiver_blocks_nobody_and_drops_are_counted(
    make: Callable[..., Webhook], receiver: Receiver, registry: CollectorRegistry
) -> None:
    receiver.gate.clear()
    webhook = make(receiver.url, size=10)
    started = time.monotonic()
    for number in range(100):
        webhook.put([b"%d\n" % number])
    assert time.monotonic() - started < 1
    assert counted(registry, "dropped") >= 80
    receiver.gate.set()
    until(lambda: counted(registry, "sent") + counted(registry, "dropped") == 100)


def test_closing_delivers_what_waits_and_does_not_wait_for_a_dead_receiver(
    make: Callable[..., Webhook], registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rudder.server.safety.audit.webhook.CLOSE_S", 0.3)
    webhook = make("http://127.0.0.1:9/")
    webhook.put([b"1\n", b"2\n"])
    started = time.monotonic()
    webhook.close()
    assert time.monotonic() - started < 2
    assert counted(registry, "dropped") == 2


@pytest.mark.parametrize("url", ["http://example.com/audit", "ftp://localhost/", "audit", "http:///x", "file:///etc"])
def test_url_must_be_encrypted_or_local(make: Callable[..., Webhook], url: str) -> None:
    with pytest.raises(ConfigError, match=r"^audit\.webhook: must be https"):
        make(url)
