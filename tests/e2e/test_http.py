"""The HTTP door of a real server, by OpenAI's client: the same answers as over gRPC, steering, policies, forgery."""

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from rudder.v1 import policy_pb2
from rudder_client import Client
from rudder_client.requests import Chat
from tests.e2e.conftest import Running
from tests.e2e.test_policies import LATENT, SITE, message

pytestmark = pytest.mark.e2e
PROMPT = "The cell membrane"
MESSAGES: Any = [{"role": "user", "content": "What is a cell?"}]
SET = {"sites": [{"site": SITE, "edits": [{"row": {"feature": {"index": LATENT}}, "set": 40.0}]}]}
# Of vLLM's own app, and of Rudder's gRPC services: none of them is here.
OTHER_PATHS = ("/pause", "/tokenize", "/load", "/invocations", "/v1/embeddings", "/v1/messages", "/metrics", "/docs")


@pytest.fixture(scope="module")
def model(server: Running) -> str:
    return httpx.get(f"{server.http}/models").json()["data"][0]["id"]  # type: ignore[no-any-return]


@pytest.fixture
def openai_client(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.http, api_key="none", timeout=60, max_retries=0) as connected:
        yield connected
    server.wait_idle()


def test_answers_are_those_of_the_other_door(
    openai_client: OpenAI, client: Client, model: str, server: Running
) -> None:
    assert client.model().model == model
    whole = client.complete(PROMPT, max_tokens=8, temperature=0.0, logprobs=2)
    answer = openai_client.completions.create(model=model, prompt=PROMPT, max_tokens=8, temperature=0, logprobs=2)
    choice, logprobs = answer.choices[0], whole.choices[0].logprobs
    assert choice.text == whole.choices[0].text
    assert choice.logprobs
    assert choice.logprobs.token_logprobs
    assert logprobs
    assert choice.logprobs.token_logprobs == pytest.approx(list(logprobs.chosen), abs=1e-4)
    assert "".join(choice.logprobs.tokens or ()) == choice.text
    chat = openai_client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=8, temperature=0)
    assert chat.choices[0].message.content == client.complete(Chat(MESSAGES), max_tokens=8, temperature=0.0).text
    response = openai_client.responses.create(
        model=model, input=MESSAGES[0]["content"], max_output_tokens=8, temperature=0
    )
    assert response.output_text == chat.choices[0].message.content
    assert f"http={server.http}" in server.log_line("serve: serving ")


def test_a_stream_has_the_text_of_the_whole_answer(openai_client: OpenAI, model: str) -> None:
    fields: Any = {"model": model, "messages": MESSAGES, "max_tokens": 30, "temperature": 0, "logprobs": True, "n": 2}
    whole = openai_client.chat.completions.create(**fields)
    chunks = list(openai_client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        tokens = [entry.token for part in parts if part.logprobs for entry in part.logprobs.content or ()]
        assert choice.logprobs
        assert tokens == [entry.token for entry in choice.logprobs.content or ()]
        assert [part.finish_reason for part in parts if part.finish_reason] == [choice.finish_reason]
    assert chunks[-1].usage
    assert whole.usage
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_stop_seed_and_form_of_the_output(openai_client: OpenAI, model: str) -> None:
    fields: Any = {"model": model, "prompt": PROMPT, "max_tokens": 12}
    first, second = (openai_client.completions.create(**fields, seed=7).choices[0].text for _ in range(2))
    assert first == second
    text = openai_client.completions.create(**fields, temperature=0).choices[0].text
    stopped = openai_client.completions.create(**fields, temperature=0, stop=text[4:8]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(text[4:8])], "stop")
    schema = {"enum": ["blue", "green"]}
    form: Any = {"type": "json_schema", "json_schema": {"name": "colour", "schema": schema, "strict": True}}
    answer = openai_client.chat.completions.create(
        model=model, messages=MESSAGES, response_format=form, max_tokens=40, temperature=0
    )
    assert json.loads(answer.choices[0].message.content or "") in ("blue", "green")
    chosen = openai_client.completions.create(
        **fields, extra_body={"structured_outputs": {"choice": ["blue", "green"]}}
    )
    assert chosen.choices[0].text in ("blue", "green")


def test_a_program_steers_and_is_attested(openai_client: OpenAI, client: Client, model: str) -> None:
    features = [{"site": SITE, "row": {"feature": {"index": LATENT}}}]
    rudder = {"program": SET, "report": {"features": features, "top_k": 2, "pooled": True}}
    fields: Any = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    plain = openai_client.completions.create(**fields).choices[0]
    steered = openai_client.completions.create(**fields, extra_body={"rudder": rudder})
    choice: Any = steered.choices[0]
    assert choice.text != plain.text
    (edit,) = choice.rudder["attestation"]["edits"]
    assert (edit["origin"], edit["site"], edit["tokens_touched"] > 0) == ("request", SITE, True)
    assert steered.model_extra
    assert steered.model_extra["rudder"]["features"][0]["index"] == LATENT
    assert choice.rudder["activations"]["positions"]
    raw = openai_client.completions.with_raw_response.create(**fields, extra_body={"rudder": rudder})
    assert raw.headers["x-rudder-program-digest"] == choice.rudder["attestation"]["program_digest"]
    named = client.programs()[0].name
    assert openai_client.completions.create(**fields, extra_body={"rudder": {"program": named}}).choices[0].text


@pytest.fixture
def version(client: Client) -> Iterator[int]:
    """A version that no policy has had; what is applied in a test is emptied behind it."""
    first = 1 + max((policy.version for policy in client.policies()), default=0)
    yield first
    client.apply(policy_pb2.Policy(name="low", version=first + 100))


def guard(level: float, action: str) -> dict[str, Any]:
    """A guard that holds from the tenth token on, if `level` is low."""
    score = {"terms": [{"site": SITE, "row": {"probe": {"weights": [1.0] * 192}}, "weight": 1}]}
    return {"name": "long", "score": score, "level": level, "min_tokens": 10, "action": f"GUARD_ACTION_{action}"}


def test_a_policy_binds_this_door_too(openai_client: OpenAI, client: Client, model: str, version: int) -> None:
    """Forged fields change nothing of it: each is refused, or the policy acts and says so."""
    client.apply(message(client, version=version, forbidden_fields=["sampling.n"]))
    fields: Any = {"model": model, "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    bound: Any = openai_client.completions.create(**fields).choices[0]
    assert bound.text == client.complete(PROMPT, max_tokens=4, temperature=0.0).choices[0].text
    # What the policy's edits counted is for readers of guards.
    (applied,) = bound.rudder["attestation"]["policies"]
    assert (applied["withheld"], bound.rudder["attestation"]["edits"]) == (True, [])
    with pytest.raises(openai.PermissionDeniedError) as denied:
        openai_client.completions.create(**fields, n=2)
    assert (denied.value.code, denied.value.param) == ("POLICY_FORBIDS", "n")
    with pytest.raises(openai.PermissionDeniedError) as locked:
        openai_client.completions.create(**fields, extra_body={"rudder": {"program": SET}})
    assert locked.value.param
    assert locked.value.param.startswith("rudder.program")
    forgeries: list[dict[str, Any]] = [
        {"vllm_xargs": {"rudder": "x"}}, {"extra_args": {}}, {"kv_transfer_params": {}}, {"request_id": "x"},
        {"priority": -1}, {"prompt_embeds": "AA"}, {"chat_template": "{{ 1 }}"}, {"n": 10**9},
        {"prompt": ["a"] * 100_000},
    ]  # fmt: skip
    for forged in forgeries:
        with pytest.raises(openai.BadRequestError) as refused:
            openai_client.completions.create(**fields, extra_body=forged)
        assert refused.value.param == next(iter(forged))
    headers = {"x-request-id": "forged", "x-rudder-policy": "none", "x-session-id": "x", "x-data-parallel-rank": "9"}
    for harmless in ({"cache_salt": "0" * 64}, {"user": "admin"}, {"store": True}, {"metadata": {"policy": "none"}}):
        again: Any = openai_client.completions.create(**fields, extra_body=harmless, extra_headers=headers).choices[0]
        assert (again.text, again.rudder["attestation"]["policy_digest"]) == (
            bound.text, bound.rudder["attestation"]["policy_digest"],
        )  # fmt: skip
        assert again.rudder["attestation"]["request_id"] != "forged"


def test_a_refusal_is_a_content_filter(openai_client: OpenAI, client: Client, model: str, version: int) -> None:
    client.apply(message(client, version=version, program=None, guards=[guard(-1e9, "REJECT")], refusal="Not here."))
    fields: Any = {"model": model, "messages": [{"role": "user", "content": PROMPT * 5}], "max_tokens": 4}
    answer: Any = openai_client.chat.completions.create(**fields).choices[0]
    assert (answer.finish_reason, answer.message.refusal) == ("content_filter", "Not here.")
    assert (answer.message.content, answer.rudder["refusal"]["rule"]) == (None, "long")
    chunks = list(openai_client.chat.completions.create(**fields, stream=True))
    last: Any = chunks[-1].choices[0]
    assert (last.finish_reason, last.delta.refusal) == ("content_filter", "Not here.")
    assert not "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    response = openai_client.responses.create(model=model, input=PROMPT * 5, max_output_tokens=4)
    assert response.incomplete_details
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "content_filter")


def test_an_answer_is_held_back_until_it_is_judged(
    openai_client: OpenAI, client: Client, model: str, version: int
) -> None:
    stop = guard(-1e9, "STOP") | {"phase": "PHASE_GENERATED", "hold_back": 2}
    client.apply(message(client, version=version, program=None, guards=[stop], refusal="Not here."))
    fields: Any = {
        "model": model,
        "prompt": PROMPT,
        "max_tokens": 60,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.complete(PROMPT, max_tokens=60, temperature=0.0, ignore_eos=True)
    parts = [chunk.choices[0] for chunk in openai_client.completions.create(**fields, stream=True)]
    assert parts[-1].finish_reason == "content_filter"
    assert "".join(part.text for part in parts) == whole.choices[0].text
    assert whole.refusal


def test_other_paths_are_not_served(server: Running) -> None:
    base = server.http.removesuffix("/v1")
    assert {httpx.post(base + path, json={}).status_code for path in OTHER_PATHS} == {404}
    assert httpx.get(f"{base}/health").json() == {"status": "serving"}


def test_curl_is_a_client(server: Running, model: str) -> None:
    body = json.dumps({"model": model, "prompt": PROMPT, "max_tokens": 3, "stream": True})
    command = ["curl", "-sN", f"{server.http}/completions", "-H", "Content-Type: application/json", "-d", body]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert output.endswith("data: [DONE]\n\n")
