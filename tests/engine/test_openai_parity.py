"""The HTTP door beside vLLM's own OpenAI app, over the same engine: the same documents, but for what Rudder adds."""

import copy
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from rudder.sae_models import PRETRAINED
from rudder.server import config as configuration
from rudder.server.bench.http import stock_app
from rudder.server.engine.engine import Engine
from rudder.server.http.app import App
from rudder.server.monitoring.metrics import Metrics
from rudder.server.service.serving import Serving

pytestmark = pytest.mark.engine
# What differs between any two requests, what Rudder adds, and a count that vLLM alone has.
OWN = ("id", "created", "system_fingerprint", "rudder", "created_cache_tokens")
MESSAGES = [{"role": "system", "content": "Biology."}, {"role": "user", "content": "What is a cell?"}]
COMMON: dict[str, Any] = {"temperature": 0, "max_tokens": 6}
SEVERAL: dict[str, Any] = {"n": 2, "seed": 5, "temperature": 1}
CHATS: list[dict[str, Any]] = [
    {}, SEVERAL, {"logprobs": True, "top_logprobs": 2}, {"logprobs": True}, {"stop": ["e"]},
    {"stream_options": {"include_usage": True}},
    {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a", "b"]}}}},
    {"seed": 3, "temperature": 1}, {"logit_bias": {"17": 100}}, {"max_tokens": None, "max_completion_tokens": 3},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
]  # fmt: skip
COMPLETIONS: list[dict[str, Any]] = [
    {}, SEVERAL, {"logprobs": 2}, {"logprobs": 0}, {"prompt": [5, 6, 7]}, {"stop": "e"}, {"max_tokens": None},
    {"stream_options": {"include_usage": True}},
]  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def apps(engine: Engine) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    """Clients of vLLM's app and of the door."""
    stock = await stock_app(engine, str(PRETRAINED / "textbook-lm"))
    config = configuration.load(overrides={"stream.message_budget_per_s": "1e9"})
    serving = Serving.around(engine, config, Metrics.create(CollectorRegistry()))
    served: list[Any] = [stock, App(serving)]
    clients = [httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") for app in served]
    yield clients[0], clients[1]
    serving.tokenizers.shutdown()


def parts(response: httpx.Response) -> list[Any]:
    """Return the documents of an answer, without what differs between any two."""
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith(("data: ", "{"))]
    return [line if line == "[DONE]" else without(json.loads(line), *OWN) for line in lines]


def without(document: Any, *names: str) -> Any:
    """Return a document without some keys, at any depth."""
    if isinstance(document, list):
        return [without(entry, *names) for entry in document]
    if isinstance(document, dict):
        return {name: without(value, *names) for name, value in document.items() if name not in names}
    return document


def joined(documents: list[Any]) -> list[Any]:
    """Join the chunks of each choice, but for the one with its role, to compare contents: where a server cuts them, and
    how those of choices interleave, is a matter of load.
    """
    result: dict[tuple[int, bool], Any] = {}
    for document in documents:
        choice = document["choices"][0] if document != "[DONE]" and document["choices"] else None
        if choice:
            key = choice["index"], "role" not in choice.get("delta", {})
            add(result.setdefault(key, {}), choice)
    return [result[key] for key in sorted(result)]


def add(whole: Any, part: Any) -> None:
    """Add a delta to a choice."""
    for name, value in part.items():
        match value, whole.get(name):
            case str(), str():
                whole[name] += value
            case list(), list():
                whole[name] += value
            case dict(), dict():
                add(whole[name], value)
            case _:
                whole[name] = copy.deepcopy(value)


def forms(document: Any) -> Any:
    """Return the keys of a document in their order, with the types of what they hold; of a list, of its entries."""
    if isinstance(document, dict):
        return tuple((name, forms(value)) for name, value in document.items())
    if isinstance(document, list):
        return tuple(dict.fromkeys(forms(entry) for entry in document))
    return type(document).__name__


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        *(("/v1/chat/completions", {"messages": MESSAGES} | COMMON | case) for case in CHATS),
        *(("/v1/completions", {"prompt": "The cell"} | COMMON | case) for case in COMPLETIONS),
    ],
    ids=str,
)
async def test_streams_are_those_of_vllm(
    apps: tuple[httpx.AsyncClient, httpx.AsyncClient], engine: Engine, path: str, fields: dict[str, Any]
) -> None:
    request = {"model": engine.model.name, "stream": True} | fields
    stock, own = [parts(await client.post(path, json=request, timeout=60)) for client in apps]
    assert joined(own) == joined(stock)
    # How many chunks there are, and how those of choices interleave, is a matter of load.
    assert set(map(forms, own)) <= set(map(forms, stock))
    assert (own[0], own[-1]) == (stock[0], stock[-1])
    if "stream_options" in fields:
        assert own[-2] == stock[-2]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        *(("/v1/chat/completions", {"messages": MESSAGES} | COMMON | case) for case in CHATS if len(str(case)) < 60),
        *(("/v1/completions", {"prompt": "The cell"} | COMMON | case) for case in COMPLETIONS),
    ],
    ids=str,
)
async def test_whole_answers_are_those_of_vllm_but_for_what_is_null(
    apps: tuple[httpx.AsyncClient, httpx.AsyncClient], engine: Engine, path: str, fields: dict[str, Any]
) -> None:
    fields.pop("stream_options", None)
    answers = [parts(await client.post(path, json={"model": engine.model.name} | fields)) for client in apps]
    (stock,), (own,) = answers
    assert said(without(own, "service_tier", "annotations")) == said(without(stock, "service_tier", "annotations"))


def said(document: Any) -> Any:
    """Return a document without what is null."""
    if isinstance(document, list):
        return [said(entry) for entry in document]
    if isinstance(document, dict):
        return {name: said(value) for name, value in document.items() if value is not None}
    return document
