"""The endpoint serves both formats with the names of vLLM's series as they are."""

import gzip
from collections.abc import Iterator
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from prometheus_client import CollectorRegistry, Gauge

from rudder.server.monitoring.exposition import MetricsServer, exposed, serve_metrics
from rudder.server.monitoring.metrics import Metrics

# What Prometheus 2.42 sends.
ACCEPT = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    registry = CollectorRegistry()
    Gauge("vllm:num_requests_running", "Requests.", ["engine"], registry=registry).labels("0").set(3)
    Metrics.create(registry).first_token(0.3, "a" * 32)
    started = serve_metrics(registry, 0, "127.0.0.1")
    yield started
    started.shutdown()
    started.server_close()


def scraped(server: MetricsServer, path: str = "/metrics", **headers: str) -> tuple[str, bytes]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    with urlopen(Request(f"http://127.0.0.1:{server.server_port}{path}", headers=names)) as response:
        return response.headers["Content-Type"], response.read()


@pytest.mark.parametrize(
    ("accept", "kind"),
    [(ACCEPT, "application/openmetrics-text; version=1.0.0"), ("*/*", "text/plain; version=0.0.4"), ("", "text/plain")],
)
def test_names_with_a_colon_stay_as_they_are(server: MetricsServer, accept: str, kind: str) -> None:
    found, body = scraped(server, Accept=accept)
    assert found.startswith(kind)
    assert b'\nvllm:num_requests_running{engine="0"} 3.0\n' in body
    assert (b"trace_id" in body, body.endswith(b"# EOF\n")) == (accept == ACCEPT,) * 2


def test_scrapes_are_compressed(server: MetricsServer) -> None:
    kind, body = scraped(server, Accept_Encoding="gzip")
    assert gzip.decompress(body) == exposed(server.registry)[1]
    assert kind == exposed(server.registry)[0]


def test_there_is_nothing_else(server: MetricsServer) -> None:
    assert scraped(server, "/metrics?x=1")[1] == scraped(server, "/")[1]
    with pytest.raises(HTTPError) as caught:
        scraped(server, "/debug")
    assert caught.value.code == 404


def test_a_port_that_is_taken_is_an_error(server: MetricsServer) -> None:
    with pytest.raises(OSError, match="in use"):
        serve_metrics(server.registry, server.server_port, "127.0.0.1")
