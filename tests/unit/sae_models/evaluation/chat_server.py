"""A small server of the OpenAI chat protocol, whose answers a test chooses."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Reply = Callable[[str, str], str]


@dataclass
class Served:
    """The address of the server, and the bodies of the requests so far."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def serving(reply: Reply, models: tuple[str, ...] = ("small",), status: int = 200) -> Iterator[Served]:
    """Serve `/v1/models` and `/v1/chat/completions` in a thread: `reply` maps the two messages to the answer."""
    served = Served("")

    async def list_models(_: web.Request) -> web.Response:
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "tests"} for name in models]
        return web.json_response({"object": "list", "data": data})

    async def complete(request: web.Request) -> web.Response:
        body = await request.json()
        served.requests.append(body)
        if status != 200:
            return web.json_response({"error": {"message": "out of order"}}, status=status)
        system, user = (message["content"] for message in body["messages"])
        message = {"role": "assistant", "content": reply(system, user)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        completion = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
        return web.json_response(completion)

    async def page(_: web.Request) -> web.Response:
        return web.Response(text="<html>hello</html>", content_type="text/html")

    app = web.Application()
    app.router.add_get("/v1/models", list_models)
    app.router.add_post("/v1/chat/completions", complete)
    app.router.add_route("*", "/{other:.*}", page)
    loop, runner = asyncio.new_event_loop(), web.AppRunner(app)
    loop.run_until_complete(runner.setup())
    loop.run_until_complete(web.TCPSite(runner, "127.0.0.1", 0).start())
    served.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
