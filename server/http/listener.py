"""Connections of the HTTP door: TLS, the names in a client's certificate, and connections that send no request."""

import asyncio
import logging
import ssl
from collections.abc import Callable, Mapping
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from rudder.server.config import Tls
from rudder.server.identity.certificates import ranked_names
from rudder.server.identity.watched_file import watched_pair

MAX_HEADER_BYTES = 32 << 10
# A connection must send the headers of a request within this time, the first one or the next.
IDLE_S = 30
HANDSHAKE_S = 10.0
# Kinds of names in the certificates of Python's ssl.
URI, DNS, COMMON_NAME = "URI", "DNS", "commonName"


class Connection(H11Protocol):
    """A connection that is closed if no request comes, and whose calls know its transport."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self.app_state = {"transport": transport}
        self.timeout_keep_alive_task = self.loop.call_later(IDLE_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Take in bytes. The time for a request runs on until one is being answered: its headers are complete."""
        timer, self.timeout_keep_alive_task = self.timeout_keep_alive_task, None
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self.timeout_keep_alive_task = timer
        elif timer:
            timer.cancel()


class Listener:
    """A listening socket and its connections. `most`: connections beyond these get 503, without a reason."""

    def __init__(self, app: Any, most: int | None = None) -> None:
        self.config = Config(
            app, http=Connection, ws="none", lifespan="off", loop="asyncio", log_config=None, access_log=False,
            proxy_headers=False, server_header=False, date_header=False, timeout_keep_alive=IDLE_S,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES, limit_concurrency=most,
        )  # fmt: skip
        self.config.load()
        # Bytes that are no request are the sender's fault, and would fill the log.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        self.state = ServerState()
        self.server: asyncio.Server | None = None

    async def start(self, host: str, port: int, context: ssl.SSLContext | None) -> int:
        """Listen, and return the port. Raises OSError."""
        self.server = await asyncio.get_running_loop().create_server(
            lambda: Connection(self.config, self.state, {}), host, port, ssl=context,
            ssl_handshake_timeout=HANDSHAKE_S if context else None,
        )  # fmt: skip
        bound: int = self.server.sockets[0].getsockname()[1]
        return bound

    async def stop(self, grace_s: float) -> None:
        """Take no more connections and requests; abort what still runs after `grace_s`."""
        if self.server is None:
            return
        self.server.close()
        for connection in list(self.state.connections):
            connection.shutdown()
        if self.state.tasks:
            await asyncio.wait(list(self.state.tasks), timeout=grace_s)
        for task in list(self.state.tasks):
            task.cancel()
        for connection in list(self.state.connections):
            if grace_s == 0 or not connection.transport.is_closing():
                connection.transport.abort()


def server_context(tls: Tls, failed: Callable[[str], None]) -> ssl.SSLContext | None:
    """Return the door's TLS, which reads changed files at the next handshake; None without TLS. Raises ConfigError."""
    files = watched_pair(tls, lambda *_: context_of(tls), failed)
    if files is None:
        return None

    def chosen(connection: ssl.SSLObject, _: str | None, __: ssl.SSLContext) -> None:
        connection.context = files.current()

    files.content.sni_callback = chosen
    return files.content


def context_of(tls: Tls) -> ssl.SSLContext:
    """Read the files of a key pair, and of the clients' authorities. ValueError: they do not belong together."""
    assert tls.certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(tls.certificate, tls.key)
        if tls.client_ca:
            context.load_verify_locations(tls.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except ssl.SSLError as error:
        raise ValueError(f"the files of tls: {error.reason or error}") from error
    return context


def certificate_names(transport: asyncio.BaseTransport) -> tuple[str, ...]:
    """Return the names in the client's certificate, which TLS has verified, best first."""
    certificate: Mapping[str, Any] = transport.get_extra_info("peercert") or {}
    alternatives = certificate.get("subjectAltName", ())
    uris, dns = ([value for kind, value in alternatives if kind == wanted] for wanted in (URI, DNS))
    subject = [pair for part in certificate.get("subject", ()) for pair in part]
    return ranked_names(uris, dns, [value for kind, value in subject if kind == COMMON_NAME])
