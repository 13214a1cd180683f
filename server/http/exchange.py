"""One request and its answer, over ASGI: headers, body, a JSON document or a stream of events."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec

from rudder.server.config import Limits
from rudder.server.http.errors import Headers
from rudder.server.http.listener import certificate_names
from rudder.server.identity.authenticator import Credentials
from rudder.server.service.errors import Refusal, invalid

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ANY_ANSWER: Headers = [(b"x-rudder", b"1"), (b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")]
JSON: Headers = [(b"content-type", b"application/json")]
EVENTS: Headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]


class Disconnected(asyncio.CancelledError):
    """The client closed the connection before it had sent its request."""


@dataclass
class Exchange:
    """A request and its answer.

    `started`: the answer has begun, so that its status is settled. `gone`: the client closed the connection before its
    end. `names`: the request's own names of the contract's fields, and `failure`: what ends its stream; both
    once it is read.
    """

    scope: MutableMapping[str, Any]
    receive: Receive
    send: Send
    limits: Limits
    started: bool = False
    gone: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    failure: Callable[[dict[str, Any]], bytes] | None = None
    headers: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in self.scope["headers"]:
            self.headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))

    def header(self, name: str) -> str:
        """Return the value of a header that may come once; empty without it. Raises Refusal if it comes twice."""
        values = self.headers.get(name, [])
        if len(values) > 1:
            raise invalid(name, "the request has this header several times")
        return values[0] if values else ""

    @property
    def transport(self) -> asyncio.Transport | None:
        """The connection; None where there is none, as in a test."""
        transport: asyncio.Transport | None = self.scope.get("state", {}).get("transport")
        return transport

    @property
    def credentials(self) -> Credentials:
        """What the call and its connection say of who calls."""
        names = certificate_names(self.transport) if self.transport else ()
        host, port = self.scope.get("client") or ("", 0)
        return Credentials(tuple(self.headers.get("authorization", ())), names, f"http:{host}:{port}")

    @property
    def length(self) -> int:
        """Bytes of the body by its header; 0 without a body."""
        declared = self.header("content-length") or "0"
        return int(declared) if declared.isascii() and declared.isdigit() and len(declared) < 20 else 0

    def require_size(self) -> None:
        """Raise Refusal MESSAGE_TOO_LARGE if the body has more bytes than a request may have."""
        maximum = self.limits.max_message_bytes
        if self.length > maximum:
            raise Refusal("MESSAGE_TOO_LARGE", f"the request has {self.length} bytes, at most {maximum}")

    async def body(self) -> bytes:
        """Read the body. Raises Refusal if it is slow, Disconnected if the connection closes."""
        content = bytearray()
        try:
            async with asyncio.timeout(self.limits.write_timeout_s):
                while await self.more_of(content):
                    pass
        except TimeoutError as error:
            problem = f"the request was not there within {self.limits.write_timeout_s:g} s"
            raise Refusal("CLIENT_TOO_SLOW", problem) from error
        return bytes(content)

    async def more_of(self, content: bytearray) -> bool:
        """Add the next part of the body; return whether another follows."""
        message = await self.receive()
        if message["type"] == "http.disconnect":
            self.gone = True
            raise Disconnected
        content += message.get("body", b"")
        if len(content) > self.length:
            raise invalid("content-length", "the body is longer")
        return bool(message.get("more_body"))

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Within the block, cancel this task when the client closes the connection. The body must have been read."""
        task = asyncio.current_task()
        assert task
        watching = asyncio.create_task(self.cancel_when_gone(task))
        try:
            yield
        finally:
            watching.cancel()

    async def cancel_when_gone(self, task: "asyncio.Task[Any]") -> None:
        """Wait until the client has closed the connection.

        A server says so too when the answer has ended; by then, without a wait between, `watched` has ended.
        """
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        task.cancel()

    async def start(self, status: int, headers: Headers) -> None:
        """Begin the answer."""
        self.started = True
        await self.send({"type": "http.response.start", "status": status, "headers": [*ANY_ANSWER, *headers]})

    async def write(self, content: bytes, more: bool) -> None:
        """Write a part of the answer. Raises Refusal CLIENT_TOO_SLOW if the client does not take it in time."""
        try:
            async with asyncio.timeout(self.limits.write_timeout_s):
                await self.send({"type": "http.response.body", "body": content, "more_body": more})
        except TimeoutError as error:
            problem = f"a message lay unread for {self.limits.write_timeout_s:g} s"
            raise Refusal("CLIENT_TOO_SLOW", problem) from error

    async def answer(self, status: int, document: Any, headers: Headers) -> None:
        """Answer with a JSON document."""
        await self.send_whole(status, msgspec.json.encode(document), [*JSON, *headers])

    async def send_whole(self, status: int, content: bytes, headers: Headers) -> None:
        """Answer with these bytes."""
        await self.start(status, [(b"content-length", str(len(content)).encode()), *headers])
        await self.write(content, more=False)

    async def event(self, content: bytes, headers: Headers) -> None:
        """Write one or more events of a stream; the first begins the answer."""
        if not self.started:
            await self.start(200, [*EVENTS, *headers])
        await self.write(content, more=True)

    async def end(self, content: bytes = b"") -> None:
        """End a stream of events."""
        await self.write(content, more=False)

    async def drop(self) -> None:
        """Close the connection at once, whatever the client has not read."""
        if self.transport:
            self.transport.abort()
            # The connection learns of it in the next turn of the loop, and would call an answer without an end a fault.
            await asyncio.sleep(0)
