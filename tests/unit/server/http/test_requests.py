"""Requests of the OpenAI API in the contract's terms: every field is taken, left out by name, or refused by name."""

import json
from typing import Any

import msgspec
import pytest
from google.protobuf import json_format

from rudder.server.http.chat import ChatRequest, read_chat
from rudder.server.http.completions import CompletionRequest, read_completion
from rudder.server.http.errors import refusal_body, refusal_headers, renamed
from rudder.server.http.fields import IGNORED, NEUTRAL, REFUSED
from rudder.server.http.responses import ResponsesRequest, read_response
from rudder.server.service.errors import Refusal, invalid
from rudder.v1 import inference_pb2
from tests.unit.server.http.rig import Rig

MESSAGES = [{"role": "user", "content": "cells"}]
REQUIRED: dict[Any, dict[str, Any]] = {
    read_chat: {"model": "m", "messages": MESSAGES},
    read_completion: {"model": "m", "prompt": "cells"},
    read_response: {"model": "m", "input": "cells"},
}
FORMS: dict[Any, type[msgspec.Struct]] = {
    read_chat: ChatRequest,
    read_completion: CompletionRequest,
    read_response: ResponsesRequest,
}


def asked(read: Any, **fields: Any) -> inference_pb2.GenerateRequest:
    """Return the message of the contract that a request becomes."""
    _, request = read(json.dumps(REQUIRED[read] | fields).encode())
    filled: inference_pb2.GenerateRequest = request.fill(inference_pb2.GenerateRequest())
    return filled


def refused(read: Any, **fields: Any) -> tuple[str, str]:
    """Return the field that a refusal names, and what it says."""
    with pytest.raises(Refusal) as caught:
        asked(read, **fields)
    return caught.value.violations[0].field, caught.value.violations[0].description


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
SCHEMA_TEXT = json.dumps(SCHEMA, separators=(",", ":"))
SAMPLED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"max_tokens": 7}, {"max_tokens": 7}),
    ({"min_tokens": 2, "max_tokens": 7}, {"min_tokens": 2, "max_tokens": 7}),
    ({"temperature": 0}, {"temperature": 0.0}),
    ({"top_p": 0.5, "top_k": 4, "min_p": 0.1}, {"top_p": 0.5, "top_k": 4, "min_p": 0.1}),
    ({"top_k": -1}, {"top_k": 0}),
    ({"presence_penalty": 1, "frequency_penalty": -1}, {"presence_penalty": 1.0, "frequency_penalty": -1.0}),
    ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
    ({"seed": 3, "n": 2}, {"seed": "3", "n": 2}),
    ({"stop": "a"}, {"stop": ["a"]}),
    ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
    ({"stop": None}, {}),
    ({"stop_token_ids": [1], "ignore_eos": True}, {"stop_token_ids": [1], "ignore_eos": True}),
    ({"include_stop_str_in_output": True}, {"include_stop": True}),
    ({"skip_special_tokens": False}, {"skip_special_tokens": False}),
    ({"logit_bias": {"5": -100}}, {"logit_bias": {"5": -100.0}}),
    ({"bad_words": ["x"], "allowed_token_ids": [1, 2]}, {"bad_words": ["x"], "allowed_token_ids": [1, 2]}),
    ({"structured_outputs": {"regex": "a+"}}, {"structured": {"regex": "a+"}}),
    ({"structured_outputs": {"choice": ["a", "b"]}}, {"structured": {"choice": {"texts": ["a", "b"]}}}),
    ({"structured_outputs": {"json": SCHEMA}}, {"structured": {"json_schema": SCHEMA_TEXT}}),
    ({"structured_outputs": {"json": SCHEMA_TEXT}}, {"structured": {"json_schema": SCHEMA_TEXT}}),
    ({"structured_outputs": {"grammar": "root"}}, {"structured": {"grammar": "root"}}),
    ({"response_format": {"type": "text"}}, {}),
    ({"response_format": {"type": "json_object"}}, {"structured": {"json_object": True}}),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}},
        {"structured": {"json_schema": SCHEMA_TEXT}},
    ),
]


@pytest.mark.parametrize("read", [read_chat, read_completion])
@pytest.mark.parametrize(("fields", "expected"), SAMPLED)
def test_sampling_fields_have_the_contracts_meaning(read: Any, fields: dict[str, Any], expected: Any) -> None:
    sampling = asked(read, **fields).sampling
    assert json_format.MessageToDict(sampling, preserving_proto_field_name=True) == expected


def test_the_table_of_sampling_fields_is_complete() -> None:
    """A field that is read and does nothing would be ignored in silence."""
    tested = {name for fields, _ in SAMPLED for name in fields}
    others = {"model", "rudder", "stream", "stream_options", "truncate_prompt_tokens", "cache_salt"}
    own = {"messages", "max_completion_tokens", "logprobs", "top_logprobs", "chat_template_kwargs", "prompt"}
    own |= {"continue_final_message", "add_generation_prompt"}
    for form in (ChatRequest, CompletionRequest):
        assert {field.name for field in msgspec.structs.fields(form)} <= tested | others | own


def test_chat_fields() -> None:
    request = asked(
        read_chat, max_tokens=5, max_completion_tokens=6, logprobs=True, top_logprobs=2, cache_salt="s",
        truncate_prompt_tokens=9, chat_template_kwargs={"enable_thinking": False}, continue_final_message=True,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None},
            {"role": "assistant", "content": None, "refusal": "No.", "tool_calls": [], "annotations": []},
        ],
    )  # fmt: skip
    assert (request.sampling.max_tokens, request.sampling.logprobs, request.cache_salt) == (6, 2, "s")
    assert request.prompt.truncate_prompt_tokens == 9
    chat = request.prompt.chat
    assert (chat.template_arguments, chat.continue_final_message) == ('{"enable_thinking":false}', True)
    messages = [(message.role, message.content) for message in chat.messages]
    assert messages == [("system", "Be brief."), ("user", "a\nb"), ("assistant", "No.")]
    assert asked(read_chat, logprobs=True).sampling.logprobs == 0
    assert not asked(read_chat, logprobs=False).sampling.HasField("logprobs")


@pytest.mark.parametrize("prompt", ["cells", ["cells"], [5, 6], [[5, 6]]])
def test_forms_of_a_prompt(prompt: Any) -> None:
    request = asked(read_completion, prompt=prompt, logprobs=1)
    assert (request.prompt.text or list(request.prompt.token_ids.ids)) in ("cells", [5, 6])
    assert request.sampling.logprobs == 1


def test_response_fields() -> None:
    request = asked(
        read_response, instructions="Be brief.", max_output_tokens=5, temperature=0.5, top_p=0.9, top_logprobs=2,
        store=True, metadata={"a": "b"}, truncation="disabled", tools=[], include=["message.output_text.logprobs"],
        text={"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
        input=[
            {"role": "user", "content": "a"},
            {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
             "content": [{"type": "output_text", "text": "b", "annotations": [], "logprobs": []}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "c"}]},
        ],
    )  # fmt: skip
    assert (request.sampling.max_tokens, request.sampling.logprobs) == (5, 2)
    assert request.sampling.structured.json_schema == SCHEMA_TEXT
    messages = [(message.role, message.content) for message in request.prompt.chat.messages]
    assert messages == [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c")]
    (message,) = asked(read_response).prompt.chat.messages
    assert (message.role, message.content) == ("user", "cells")


def test_the_extension_is_the_contracts_program_topic_and_report() -> None:
    program = {
        "sites": [{"site": "layers.2.resid_post", "edits": [{"row": {"feature": {"index": 7}}, "ablate": True}]}]
    }
    report = {"top_k": 3, "pooled": True}
    for read in REQUIRED:
        request = asked(read, rudder={"program": program, "report": report, "stream_interval": 4})
        assert request.steering.program.sites[0].edits[0].row.feature.index == 7
        assert (request.report.top_k, request.report.pooled, request.stream_interval) == (3, True, 4)
        assert asked(read, rudder={"program": "less-history"}).steering.name == "less-history"
        assert asked(read, rudder={"topic": "astronomy"}).steering.topic.topic == "astronomy"
        topic = asked(read, rudder={"topic": {"topic": "astronomy", "kl": 0.5}}).steering.topic
        assert (topic.topic, topic.kl) == ("astronomy", 0.5)
        assert not asked(read, rudder={}).HasField("steering")


FORGED = {
    "vllm_xargs": {"rudder": {"program": "x"}}, "extra_args": {"rudder": 1}, "request_id": "other", "priority": -5,
    "kv_transfer_params": {"do_remote_prefill": True}, "prompt_embeds": "AAAA", "chat_template": "{{ 1 }}",
    "data_parallel_rank": 1, "session_id": "x", "documents": [{}], "media_io_kwargs": {}, "use_beam_search": True,
}  # fmt: skip


def taken(read: Any) -> set[str]:
    """Return the names of the fields that a request may have."""
    return {field.name for field in msgspec.structs.fields(FORMS[read])}


@pytest.mark.parametrize(
    ("read", "name"), [(read, name) for read in FORMS for name in sorted({*REFUSED, *FORGED} - taken(read))]
)
def test_what_would_forge_or_mislead_is_refused_by_name(read: Any, name: str) -> None:
    field, description = refused(read, **{name: FORGED.get(name, "x")})
    assert field == name
    assert REFUSED[name] in description or "is not supported" in description


@pytest.mark.parametrize("read", REQUIRED)
def test_fields_of_no_effect_are_left_out(read: Any) -> None:
    plain = asked(read)
    for name in IGNORED:
        assert asked(read, **{name: "x"}) == plain
    for name, values in NEUTRAL.items():
        if name not in taken(read):
            assert [asked(read, **{name: value}) for value in (*values, None)] == [plain] * (len(values) + 1)
            assert refused(read, **{name: {"other": 1}})[0] == name


@pytest.mark.parametrize(
    ("read", "fields", "field"),
    [
        (read_chat, {"temprature": 1}, "temprature"),
        (read_chat, {"temprature": None}, "temprature"),
        (read_chat, {"rudder": {"prog": 1}}, "rudder.prog"),
        (read_chat, {"rudder": {"program": 5}}, "rudder.program"),
        (read_chat, {"rudder": {"program": {"sites": [{"place": "x"}]}}}, "rudder.program.sites[0]"),
        (read_chat, {"rudder": {"program": {}, "topic": "x"}}, "rudder.topic"),
        (read_chat, {"rudder": {"topic": {"topic": "x", "strength": 1, "kl": 1}}}, "rudder.topic.kl"),
        (read_chat, {"rudder": {"report": {"topk": 1}}}, "rudder.report"),
        (read_chat, {"max_tokens": -1}, "max_tokens"),
        (read_chat, {"n": 10**20}, "n"),
        (read_chat, {"temperature": "hot"}, "temperature"),
        (read_chat, {"logit_bias": {"x": 1}}, "logit_bias"),
        (read_chat, {"logit_bias": {"5": "x"}}, "logit_bias[...]"),
        (read_chat, {"top_logprobs": 2}, "top_logprobs"),
        (read_chat, {"min_tokens": 3}, "min_tokens"),
        (read_chat, {"add_generation_prompt": False}, "add_generation_prompt"),
        (read_chat, {"tools": [{"type": "function"}]}, "tools"),
        (read_chat, {"tool_choice": "required"}, "tool_choice"),
        (read_chat, {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (read_chat, {"response_format": {"type": "yaml"}}, "response_format.type"),
        (read_chat, {"structured_outputs": {}}, "structured_outputs"),
        (read_chat, {"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs"),
        (
            read_chat,
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
        ),
        (read_chat, {"messages": "x"}, "messages"),
        (read_chat, {"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages[0].weight"),
        (read_chat, {"messages": [{"content": "x"}]}, "messages[0].role"),
        (read_chat, {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        (read_chat, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        (read_chat, {"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "messages[0].name"),
        (read_chat, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            read_chat,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            "messages[0].content[0].type",
        ),
        (read_chat, {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        (read_completion, {"prompt": ["a", "b"]}, "prompt"),
        (read_completion, {"prompt": [[1], [2]]}, "prompt"),
        (read_completion, {"prompt": [1, "a"]}, "prompt"),
        (read_completion, {"prompt": [[-1]]}, "prompt[0]"),
        (read_completion, {"prompt": [1.5]}, "prompt[0]"),
        (read_completion, {"messages": MESSAGES}, "messages"),
        (read_response, {"previous_response_id": "resp_1"}, "previous_response_id"),
        (read_response, {"background": True}, "background"),
        (read_response, {"truncation": "auto"}, "truncation"),
        (read_response, {"seed": 1}, "seed"),
        (read_response, {"include": ["file_search_call.results"]}, "include[0]"),
        (read_response, {"input": [{"type": "function_call_output"}]}, "input[0].type"),
        (read_response, {"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        (read_response, {"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type"),
        (read_response, {"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        (read_response, {"text": {"verbosity": "low"}}, "text.verbosity"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(read: Any, fields: dict[str, Any], field: str) -> None:
    assert refused(read, **fields)[0].startswith(field)


@pytest.mark.parametrize("read", REQUIRED)
def test_a_missing_field_is_named(read: Any) -> None:
    for name in REQUIRED[read]:
        document = {key: value for key, value in REQUIRED[read].items() if key != name}
        with pytest.raises(Refusal, match=f"{name}: is missing"):
            read(json.dumps(document).encode())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 1000}, "max_tokens"),
        ({"temperature": 9}, "temperature"),
        ({"n": 10**9}, "n"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["x"] * 99}, "stop"),
        ({"logit_bias": {"5": 1000}}, "logit_bias[5]"),
        ({"logit_bias": {"999999999": 1}}, "logit_bias[999999999]"),
        ({"allowed_token_ids": [1000]}, "allowed_token_ids[0]"),
        ({"logprobs": 99}, "logprobs"),
        ({"structured_outputs": {"regex": "a" * 9999}}, "structured_outputs.regex"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": "x" * 9999}}}},
         "response_format.json_schema"),
        ({"prompt": [1000]}, "prompt[0]"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"cache_salt": "x" * 999}, "cache_salt"),
        ({"rudder": {"stream_interval": 1000}, "stream": True}, "rudder.stream_interval"),
        ({"rudder": {"report": {"top_k": 1000}}}, "rudder.report.top_k"),
        ({"rudder": {"topic": "x"}}, "rudder.topic.topic"),
        ({"rudder": {"program": "x"}}, "rudder.program"),
        ({"model": "other"}, "model"),
    ],
)  # fmt: skip
async def test_the_services_refusals_name_the_requests_own_fields(fields: dict[str, Any], param: str) -> None:
    async with Rig() as rig:
        rig.engine.concepts = {}  # type: ignore[attr-defined]
        response = await rig.complete(**fields)
    assert response.status_code in (400, 404), response.text
    assert response.json()["error"]["param"] == param
    assert response.json()["error"]["message"].startswith(f"{param}: ")


async def test_chats_name_their_own_fields() -> None:
    async with Rig() as rig:
        for fields, param in (
            ({"max_completion_tokens": 1000}, "max_completion_tokens"),
            ({"messages": []}, "messages"),
            ({"messages": [{"role": "user", "content": "x " * 5000}]}, "messages"),
            ({"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
            ({"chat_template_kwargs": {"no_such": 1}}, "chat_template_kwargs"),
            ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ):
            response = await rig.chat(**fields)
            assert (response.status_code, response.json()["error"]["param"]) == (400, param)
        response = await rig.respond(max_output_tokens=1000)
        assert response.json()["error"]["param"] == "max_output_tokens"
        assert (await rig.respond(input=[])).json()["error"]["param"] == "input"


async def test_without_a_maximum_a_chat_may_fill_the_context() -> None:
    async with Rig(max_model_len=50) as rig:
        usage = (await rig.chat(max_tokens=None)).json()["usage"]
        assert usage["total_tokens"] == 50
        assert (await rig.respond(max_output_tokens=None)).json()["usage"]["total_tokens"] == 50
        assert (await rig.complete()).json()["usage"]["completion_tokens"] == 16
    async with Rig({"limits.max_tokens": "9"}) as rig:
        assert (await rig.chat(max_tokens=None)).json()["usage"]["completion_tokens"] == 9


def test_names_of_fields_within_others() -> None:
    names = {"sampling": "", "prompt": "input", "prompt.chat.messages": "messages"}
    assert renamed("sampling.stop[0]", names) == "stop[0]"
    assert renamed("prompt.chat.messages[3].content", names) == "messages[3].content"
    assert renamed("prompt.text", names) == "input.text"
    assert renamed("other.field", names) == "other.field"


def test_refusals_say_whether_to_try_again() -> None:
    def headers(refusal: Refusal) -> dict[bytes, bytes]:
        return dict(refusal_headers(refusal))

    full = headers(Refusal("QUEUE_FULL", "full", retry_after_s=1.5))
    assert (full[b"retry-after-ms"], full[b"retry-after"]) == (b"1500", b"2")
    assert b"x-should-retry" not in headers(Refusal("VERDICT_LOST", ""))
    assert b"x-should-retry" not in headers(invalid("n", "is 0"))
    assert headers(Refusal("INTERNAL", ""))[b"x-should-retry"] == b"false"
    assert headers(Refusal("BANK_ROWS_FULL", ""))[b"x-should-retry"] == b"false"
    assert headers(Refusal("TOKEN_EXPIRED", ""))[b"www-authenticate"] == b"Bearer"


def test_a_refusal_has_at_most_so_many_fields() -> None:
    refusal = Refusal("FIELD_INVALID", "stop[0]: x", [invalid(f"stop[{i}]", "x").violations[0] for i in range(10_000)])
    assert len(json.dumps(refusal_body(refusal, {}))) < 4096
