"""What surrounds a call at the HTTP door: routes, credentials, body, errors, clients that go away or do not read."""

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from rudder.server import config
from rudder.server.caller import Quotas
from rudder.server.config import ConfigError
from rudder.server.engine.call import FinishReason
from rudder.server.http import listener
from rudder.server.http.answers import STREAMED, WHOLE
from rudder.server.http.app import ENDPOINTS, MODELS_METHOD, ROUTES
from rudder.server.http.methods import LIVE_METHOD
from rudder.server.http.server import HttpDoor
from rudder.server.identity import tokens
from rudder.server.identity.roles import METHODS
from rudder.server.identity.tokens import TokenFile
from rudder.server.serve import drain
from tests.unit.server.grpc.test_server import access_fields
from tests.unit.server.http.rig import Rig, events

COMPLETION = json.dumps({"model": "m", "prompt": [5, 6], "max_tokens": 2}).encode()


@pytest.fixture
async def door() -> AsyncIterator[Rig]:
    async with Rig() as rig:
        yield rig


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def raw(rig: Rig, content: bytes) -> bytes:
    """Send bytes on a connection of their own, and return all that comes until the server closes it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(rig.address.rpartition(":")[2]))
    writer.write(content)
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    return answer


def http(line: str, *headers: str, body: bytes = b"", host: str = "localhost") -> bytes:
    lines = [line, f"Host: {host}", "Connection: close", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize(
    "line",
    [
        "GET /v1/models/ HTTP/1.1",
        "GET //v1/models HTTP/1.1",
        "GET /v1//models HTTP/1.1",
        "GET /V1/Models HTTP/1.1",
        "GET /v1/%6dodels HTTP/1.1",
        "GET /v1%2fmodels HTTP/1.1",
        "GET /v1/../v1/models HTTP/1.1",
        "GET /x/../v1/models HTTP/1.1",
        "GET /v1/models;x HTTP/1.1",
        "GET http://localhost/v1/models HTTP/1.1",
        "GET /metrics HTTP/1.1",
        "GET /version HTTP/1.1",
        "GET /docs HTTP/1.1",
        "GET /openapi.json HTTP/1.1",
        "POST /tokenize HTTP/1.1",
        "POST /pause HTTP/1.1",
        "POST /invocations HTTP/1.1",
        "POST /abort_requests HTTP/1.1",
        "POST /v1/load_lora_adapter HTTP/1.1",
        "POST /v1/embeddings HTTP/1.1",
        "GET /v1/responses/resp_1 HTTP/1.1",
    ],
)
async def test_what_is_not_a_route_is_nothing(door: Rig, line: str) -> None:
    answer = await raw(door, http(line, "Content-Type: application/json", body=COMPLETION))
    assert status(answer) == 404
    assert not door.serving.calls


@pytest.mark.parametrize("method", ["OPTIONS", "HEAD", "PUT", "DELETE", "TRACE", "CONNECT", "PATCH"])
@pytest.mark.parametrize("path", sorted(path.decode() for path in ROUTES))
async def test_each_route_has_one_method(door: Rig, method: str, path: str) -> None:
    answer = await raw(door, http(f"{method} {path} HTTP/1.1"))
    assert status(answer) == 405
    assert b"access-control" not in answer.lower()


async def test_websocket_upgrade_is_no_way_in(door: Rig) -> None:
    answer = await raw(door, http("GET /v1/chat/completions HTTP/1.1", "Upgrade: websocket", "Connection: Upgrade"))
    assert status(answer) == 405


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[tuple[Rig, dict[str, str]]]:
    """A door that asks for tokens, and one token for each role."""
    file, issued = TokenFile(), dict[str, str]()
    for role in ("generate", "observe"):
        issued[role], entry = tokens.create(role, [role])
        file = TokenFile((*file.tokens, entry))
    path = tmp_path / "tokens.yaml"
    path.write_bytes(tokens.write(file))
    async with Rig({"identity.tokens": str(path)}) as rig:
        yield rig, issued


@pytest.mark.parametrize("path", sorted(path.decode() for path in ROUTES if path != b"/health"))
@pytest.mark.parametrize(
    "line",
    [
        None, "Authorization: Bearer", "Authorization: Basic cnVkZGVyOng=", "Authorization: Bearer rudder.x.y",
        "Authorization: Bearer " + "x" * 9000, "X-Api-Key: {token}", "Cookie: token={token}",
    ],
)  # fmt: skip
async def test_without_a_valid_token_nobody_calls(
    guarded: tuple[Rig, dict[str, str]], path: str, line: str | None
) -> None:
    rig, issued = guarded
    headers = ["Content-Type: application/json", *([line.format(token=issued["generate"])] if line else [])]
    for host, version in (("localhost", "1.1"), ("evil.example", "1.1"), ("/v1/models", "1.0"), ("", "1.0")):
        request = f"{ROUTES[path.encode()]} {path}?token={issued['generate']} HTTP/{version}"
        answer = await raw(rig, http(request, *headers, body=COMPLETION, host=host))
        assert status(answer) == 401, answer
        assert b"www-authenticate: Bearer" in answer
    twice = [f"Authorization: Bearer {issued['generate']}"] * 2
    assert status(await raw(rig, http(f"{ROUTES[path.encode()]} {path} HTTP/1.1", *headers, *twice, body=b"{}"))) == 401


async def test_roles_are_those_of_the_contract(guarded: tuple[Rig, dict[str, str]]) -> None:
    rig, issued = guarded
    allowed = (
        await rig.complete(max_tokens=1),
        await rig.post("/v1/completions", json.loads(COMPLETION), authorization=f"Bearer {issued['generate']}"),
    )
    assert [response.status_code for response in allowed] == [401, 200]
    denied = await rig.post("/v1/completions", json.loads(COMPLETION), authorization=f"Bearer {issued['observe']}")
    assert (denied.status_code, denied.json()["error"]["code"]) == (403, "ROLE_MISSING")
    models = await rig.client.get("/v1/models", headers={"authorization": f"Bearer {issued['observe']}"})
    assert [entry["id"] for entry in models.json()["data"]] == ["m"]
    # A stream is known as such once its body is read, which is after the role was required.
    assert METHODS[STREAMED] == METHODS[WHOLE]
    assert {STREAMED, WHOLE, MODELS_METHOD, LIVE_METHOD} <= METHODS.keys()


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "10.0.0.1", "", "[::2]:1"]
)
async def test_the_name_of_a_stranger_does_not_mean_this_machine(door: Rig, host: str) -> None:
    assert status(await raw(door, http("GET /v1/models HTTP/1.1", host=host))) == 421
    for own in ("localhost", "127.0.0.1:8000", "[::1]:8000"):
        assert status(await raw(door, http("GET /v1/models HTTP/1.1", host=own))) == 200


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        (["Content-Type: text/plain"], 415),
        (["Content-Type: application/x-www-form-urlencoded"], 415),
        ([], 415),
        (["Content-Type: application/json", "Content-Encoding: gzip"], 415),
        (["Content-Type: Application/JSON; charset=utf-8"], 200),
    ],
)
async def test_a_form_is_no_request(door: Rig, headers: list[str], expected: int) -> None:
    answer = await raw(door, http("POST /v1/completions HTTP/1.1", *headers, body=COMPLETION))
    assert status(answer) == expected


async def test_a_body_has_a_length(door: Rig) -> None:
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    request = "\r\n".join([*lines, "Transfer-Encoding: chunked", "", "2", "{}", "0", "", ""]).encode()
    assert status(await raw(door, request)) == 411
    both = request.replace(b"Transfer", b"Content-Length: 2\r\nTransfer")
    assert status(await raw(door, both)) in (400, 411)


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"model": "\\ud800", "prompt": "x"}', b'"x"']
)
async def test_what_is_no_json_object_is_refused(door: Rig, body: bytes) -> None:
    for path in ENDPOINTS:
        line = f"POST {path.decode()} HTTP/1.1"
        answer = await raw(door, http(line, "Content-Type: application/json", body=body))
        assert status(answer) == 400, answer
        assert b'"code":"FIELD_INVALID"' in answer


async def test_a_body_beyond_the_limit_is_refused_unread() -> None:
    async with Rig({"limits.max_message_bytes": "2000"}) as rig:
        response = await rig.complete(stop=["s" * 3000])
        assert (response.status_code, response.json()["error"]["code"]) == (413, "MESSAGE_TOO_LARGE")
        # Also where it is more than all requests in progress may have: to try again would not help.
        line = http("POST /v1/completions HTTP/1.1", "Content-Type: application/json")
        assert status(await raw(rig, line.replace(b"Content-Length: 0", b"Content-Length: 99999999999"))) == 413
        assert rig.ended(WHOLE, "MESSAGE_TOO_LARGE") == 2
        assert (await rig.complete(max_tokens=1)).status_code == 200


async def test_a_length_that_is_announced_and_never_sent_uses_up_no_quota(tmp_path: Path) -> None:
    token, entry = tokens.create("app", ["generate"], quotas=Quotas(request_bytes=20_000))
    (tmp_path / "tokens.yaml").write_bytes(tokens.write(TokenFile((entry,))))
    flags = {"limits.max_message_bytes": "2000", "identity.tokens": str(tmp_path / "tokens.yaml")}
    async with Rig(flags) as rig:
        authorized = f"Authorization: Bearer {token}"
        line = http("POST /v1/completions HTTP/1.1", "Content-Type: application/json", authorized)
        assert status(await raw(rig, line.replace(b"Content-Length: 0", b"Content-Length: 99999999999"))) == 413
        headers = {"authorization": f"Bearer {token}"}
        assert (await rig.post("/v1/completions", json.loads(COMPLETION), **headers)).status_code == 200


async def test_requests_in_progress_share_the_budget_in_bytes() -> None:
    async with Rig({"limits.max_pending_bytes": "1024"}) as rig:
        response = await rig.complete(stop=["s" * 1024])
        assert (response.status_code, response.json()["error"]["code"]) == (429, "QUEUE_FULL")
        assert response.headers["retry-after-ms"] == "1000"
        assert response.headers["retry-after"] == "1"
        assert rig.serving.pending.used == 0


async def test_a_body_that_does_not_come_is_given_up() -> None:
    async with Rig({"limits.write_timeout_s": "0.2"}) as rig:
        answer = await raw(
            rig, http("POST /v1/completions HTTP/1.1", "Content-Type: application/json", body=COMPLETION)[:-5]
        )
        assert status(answer) == 408
        assert rig.ended(WHOLE, "CLIENT_TOO_SLOW") == 1


async def test_connections_without_a_request_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "IDLE_S", 0.2)
    async with Rig() as rig:
        assert await raw(rig, b"") == b""
        assert await raw(rig, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n") == b""
        assert await raw(rig, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: " + b"x" * 100_000) != b""
        await until(lambda: not rig.door.listener.state.connections)


async def test_a_body_that_nobody_asked_for_holds_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "IDLE_S", 0.3)
    async with Rig() as rig:
        rig.door.listener.config.timeout_keep_alive = 0.3  # type: ignore[assignment]
        _, writer = await asyncio.open_connection("127.0.0.1", int(rig.address.rpartition(":")[2]))
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
        await until(lambda: rig.door.listener.state.connections)
        async with asyncio.timeout(10):
            while rig.door.listener.state.connections:
                writer.write(b"x")
                await asyncio.sleep(0.02)
        writer.close()


async def test_the_time_for_a_request_ends_with_its_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "IDLE_S", 0.5)
    async with Rig() as rig:
        rig.engine.stall_after = 1
        content = http("POST /v1/completions HTTP/1.1", "Content-Type: application/json", body=COMPLETION)
        _, writer = await asyncio.open_connection("127.0.0.1", int(rig.address.rpartition(":")[2]))
        for part in (content[:20], content[20:40], content[40:]):
            writer.write(part)
            await asyncio.sleep(0.05)
        await until(lambda: rig.serving.calls)
        await asyncio.sleep(0.7)
        assert rig.serving.calls
        writer.close()
        await until(lambda: not rig.serving.calls)


async def test_identifiers_of_a_call(door: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rudder")
    response = await door.post("/v1/completions", json.loads(COMPLETION), **{"x-request-id": "order-7"})
    (line,) = access_fields(caplog)
    assert (line["method"], line["correlation_id"], line["outcome"]) == (WHOLE, "order-7", "OK")
    assert response.headers["x-request-id"] == line["request_id"] == response.json()["rudder"]["request_id"]
    assert response.json()["id"] == f"cmpl-{line['request_id']}"
    assert response.headers["x-rudder"] == "1"


@pytest.mark.parametrize("streams", [True, False])
async def test_a_client_that_goes_away_ends_its_call(
    door: Rig, caplog: pytest.LogCaptureFixture, streams: bool
) -> None:
    caplog.set_level(logging.INFO, "rudder")
    door.engine.stall_after = 2
    body = json.dumps({"model": "m", "prompt": [5], "max_tokens": 9, "stream": streams}).encode()
    _, writer = await asyncio.open_connection("127.0.0.1", int(door.address.rpartition(":")[2]))
    writer.write(http("POST /v1/completions HTTP/1.1", "Content-Type: application/json", body=body))
    await until(lambda: door.registry.get_sample_value("rudder_stream_messages_total") == 2)
    writer.close()
    await until(lambda: access_fields(caplog))
    (line,) = access_fields(caplog)
    assert (line["outcome"], line["finish"], line["generated_tokens"]) == ("CANCELLED", ["abort"], 2)
    assert not door.serving.calls
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("streams", [True, False])
async def test_the_end_of_an_answer_does_not_end_what_follows_it(
    door: Rig, monkeypatch: pytest.MonkeyPatch, streams: bool
) -> None:
    """The entry of the audit log is waited for behind the answer, when the server says that the client has gone."""
    written = asyncio.Event()

    async def audit(*_: Any) -> None:
        await asyncio.sleep(0.1)
        written.set()

    monkeypatch.setattr("rudder.server.service.call.audit", audit)
    assert (await door.complete(max_tokens=2, stream=streams)).status_code == 200
    async with asyncio.timeout(10):
        await written.wait()
    assert door.ended(STREAMED if streams else WHOLE, "OK") == 1


async def test_a_client_that_goes_away_before_its_body_is_there(door: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rudder")
    _, writer = await asyncio.open_connection("127.0.0.1", int(door.address.rpartition(":")[2]))
    writer.write(http("POST /v1/completions HTTP/1.1", "Content-Type: application/json", body=COMPLETION)[:-5])
    await until(lambda: door.serving.calls)
    writer.close()
    await until(lambda: access_fields(caplog))
    assert [line["outcome"] for line in access_fields(caplog)] == ["CANCELLED"]


async def test_a_client_that_does_not_read_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rudder")
    flags = {"limits.write_timeout_s": "0.3", "stream.message_budget_per_s": "1e9"}
    async with Rig(flags, max_model_len=10_000_000) as rig:
        connection = socket.create_connection(("127.0.0.1", int(rig.address.rpartition(":")[2])))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({"model": "m", "prompt": [5], "max_tokens": 1_000_000, "stream": True}).encode()
        connection.sendall(http("POST /v1/completions HTTP/1.1", "Content-Type: application/json", body=body))
        await until(lambda: access_fields(caplog))
        assert [line["outcome"] for line in access_fields(caplog)] == ["CLIENT_TOO_SLOW"]
        await until(lambda: not rig.door.listener.state.connections)
        connection.close()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_connections_are_bounded(door: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert door.door.listener.config.limit_concurrency == 1024 + 128 + 1024
    monkeypatch.setattr(door.door.listener.config, "limit_concurrency", 2)
    held = [await asyncio.open_connection("127.0.0.1", int(door.address.rpartition(":")[2])) for _ in range(2)]
    assert status(await raw(door, http("GET /v1/models HTTP/1.1"))) == 503
    for _, writer in held:
        writer.close()


async def test_health_is_for_all_and_says_whether_to_call(guarded: tuple[Rig, dict[str, str]]) -> None:
    rig, _ = guarded
    assert (await rig.client.get("/health")).status_code == 503
    await rig.door.set_serving(True)
    assert (await rig.client.get("/health")).status_code == 200


async def test_a_draining_server_refuses_calls(door: Rig) -> None:
    door.serving.draining = True
    response = await door.complete(max_tokens=1)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "DRAINING")
    assert response.json()["error"]["type"] == "server_error"
    # OpenAI's clients try again by themselves, perhaps at another replica.
    assert "x-should-retry" not in response.headers


async def test_calls_that_the_end_of_a_drain_cuts_off_say_so(door: Rig) -> None:
    door.engine.stall_after = 1
    streamed = asyncio.create_task(door.complete(max_tokens=9, stream=True))
    whole = asyncio.create_task(door.complete(max_tokens=9))
    await until(lambda: door.serving.pace.streams == 2)
    await until(lambda: door.registry.get_sample_value("rudder_stream_messages_total") == 2)
    async with asyncio.timeout(10):
        await drain([door.door], door.serving, 0.1, asyncio.get_running_loop().create_future())
    response = await whole
    assert (response.status_code, response.json()["error"]["code"]) == (503, "DRAINING")
    *_, error, done = events(await streamed)
    assert (error["error"]["code"], done) == ("DRAINING", "[DONE]")
    assert not door.serving.calls


async def test_what_is_unexpected_stays_in_the_log(door: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr("rudder.server.service.inference.run_whole", fail)
    response = await door.complete(max_tokens=1)
    assert (response.status_code, response.json()["error"]["message"]) == (500, "internal error")
    assert "secret" not in response.text + str(response.headers)
    assert response.headers["x-should-retry"] == "false"


async def test_an_answer_that_the_engine_cut_off_is_an_error(door: Rig) -> None:
    door.engine.finish_reason = FinishReason.ABORT
    assert (await door.complete(max_tokens=2)).json()["error"]["code"] == "ENGINE_DEAD"
    door.engine.finish_reason = FinishReason.ERROR
    assert (await door.complete(max_tokens=2)).json()["error"]["code"] == "INTERNAL"
    *_, error, done = events(await door.complete(max_tokens=2, stream=True))
    assert (error["error"]["code"], done) == ("INTERNAL", "[DONE]")


async def test_a_port_in_use_is_a_configuration_error(door: Rig) -> None:
    port = int(door.address.rpartition(":")[2])
    with pytest.raises(ConfigError, match=r"listen\.http_port: cannot listen on"):
        await HttpDoor(door.serving_at(port)).start()


def test_the_door_is_closed_unless_it_is_asked_for() -> None:
    assert config.Config().listen.http_port is None
