"""The endpoint that Prometheus scrapes, in threads of its own.

`prometheus_client.start_http_server` does not do: where a scraper takes OpenMetrics, which alone carries exemplars, its
version 0.26 writes `vllm:num_requests_running` as `vllm_num_requests_running`, and no query of vLLM's own dashboards,
autoscalers and routers finds it.
"""

import gzip
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, exposition
from prometheus_client.openmetrics import exposition as openmetrics

PATHS = ("/metrics", "/")
OPENMETRICS = "application/openmetrics-text"


def exposed(registry: CollectorRegistry, accept: str = "") -> tuple[str, bytes]:
    """Return content type and text of all series, in the format that an Accept header asks for."""
    if OPENMETRICS in accept:
        # Names with a colon are valid in both formats; this escaping alone leaves them as they are.
        text = openmetrics.generate_latest(registry, openmetrics.ALLOWUTF8)  # type: ignore[no-untyped-call]
        return openmetrics.CONTENT_TYPE_LATEST, text
    return exposition.CONTENT_TYPE_PLAIN_0_0_4, exposition.generate_latest(registry)


class MetricsServer(ThreadingHTTPServer):
    """Serves the series of a registry at /metrics. `server_port`: the port that it listens on."""

    daemon_threads = True

    def __init__(self, registry: CollectorRegistry, port: int, host: str) -> None:
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        self.registry = registry
        super().__init__((host, port), Handler)


class Handler(BaseHTTPRequestHandler):
    """Answers a scrape."""

    server: MetricsServer
    # Of a client that sends nothing.
    timeout = 30

    def do_GET(self) -> None:
        """Send all series, compressed where the scraper takes that."""
        if urlsplit(self.path).path not in PATHS:
            self.send_error(404)
            return
        kind, body = exposed(self.server.registry, self.headers.get("Accept", ""))
        compressed = "gzip" in self.headers.get("Accept-Encoding", "")
        body = gzip.compress(body, 1) if compressed else body
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if compressed:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Log nothing: scrapes are no calls."""


def serve_metrics(registry: CollectorRegistry, port: int, host: str) -> MetricsServer:
    """Serve the series of a registry in a thread; port 0: any free one. Raises OSError if it cannot listen."""
    server = MetricsServer(registry, port, host)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server
