"""The console's files, and the methods that it calls: headers, roles, errors, live figures."""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from rudder.server.http import methods
from rudder.server.http.console import FOLDER, TYPES
from rudder.server.identity import tokens
from rudder.server.identity.tokens import TokenFile
from rudder.server.monitoring.collectors import BankUsage, FeatureTotals, Pinned, PinnedFeature, SiteUsage
from tests.unit.server.http.rig import Rig, events
from tests.unit.server.http.test_app import http, raw, status

FILES = sorted(path.name for path in FOLDER.iterdir())
LIVE = methods.LIVE.decode()


@pytest.fixture
async def door() -> AsyncIterator[Rig]:
    async with Rig() as rig:
        yield rig


@pytest.mark.parametrize("name", ["", *FILES])
async def test_files_come_with_a_strict_policy(door: Rig, name: str) -> None:
    if name == "index.html":
        assert (await door.client.get("/console/index.html")).status_code == 404
        return
    response = await door.client.get(f"/console/{name}")
    assert response.status_code == 200
    assert response.text == (FOLDER / (name or "index.html")).read_text(encoding="utf-8")
    assert response.headers["content-type"].encode() == TYPES[Path(name or "index.html").suffix]
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "connect", "img")} == {"'self'"}
    assert policy["require-trusted-types-for"] == "'script'"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert not door.serving.calls


@pytest.mark.parametrize("path", ["/", "/console"])
async def test_other_addresses_lead_to_the_page(door: Rig, path: str) -> None:
    response = await door.client.get(path)
    assert (response.status_code, response.headers["location"]) == (307, "/console/")


@pytest.mark.parametrize(
    "path", ["/console/../serve.py", "/console/%2e%2e/serve.py", "/console//app.js", "/console/APP.JS", "/console/x.js"]
)
async def test_there_are_no_other_files(door: Rig, path: str) -> None:
    assert status(await raw(door, http(f"GET {path} HTTP/1.1"))) == 404


async def test_the_page_of_a_stranger_gets_nothing(door: Rig) -> None:
    assert status(await raw(door, http("GET /console/ HTTP/1.1", host="evil.example"))) == 421
    assert status(await raw(door, http("POST /console/ HTTP/1.1", "Content-Type: application/json"))) == 405
    answer = await raw(door, http(f"POST {LIVE} HTTP/1.1", "Content-Type: text/plain", body=b"{}"))
    assert status(answer) == 415


def test_the_page_parses_no_text_and_asks_nobody_else() -> None:
    """Nothing of a model's, a label's or a policy's text can become markup, and no other host is named."""
    for path in FOLDER.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", text), path
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|style=|<script>|javascript:", text), path


async def test_methods_answer_as_over_grpc_and_name_fields_of_the_contract(door: Rig) -> None:
    answer = await door.post("/rudder.v1.InferenceService/Tokenize", {"prompt": {"text": "cells"}})
    assert answer.status_code == 200
    assert "".join(answer.json()["token_texts"]) == "<|bos|>cells"
    assert answer.headers["x-request-id"] == answer.json()["request_id"]
    assert door.ended("InferenceService.Tokenize", "OK") == 1
    unknown = await door.post("/rudder.v1.FeatureService/Search", {"bundle": "b", "query": "x"})
    error = unknown.json()["error"]
    assert (unknown.status_code, error["code"], error["param"]) == (404, "FEATURE_UNKNOWN", "bundle")
    for document, field in (
        ({"prompt": {"txt": "x"}}, "prompt.txt"), ({"propmt": 1}, "propmt"), ({"prompt": {"text": 5}}, "prompt.text"),
    ):  # fmt: skip
        refused = await door.post("/rudder.v1.InferenceService/Tokenize", document)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "FIELD_INVALID"), field
        assert field.rpartition(".")[2] in refused.text
    assert (await door.client.post("/rudder.v1.PolicyService/Apply", json={})).status_code == 404


async def test_inspect_goes_through_the_hold_back(door: Rig) -> None:
    answer = await door.post("/rudder.v1.InferenceService/Inspect", {"prompt": {"token_ids": {"ids": [5, 6]}}})
    assert answer.status_code == 200, answer.text
    document = answer.json()
    assert document["token_ids"] == [5, 6]
    assert document["attestation"]["request_id"] == document["request_id"]
    assert door.ended("InferenceService.Inspect", "OK") == 1


async def test_each_method_needs_its_role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "LIVE_S", 0.0)
    token, entry = tokens.create("someone", ["generate"])
    (tmp_path / "tokens.yaml").write_bytes(tokens.write(TokenFile((entry,))))
    async with Rig({"identity.tokens": str(tmp_path / "tokens.yaml")}) as rig:
        for path in ("/rudder.v1.InferenceService/Inspect", "/rudder.v1.PolicyService/List", LIVE):
            denied = await rig.post(path, {}, authorization=f"Bearer {token}")
            assert (denied.status_code, denied.json()["error"]["code"]) == (403, "ROLE_MISSING"), path
        explained = await rig.post("/rudder.v1.PolicyService/Explain", {}, authorization=f"Bearer {token}")
        assert explained.status_code == 200
        assert (await rig.client.get("/console/")).status_code == 200


async def test_live_figures_come_until_the_server_drains(door: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "LIVE_INTERVAL_S", 0.01)
    bank = door.serving.metrics.bank
    bank.usage = lambda: BankUsage([SiteUsage("s", 1, 3)], 1, 7, 2, 5)
    door.serving.metrics.features.pinned = Pinned(
        [PinnedFeature("b", "s", 4, "<b>")], [0], [FeatureTotals(2, 8, 3.0, 2.0)]
    )
    await door.complete(max_tokens=1)
    async with door.client.stream("POST", LIVE, json={}) as response:
        lines = response.aiter_lines()
        figures = json.loads((await anext(lines)).removeprefix("data: "))
        door.serving.draining = True
        async for _ in lines:
            pass
    assert (figures["running"], figures["waiting"], figures["slots"]) == (2, 5, {"used": 1, "free": 7})
    assert figures["rows"] == [{"site": "s", "used": 1, "free": 3, "reserved": 0}]
    (feature,) = figures["features"]
    assert (feature["index"], feature["label"], feature["active_tokens"]) == (4, "<b>", 2)
    assert figures["calls"] == {"OK": 1}
    assert not door.serving.calls


async def test_a_live_stream_ends_after_its_time(door: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a caller whose credentials have ended does not watch for ever."""
    monkeypatch.setattr(methods, "LIVE_S", 0.0)
    response = await door.post(LIVE, {})
    assert len(events(response)) == 1
    assert SimpleNamespace(**events(response)[0]).draining is False
    assert door.ended("Live.Watch", "OK") == 1
