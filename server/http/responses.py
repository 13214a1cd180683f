"""`/v1/responses`, stateless: nothing is stored, and nothing that was stored elsewhere is referred to."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from rudder.server.http.answers import REFUSED, Asked, Call
from rudder.server.http.extension import Rudder, answer_extension, choice_extension
from rudder.server.http.fields import UInt32, convert, read
from rudder.server.http.sampling import SAMPLING_NAMES, as_json
from rudder.server.http.usage import Choice, chat_logprobs, tokens_of, usage_of
from rudder.server.service.errors import invalid
from rudder.v1 import inference_pb2

LOGPROBS = "message.output_text.logprobs"
# Parts of a message by their types; both are text.
PARTS = ("input_text", "output_text", "refusal", "text")
# What items that were part of an answer have besides role and content.
ITEM_IGNORED = ("id", "status", "type", "phase")


class TextFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The form of the output. The name and description of a schema are for people; it is always obeyed strictly."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class Text(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Settings of the text. `verbosity`: medium is what there is."""

    format: TextFormat = msgspec.field(default_factory=TextFormat)
    verbosity: Literal["medium"] | None = None


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """`include_obfuscation` is not done here, whatever it says."""

    include_obfuscation: bool = False


class ResponsesRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The request of a response."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    rudder: Rudder = msgspec.field(default_factory=Rudder)
    stream: bool = False
    stream_options: StreamOptions = msgspec.field(default_factory=StreamOptions)
    max_output_tokens: UInt32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    top_logprobs: UInt32 | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    text: Text = msgspec.field(default_factory=Text)
    truncation: Annotated[str, Meta(pattern="^disabled$")] = "disabled"
    cache_salt: str | None = None


class Item(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A message of the input."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]


def read_response(body: bytes) -> tuple[ResponsesRequest, Asked]:
    """Read a request. Raises Refusal, which names the field."""
    form = read(body, ResponsesRequest)
    names = SAMPLING_NAMES | {
        "sampling.max_tokens": "max_output_tokens",
        "sampling.logprobs": "top_logprobs",
        "sampling.structured": "text.format",
        "prompt": "input",
        "prompt.chat": "input",
        "prompt.chat.messages": "input",
    }
    values = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
    logprobs = (form.top_logprobs or 0) if LOGPROBS in (form.include or ()) else form.top_logprobs or None
    sampling = inference_pb2.Sampling(
        max_tokens=form.max_output_tokens, logprobs=logprobs, structured=format_of(form.text.format),
        **{name: value for name in values if (value := getattr(form, name)) is not None},
    )  # fmt: skip
    prompt = inference_pb2.Prompt(chat=inference_pb2.Chat(messages=messages_of(form)))
    return form, Asked(form.model, form.stream, prompt, sampling, form.rudder, names, form.cache_salt or "")


def format_of(text: TextFormat) -> inference_pb2.StructuredOutput | None:
    """Return the form of the output; None if any."""
    match text.type:
        case "json_object":
            return inference_pb2.StructuredOutput(json_object=True)
        case "json_schema" if text.schema is None:
            raise invalid("text.format.schema", "is missing")
        case "json_schema":
            return inference_pb2.StructuredOutput(json_schema=as_json(text.schema))
    return None


def messages_of(form: ResponsesRequest) -> list[inference_pb2.ChatMessage]:
    """Return instructions and input as messages, a developer's as the system's, which templates know."""
    messages = [("system", form.instructions)] if form.instructions else []
    if isinstance(form.input, str):
        messages.append(("user", form.input))
    else:
        messages += [item_of(document, f"input[{i}]") for i, document in enumerate(form.input)]
    return [inference_pb2.ChatMessage(role=role, content=content) for role, content in messages]


def item_of(document: dict[str, Any], field: str) -> tuple[str, str]:
    """Return role and text of a message. Raises Refusal for another kind of item."""
    if document.get("type", "message") != "message":
        raise invalid(f"{field}.type", "must be message: the input is messages, and nothing is stored or called")
    given = {name: value for name, value in document.items() if name not in ITEM_IGNORED}
    item = convert(given, Item, field)
    content = item.content
    if isinstance(content, list):
        content = "\n".join(part_of(part, f"{field}.content[{i}]") for i, part in enumerate(content))
    return ("system" if item.role == "developer" else item.role), content


def part_of(part: dict[str, Any], field: str) -> str:
    """Return the text of a part of a message."""
    if part.get("type") not in PARTS:
        raise invalid(f"{field}.type", f"must be one of {', '.join(PARTS)}: messages are text")
    name = "refusal" if part["type"] == "refusal" else "text"
    if not isinstance(part.get(name), str):
        raise invalid(f"{field}.{name}", "must be a text")
    text: str = part[name]
    return text


class ResponseAnswer:
    """Answers a response: one message of one part of text, or of a text that was begun and a refusal."""

    def __init__(self, call: Call, body: bytes) -> None:
        self.call, (self.form, self.asked) = call, read_response(body)
        self.item = f"msg_{call.record.request_id}"
        self.number = 0
        self.text, self.logprobs = "", list[dict[str, Any]]()
        self.features = list[dict[str, Any]]()

    async def events(self, message: inference_pb2.GenerateResponse) -> bytes:
        """Return the beginning, once, and what the message adds to the text."""
        content = b"" if self.number else self.opening()
        extension = answer_extension(message)
        self.features += extension.get("features", [])
        for delta in message.choices:
            logprobs = await self.logprobs_of(delta)
            self.text += delta.text
            self.logprobs += logprobs
            fields = self.place(0) | {"delta": delta.text, "logprobs": logprobs}
            if beyond := choice_extension(delta) | extension:
                fields["rudder"] = beyond
            content += self.event("response.output_text.delta", fields)
            if delta.finish_reason:
                content += self.closing(delta)
        return content

    def opening(self) -> bytes:
        """Return the events before the text."""
        response = self.response("in_progress", [])
        item = {"id": self.item, "type": "message", "status": "in_progress", "role": "assistant", "content": []}
        return b"".join([
            self.event("response.created", {"response": response}),
            self.event("response.in_progress", {"response": response}),
            self.event("response.output_item.added", {"output_index": 0, "item": item}),
            self.event("response.content_part.added", self.place(0) | {"part": text_part("", [])}),
        ])  # fmt: skip

    def closing(self, choice: inference_pb2.ChoiceDelta) -> bytes:
        """Return the events behind the text: the refusal, if there is one, and the whole response."""
        text = text_part(self.text, self.logprobs)
        parts = [
            self.event("response.output_text.done", self.place(0) | {"text": self.text, "logprobs": self.logprobs}),
            self.event("response.content_part.done", self.place(0) | {"part": text}),
        ]
        content = [text]
        if choice.HasField("refusal"):
            refusal = refusal_part(choice)
            content.append(refusal)
            place = self.place(1)
            parts += [
                self.event("response.content_part.added", place | {"part": refusal_part(None)}),
                self.event("response.refusal.delta", place | {"delta": refusal["refusal"]}),
                self.event("response.refusal.done", place | {"refusal": refusal["refusal"]}),
                self.event("response.content_part.done", place | {"part": refusal}),
            ]
        item = self.message(choice, content)
        parts.append(self.event("response.output_item.done", {"output_index": 0, "item": item}))
        status = status_of(choice)
        response = self.response(status, [item], choice)
        return b"".join([*parts, self.event(f"response.{status}", {"response": response})])

    def place(self, part: int) -> dict[str, Any]:
        """Return where a part of the message is."""
        return {"item_id": self.item, "output_index": 0, "content_index": part}

    def message(self, choice: Choice, content: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the message as an item of the output."""
        return {
            "id": self.item, "type": "message", "status": status_of(choice), "role": "assistant", "content": content,
        }  # fmt: skip

    def event(self, kind: str, fields: dict[str, Any]) -> bytes:
        """Return an event; they are numbered."""
        document = {"type": kind, "sequence_number": self.number} | fields
        self.number += 1
        return f"event: {kind}\n".encode() + b"data: " + msgspec.json.encode(document) + b"\n\n"

    async def last_events(self) -> bytes:
        """The last event of the response ends it."""
        return b""

    async def logprobs_of(self, choice: Choice) -> list[dict[str, Any]]:
        """Return the log-probabilities of a choice's tokens, if they are asked for."""
        if not self.asked.sampling.HasField("logprobs"):
            return []
        await self.call.texts.know(self.call.serving, self.call.record, tokens_of(choice))
        content: list[dict[str, Any]] = chat_logprobs(choice, self.call.texts)["content"]
        return content

    async def document(self, response: inference_pb2.CompleteResponse) -> dict[str, Any]:
        """Return the whole response."""
        (choice,) = response.choices
        content = []
        if choice.text or not choice.HasField("refusal"):
            content.append(text_part(choice.text, await self.logprobs_of(choice)))
        if choice.HasField("refusal"):
            content.append(refusal_part(choice))
        self.features = answer_extension(response).get("features", [])
        return self.response(status_of(choice), [self.message(choice, content)], choice)

    def response(self, status: str, output: list[dict[str, Any]], choice: Choice | None = None) -> dict[str, Any]:
        """Return the response as it is now. `choice`: how it ended."""
        form, call = self.form, self.call
        given = {name: getattr(form, name) for name in ("temperature", "top_p")}
        rudder: dict[str, Any] = {"request_id": call.record.request_id}
        if choice:
            rudder |= choice_extension(choice) | ({"features": self.features} if self.features else {})
        return {
            "id": f"resp_{call.record.request_id}", "object": "response", "created_at": call.created, "status": status,
            "completed_at": call.created if status == "completed" else None,
            "background": False, "error": None, "incomplete_details": incomplete(choice) if choice else None,
            "instructions": form.instructions, "max_output_tokens": form.max_output_tokens, "max_tool_calls": None,
            "model": call.model, "output": output, "parallel_tool_calls": True, "previous_response_id": None,
            "reasoning": None, "store": False, "tool_choice": "none", "tools": [], "truncation": "disabled",
            "text": {"format": format_document(form.text.format)}, "top_logprobs": form.top_logprobs or 0,
            "metadata": {}, "service_tier": "default", "user": None, "safety_identifier": None,
            "prompt_cache_key": None,
            "presence_penalty": form.presence_penalty or 0.0, "frequency_penalty": form.frequency_penalty or 0.0,
            "usage": response_usage(call) if choice else None, "rudder": rudder,
        } | {name: 1.0 if value is None else value for name, value in given.items()}  # fmt: skip

    def failure(self, body: dict[str, Any]) -> bytes:
        """Return the end of a stream that fails."""
        error = body["error"]
        fields = {name: error[name] for name in ("message", "code", "param")}
        failed = self.response("failed", []) | {"error": {"code": "server_error", "message": error["message"]}}
        return self.event("error", fields | {"error": error}) + self.event("response.failed", {"response": failed})


def text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a part of text."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def refusal_part(choice: Choice | None) -> dict[str, Any]:
    """Return a part that is a refusal; empty before there is one."""
    return {"type": "refusal", "refusal": (choice.refusal.text or REFUSED) if choice else ""}


def status_of(choice: Choice) -> str:
    """Return how a response ended."""
    return "incomplete" if incomplete(choice) else "completed"


def incomplete(choice: Choice) -> dict[str, str] | None:
    """Return why a response is not complete; None if it is."""
    match choice.finish_reason:
        case inference_pb2.FINISH_REASON_LENGTH:
            return {"reason": "max_output_tokens"}
        case inference_pb2.FINISH_REASON_REFUSED:
            return {"reason": "content_filter"}
    return None


def format_document(text: TextFormat) -> dict[str, Any]:
    """Return the form of the output as it was asked for."""
    if text.type != "json_schema":
        return {"type": text.type}
    return {
        "type": text.type, "name": text.name, "schema": text.schema, "description": text.description, "strict": True,
    }  # fmt: skip


def response_usage(call: Call) -> dict[str, Any]:
    """Return what a call used."""
    usage = usage_of(call.record)
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
