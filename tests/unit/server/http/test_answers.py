"""Answers, read by OpenAI's own client: whole, as streams, refused, failed; and what each has beyond the API."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response

from rudder.server.caller import ANONYMOUS
from rudder.server.engine.call import FinishReason
from rudder.server.http.answers import REFUSED, Call
from rudder.server.http.chat import ChatAnswer
from rudder.server.http.completions import CompletionAnswer
from rudder.server.http.responses import ResponseAnswer
from rudder.server.http.usage import TokenTexts, bounded
from rudder.server.monitoring.traces import Correlation
from rudder.server.service.errors import Refusal
from rudder.server.service.record import CallRecord, ChoiceRecord
from rudder.v1 import inference_pb2
from tests.unit.server.http.rig import Rig, events
from tests.unit.server.http.test_app import until
from tests.unit.server.service.test_prompt import TOKENIZER

MESSAGES: Any = [{"role": "user", "content": "cells"}]
REFUSAL = inference_pb2.PolicyRefusal(policy="p", rule="r", text="Not here.", position=3)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with Rig() as started:
        yield started


@pytest.fixture
async def client(rig: Rig) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{rig.address}/v1", api_key="none", max_retries=0, timeout=30) as connected:
        yield connected


def extension(document: Any) -> dict[str, Any]:
    """Return the field `rudder` of a document that OpenAI's client has read."""
    found: dict[str, Any] = document.model_extra["rudder"]
    return found


async def test_models(client: AsyncOpenAI) -> None:
    assert [model.id async for model in await client.models.list()] == ["m"]


async def test_a_chat_whole(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="m", messages=MESSAGES, max_completion_tokens=3, n=2, seed=1)
    assert [choice.message.content for choice in answer.choices] == ["xxx", "xxx"]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (4, 6, 10)
    assert answer._request_id == extension(answer)["request_id"]
    attestation = extension(answer.choices[0])["attestation"]
    assert (attestation["tokens_seen"], attestation["engine_epoch"]) == (3, "e1")
    ChatCompletion.model_validate(answer.model_dump(), strict=True)


async def test_a_chat_as_a_stream(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="m", messages=MESSAGES, max_tokens=3, n=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", "assistant"]
    assert (chunks[-1].choices, chunks[-1].usage and chunks[-1].usage.completion_tokens) == ([], 6)
    for index in (0, 1):
        own = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in own) == "xxx"
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + ["length"]
        assert extension(own[-1])["attestation"]["tokens_seen"] == 3
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1


async def test_the_streaming_helper_reads_a_chat(rig: Rig, client: AsyncOpenAI) -> None:
    rig.engine.finish_reason = FinishReason.STOP
    async with client.chat.completions.stream(model="m", messages=MESSAGES, max_tokens=3) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "xxx"
    # The first has the role, and no text.
    assert kinds.count("content.delta") == 4


async def test_usage_with_every_chunk(rig: Rig) -> None:
    response = await rig.chat(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    *chunks, last, done = events(response)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks[1:]] == [1, 2, 3]
    assert (last["usage"]["completion_tokens"], done) == (3, "[DONE]")


async def test_a_completion(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="m", prompt=[5, 6], max_tokens=3)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("xxx", "length")
    stream = await client.completions.create(model="m", prompt=[5, 6], max_tokens=3, stream=True)
    chunks = [chunk async for chunk in stream]
    assert ["".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason] == [
        "xxx",
        "length",
    ]


async def test_a_response(client: AsyncOpenAI) -> None:
    answer = await client.responses.create(model="m", input="cells", max_output_tokens=3)
    assert (answer.output_text, answer.status) == ("xxx", "incomplete")
    assert answer.incomplete_details
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (4, 3)
    assert extension(answer)["attestation"]["tokens_seen"] == 3
    Response.model_validate(answer.model_dump(), strict=True)


async def test_a_response_as_a_stream(rig: Rig, client: AsyncOpenAI) -> None:
    stream = await client.responses.create(model="m", input="cells", max_output_tokens=2, stream=True)
    received = [event async for event in stream]
    assert [event.sequence_number for event in received] == list(range(len(received)))
    assert [event.type for event in received] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        "response.output_text.delta", "response.output_text.delta", "response.output_text.done",
        "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    last: Any = received[-1]
    assert last.response.output_text == "xx"
    rig.engine.finish_reason = FinishReason.STOP
    async with client.responses.stream(model="m", input="cells", max_output_tokens=2) as helper:
        async for _ in helper:
            pass
        assert (await helper.get_final_response()).output_text == "xx"


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model": "other"}, openai.BadRequestError),
        ({"extra_body": {"vllm_xargs": {"a": 1}}}, openai.BadRequestError),
        ({"extra_body": {"rudder": {"program": "none"}}}, openai.NotFoundError),
        ({"n": 1000}, openai.BadRequestError),
    ],
)
async def test_errors_are_those_of_the_client(client: AsyncOpenAI, fields: dict[str, Any], error: Any) -> None:
    for stream in (False, True):
        with pytest.raises(error) as caught:
            await client.chat.completions.create(**{"model": "m", "messages": MESSAGES} | fields, stream=stream)
        assert caught.value.param
        assert caught.value.request_id


async def test_the_client_tries_again_where_that_helps(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [
        Refusal("QUEUE_FULL", "full", retry_after_s=0.01),
        Refusal("DRAINING", "drains"),
        Refusal("INTERNAL", "internal error"),
    ]
    real = rig.serving.authenticator.__class__.caller

    def fails_at_first(*arguments: Any) -> Any:
        if failures:
            raise failures.pop(0)
        return real(*arguments)

    monkeypatch.setattr(rig.serving.authenticator.__class__, "caller", fails_at_first)
    async with AsyncOpenAI(base_url=f"{rig.address}/v1", api_key="none", max_retries=5) as client:
        with pytest.raises(openai.InternalServerError, match="internal error"):
            await client.completions.create(model="m", prompt=[5], max_tokens=1)
        assert failures == []
        assert (await client.completions.create(model="m", prompt=[5], max_tokens=1)).choices[0].text == "x"


async def test_an_error_within_a_stream_is_raised(rig: Rig, client: AsyncOpenAI) -> None:
    rig.engine.stall_after = 2
    stream = await client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=9, stream=True)
    texts = [(await anext(stream)).choices[0].delta.content for _ in range(3)]
    rig.serving.abort()
    with pytest.raises(openai.APIError, match="shut down"):
        await anext(stream)
    assert texts == ["", "x", "x"]
    await until(lambda: not rig.serving.calls)


async def test_a_response_that_fails_says_so(rig: Rig) -> None:
    rig.engine.stall_after = 1
    answering = asyncio.create_task(rig.respond(max_output_tokens=5, stream=True))
    await until(lambda: rig.registry.get_sample_value("rudder_stream_messages_total"))
    rig.serving.abort()
    *_, error, failed = events(await answering)
    assert (error["type"], error["code"], failed["type"]) == ("error", "DRAINING", "response.failed")
    assert failed["response"]["status"] == "failed"


async def test_closing_a_stream_and_a_timeout_end_the_call(rig: Rig, client: AsyncOpenAI) -> None:
    rig.engine.stall_after = 1
    stream = await client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=9, stream=True)
    await anext(stream)
    await stream.close()
    await until(lambda: not rig.serving.calls)
    with pytest.raises(openai.APITimeoutError):
        await client.with_options(timeout=0.2).chat.completions.create(model="m", messages=MESSAGES, max_tokens=9)
    await until(lambda: not rig.serving.calls)
    assert rig.ended("InferenceService.Generate", "CANCELLED") == 1
    assert rig.ended("InferenceService.Complete", "CANCELLED") == 1


@pytest.fixture
def call(rig: Rig) -> Call:
    record = CallRecord("InferenceService.Generate", ANONYMOUS, Correlation(), choices=[ChoiceRecord()])
    return Call(rig.serving, record, TokenTexts())


def refused(text: str = "Not here.") -> inference_pb2.ChoiceDelta:
    return inference_pb2.ChoiceDelta(
        text="a", finish_reason=inference_pb2.FINISH_REASON_REFUSED,
        refusal=inference_pb2.PolicyRefusal(policy="p", rule="r", text=text, position=3),
    )  # fmt: skip


async def test_a_refusal_of_a_policy_is_a_content_filter(call: Call) -> None:
    chat = ChatAnswer(call, b'{"model": "m", "messages": []}')
    delta = await chat.delta(refused())
    assert (delta["finish_reason"], delta["delta"]) == ("content_filter", {"content": "a", "refusal": "Not here."})
    assert delta["rudder"]["refusal"]["rule"] == "r"
    assert (await chat.delta(refused("")))["delta"]["refusal"] == REFUSED
    whole = await chat.choice(inference_pb2.Choice.FromString(refused().SerializeToString()))
    assert (whole["message"]["content"], whole["message"]["refusal"]) == ("a", "Not here.")
    silent = inference_pb2.Choice(finish_reason=inference_pb2.FINISH_REASON_REFUSED, refusal=REFUSAL)
    assert (await chat.choice(silent))["message"]["content"] is None
    completion = await CompletionAnswer(call, b'{"model": "m", "prompt": "a"}').choice(refused())
    assert (completion["text"], completion["finish_reason"]) == ("a", "content_filter")


async def test_a_refusal_of_a_policy_ends_a_response(call: Call) -> None:
    body = b'{"model": "m", "input": "a"}'
    streamed = await ResponseAnswer(call, body).events(inference_pb2.GenerateResponse(choices=[refused()]))
    kinds = [line.removeprefix("event: ") for line in streamed.decode().splitlines() if line.startswith("event: ")]
    assert kinds[-5:] == [
        "response.refusal.delta", "response.refusal.done", "response.content_part.done", "response.output_item.done",
        "response.incomplete",
    ]  # fmt: skip
    choice = inference_pb2.Choice(finish_reason=inference_pb2.FINISH_REASON_REFUSED, refusal=REFUSAL)
    document = await ResponseAnswer(call, body).document(inference_pb2.CompleteResponse(choices=[choice]))
    assert document["incomplete_details"] == {"reason": "content_filter"}
    assert document["output"][0]["content"] == [{"type": "refusal", "refusal": "Not here."}]


IDS = TOKENIZER("cells divide", add_special_tokens=False)["input_ids"][:2]


def with_logprobs() -> inference_pb2.ChoiceDelta:
    logprobs = inference_pb2.Logprobs(
        chosen=[-0.5, -1.5], width=1, alternative_ids=[IDS[0], IDS[0]], alternatives=[-0.5, -1.0]
    )
    return inference_pb2.ChoiceDelta(token_ids=IDS, logprobs=logprobs)


async def test_log_probabilities_of_chats(call: Call) -> None:
    chat = ChatAnswer(call, b'{"model": "m", "messages": [], "logprobs": true, "top_logprobs": 1}')
    first, second = [TOKENIZER.decode([token]) for token in IDS]
    content = (await chat.delta(with_logprobs()))["logprobs"]["content"]
    assert [(entry["token"], entry["logprob"], entry["bytes"]) for entry in content] == [
        (first, -0.5, list(first.encode())), (second, -1.5, list(second.encode())),
    ]  # fmt: skip
    assert [entry["top_logprobs"][0]["token"] for entry in content] == [first, first]
    assert (await ChatAnswer(call, b'{"model": "m", "messages": []}').delta(with_logprobs()))["logprobs"] is None


async def test_log_probabilities_of_completions(call: Call) -> None:
    answer = CompletionAnswer(call, b'{"model": "m", "prompt": "a", "logprobs": 1}')
    first, second = [TOKENIZER.decode([token]) for token in IDS]
    for begin in (0, len(first + second)):
        logprobs = (await answer.choice(with_logprobs()))["logprobs"]
        assert logprobs == {
            "tokens": [first, second], "token_logprobs": [-0.5, -1.5], "text_offset": [begin, begin + len(first)],
            "top_logprobs": [{first: -0.5}, {second: -1.5, first: -1.0}],
        }  # fmt: skip
    assert bounded(float("-inf")) == -9999.0


async def test_reported_features_are_in_the_extension(call: Call) -> None:
    message = inference_pb2.GenerateResponse(
        request_id="r",
        features=[inference_pb2.FeatureInfo(site="layers.2.resid_post", index=7, label="cells")],
        choices=[
            inference_pb2.ChoiceDelta(
                text="a",
                activations=inference_pb2.FeatureColumns(positions=[0], features=[0], activations=[1.5]),
                finish_reason=inference_pb2.FINISH_REASON_STOP,
                pooled=[inference_pb2.PooledFeature(feature=0, max=1.5)],
            )
        ],
    )
    for answer in (
        ChatAnswer(call, b'{"model": "m", "messages": []}'),
        CompletionAnswer(call, b'{"model": "m", "prompt": "a"}'),
    ):
        content = (await answer.events(message)).decode()
        assert '"rudder":{"request_id":"r","features":[{"site":"layers.2.resid_post"' in content
        assert '"activations":{"positions":[0],"features":[0],"activations":[1.5]}' in content
        assert '"pooled":[{' in content
    assert b'"features":[{' in await ResponseAnswer(call, b'{"model": "m", "input": "a"}').events(message)
