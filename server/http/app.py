"""Routes of the HTTP door, and what surrounds each call: credentials, body, errors, a client that goes away."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from rudder.server.config import is_loopback
from rudder.server.http.answers import WHOLE, Answer, Call, answer_headers, respond
from rudder.server.http.chat import ChatAnswer
from rudder.server.http.completions import CompletionAnswer
from rudder.server.http.console import FOLDER, pages_of
from rudder.server.http.errors import error_body, refusal_body, refusal_headers
from rudder.server.http.exchange import Exchange, Receive, Send
from rudder.server.http.methods import LIVE, LIVE_METHOD, METHODS, answer_live, answer_method
from rudder.server.http.responses import ResponseAnswer
from rudder.server.http.usage import TokenTexts
from rudder.server.monitoring.traces import correlation_of
from rudder.server.service.call import begin_call
from rudder.server.service.errors import Refusal
from rudder.server.service.record import CallRecord
from rudder.server.service.serving import Serving

HEALTH, MODELS, MODELS_METHOD = b"/health", b"/v1/models", "ModelService.Get"
ENDPOINTS: Mapping[bytes, Callable[[Call, bytes], Answer]] = {
    b"/v1/chat/completions": ChatAnswer,
    b"/v1/completions": CompletionAnswer,
    b"/v1/responses": ResponseAnswer,
}
# The API: a path, byte for byte as it was sent, and its one HTTP method. Beside it there are the console's files.
ROUTES: Mapping[bytes, str] = dict.fromkeys((*ENDPOINTS, *METHODS, LIVE), "POST") | {MODELS: "GET", HEALTH: "GET"}


class App:
    """The ASGI application of the door. `healthy`: whether load balancers should route calls here."""

    def __init__(self, serving: Serving) -> None:
        self.serving, self.healthy, self.texts = serving, False, TokenTexts()
        self.created, self.pages = int(time.time()), pages_of(FOLDER)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send, self.serving.config.limits)
        route, method = scope["raw_path"].partition(b"?")[0], scope["method"]
        expected = "GET" if route in self.pages else ROUTES.get(route)
        if expected is None:
            await exchange.answer(404, error_body(404, "there is no such path", "NOT_FOUND"), [])
        elif method != expected:
            allow = [(b"allow", expected.encode())]
            await exchange.answer(405, error_body(405, f"the method is {expected}", "METHOD_NOT_ALLOWED"), allow)
        elif route == HEALTH:
            status = 200 if self.healthy else 503
            await exchange.answer(status, {"status": "serving" if self.healthy else "not serving"}, [])
        elif problem := self.problem(exchange, method):
            await exchange.answer(problem[0], error_body(*problem, "FIELD_INVALID"), [(b"connection", b"close")])
        elif page := self.pages.get(route):
            await exchange.send_whole(page.status, page.content, page.headers)
        else:
            await self.call(exchange, route)

    async def call(self, exchange: Exchange, route: bytes) -> None:
        """Run a call of the API."""
        if route == MODELS:
            await self.surrounded(exchange, MODELS_METHOD, lambda record: self.models(exchange, record))
        elif route == LIVE:
            await self.surrounded(exchange, LIVE_METHOD, lambda record: answer_live(exchange, self.serving, record))
        elif method := METHODS.get(route):
            await self.surrounded(
                exchange, method.name, lambda record: answer_method(exchange, self.serving, record, method)
            )
        else:
            endpoint = ENDPOINTS[route]
            await self.surrounded(exchange, WHOLE, lambda record: self.generate(exchange, record, endpoint))

    def problem(self, exchange: Exchange, method: str) -> tuple[int, str] | None:
        """Return status and message for a request that is none of a client's, but may be one of a browser's.

        The page of a stranger may send a form, but no JSON; and its name may mean this machine, but is not localhost.
        """
        alone = is_loopback(self.serving.config.listen.host) and not self.serving.authenticator.required
        if alone and not is_loopback(host_of(exchange)):
            return 421, "host: must be this machine, which alone may call a server without credentials"
        if method != "POST":
            return None
        kinds = exchange.headers.get("content-type", [])
        if len(kinds) != 1 or kinds[0].partition(";")[0].strip().lower() != "application/json":
            return 415, "content-type: must be application/json"
        if "content-encoding" in exchange.headers:
            return 415, "content-encoding: must not be set"
        if not exchange.length or "transfer-encoding" in exchange.headers:
            return 411, "content-length: must be set, and no transfer-encoding"
        return None

    async def surrounded(
        self, exchange: Exchange, method: str, behaviour: Callable[[CallRecord], Awaitable[None]]
    ) -> None:
        """Run a call within `begin_call`, its refusals as errors of the API. A client that goes away ends it."""
        headers = [(name, value) for name, values in exchange.headers.items() for value in values]
        # What is beyond the limit is never read: its announced length, of any size, is not charged to a quota.
        size = min(exchange.length, 2 * exchange.limits.max_message_bytes)
        try:
            async with begin_call(self.serving, method, exchange.credentials, size, correlation_of(headers)) as record:
                await behaviour(record)
        except Refusal as refusal:
            await refuse(exchange, refusal)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not exchange.gone or task is None:
                raise
            # There is nobody left to answer: what this task was for has ended.
            while task.cancelling():
                task.uncancel()

    async def models(self, exchange: Exchange, record: CallRecord) -> None:
        """Answer with the model that is served."""
        served = self.serving.engine.model
        entry = {
            "id": served.name, "object": "model", "created": self.created, "owned_by": "rudder",
            "max_model_len": served.max_model_len,
        }  # fmt: skip
        await exchange.answer(200, {"object": "list", "data": [entry]}, answer_headers(record))

    async def generate(self, exchange: Exchange, record: CallRecord, endpoint: Callable[[Call, bytes], Answer]) -> None:
        """Read a request and answer it."""
        exchange.require_size()
        with self.serving.pending.held(exchange.length):
            answer = endpoint(Call(self.serving, record, self.texts), await exchange.body())
            exchange.names, exchange.failure = answer.asked.names, answer.failure
            async with exchange.watched():
                await respond(exchange, Call(self.serving, record, self.texts), answer)


async def refuse(exchange: Exchange, refusal: Refusal) -> None:
    """Answer with a refusal, or end with it the stream that has begun. A client that does not read is cut off."""
    body = refusal_body(refusal, exchange.names)
    try:
        if not exchange.started:
            await exchange.answer(refusal.http_status, body, refusal_headers(refusal))
        elif exchange.failure and refusal.reason != "CLIENT_TOO_SLOW":
            await exchange.end(exchange.failure(body))
        else:
            await exchange.drop()
    except Refusal:
        await exchange.drop()


def host_of(exchange: Exchange) -> str:
    """Return the name or address in the host header, without brackets and port; empty unless there is one."""
    hosts = exchange.headers.get("host", [])
    host = hosts[0] if len(hosts) == 1 else ""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
