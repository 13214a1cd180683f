"""An HTTP door over a scripted engine."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import httpx
import msgspec
from prometheus_client import CollectorRegistry

from rudder.server import config
from rudder.server.http.server import HttpDoor
from rudder.server.monitoring.metrics import Metrics
from rudder.server.service.serving import Serving
from tests.unit.server.grpc.test_server import ScriptedEngine
from tests.unit.server.service.test_prompt import TOKENIZER

NOTHING: Mapping[str, str] = {}


class Rig:
    """A scripted engine behind an HTTP door, and a client of it."""

    def __init__(self, overrides: Mapping[str, str] = NOTHING, max_model_len: int = 100) -> None:
        self.engine, self.registry = ScriptedEngine(), CollectorRegistry()
        self.engine.tokenizer, self.engine.model.max_model_len = TOKENIZER, max_model_len
        loaded = config.load(overrides={"listen.port": "0", "listen.http_port": "0"} | dict(overrides))
        self.serving = Serving.around(self.engine, loaded, Metrics.create(self.registry))  # type: ignore[arg-type]
        self.door = HttpDoor(self.serving)
        self.address = ""
        self.client = httpx.AsyncClient(timeout=30)

    async def __aenter__(self) -> "Rig":
        self.address = (await self.door.start()).removesuffix("/v1")
        self.client.base_url = httpx.URL(self.address)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.aclose()
        await self.door.stop(0)
        self.serving.tokenizers.shutdown()

    def serving_at(self, port: int) -> Serving:
        """Return the same server, to listen on another port."""
        listen = msgspec.structs.replace(self.serving.config.listen, http_port=port)
        return replace(self.serving, config=msgspec.structs.replace(self.serving.config, listen=listen))

    def ended(self, method: str, outcome: str) -> float | None:
        return self.registry.get_sample_value("rudder_requests_total", {"method": method, "outcome": outcome})

    async def post(self, path: str, document: object, **headers: str) -> httpx.Response:
        return await self.client.post(path, json=document, headers=headers)

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.post("/v1/completions", {"model": "m", "prompt": [5, 6]} | fields)

    async def chat(self, **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": "cells"}]
        return await self.post("/v1/chat/completions", {"model": "m", "messages": messages, "max_tokens": 3} | fields)

    async def respond(self, **fields: Any) -> httpx.Response:
        return await self.post("/v1/responses", {"model": "m", "input": "cells", "max_output_tokens": 3} | fields)


def events(response: httpx.Response) -> list[Any]:
    """Return the documents of a stream's events, and `[DONE]`."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
