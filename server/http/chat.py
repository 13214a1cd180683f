"""`/v1/chat/completions`."""

from typing import Any, Literal

import msgspec

from rudder.server.http.answers import DONE, REFUSED, Asked, Call, event
from rudder.server.http.extension import answer_extension, choice_extension
from rudder.server.http.fields import UInt32, convert, read
from rudder.server.http.sampling import SAMPLING_NAMES, Sampled, as_json, sampling_of
from rudder.server.http.usage import (
    Choice,
    chat_logprobs,
    choice_usage,
    finish_reason,
    stop_reason,
    tokens_of,
    usage_of,
)
from rudder.server.service.errors import invalid
from rudder.v1 import inference_pb2

# Of messages: what the model's template is not given, and why.
MESSAGE_REFUSED = {
    "name": "messages have a role alone",
    "tool_calls": "tools are not supported",
    "tool_call_id": "tools are not supported",
    "function_call": "tools are not supported",
    "audio": "messages are text",
}
# What the answers of this and other servers have in messages that clients send back.
MESSAGE_IGNORED = ("annotations", "reasoning", "reasoning_content", "rudder")


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]] = ""
    refusal: str = ""


class TextPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """A part of a message."""

    text: str


class ChatRequest(Sampled, kw_only=True, forbid_unknown_fields=True):
    """The request of a chat."""

    messages: list[dict[str, Any]]
    max_completion_tokens: UInt32 | None = None
    logprobs: bool = False
    top_logprobs: UInt32 | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool = True


def read_chat(body: bytes) -> tuple[ChatRequest, Asked]:
    """Read a request. Raises Refusal, which names the field."""
    form = read(body, ChatRequest)
    if form.top_logprobs and not form.logprobs:
        raise invalid("top_logprobs", "needs logprobs")
    if not form.add_generation_prompt and not form.continue_final_message:
        raise invalid("add_generation_prompt", "may be false beside continue_final_message alone")
    completion = form.max_completion_tokens is not None
    maximum = form.max_completion_tokens if completion else form.max_tokens
    names = SAMPLING_NAMES | {
        "sampling.max_tokens": "max_completion_tokens" if completion else "max_tokens",
        "sampling.logprobs": "top_logprobs",
        "sampling.structured": "structured_outputs" if form.structured_outputs else "response_format",
        "prompt": "messages",
    }
    logprobs = (form.top_logprobs or 0) if form.logprobs else None
    prompt = inference_pb2.Prompt(chat=chat_of(form), truncate_prompt_tokens=form.truncate_prompt_tokens)
    sampling = sampling_of(form, maximum, logprobs)
    return form, Asked(
        form.model, form.stream, prompt, sampling, form.rudder, names, form.cache_salt or "", default_max_tokens=None
    )


def chat_of(form: ChatRequest) -> inference_pb2.Chat:
    """Return the chat of a request."""
    arguments = as_json(form.chat_template_kwargs) if form.chat_template_kwargs else ""
    messages = [message_of(document, f"messages[{i}]") for i, document in enumerate(form.messages)]
    return inference_pb2.Chat(
        messages=messages, template_arguments=arguments, continue_final_message=form.continue_final_message
    )


def message_of(document: dict[str, Any], field: str) -> inference_pb2.ChatMessage:
    """Return a message of the contract: text alone, and a developer's as the system's, which templates know."""
    given = {name: value for name, value in document.items() if value is not None and name not in MESSAGE_IGNORED}
    for name, value in given.items():
        if name in MESSAGE_REFUSED and value != []:
            raise invalid(f"{field}.{name}", MESSAGE_REFUSED[name])
    if document.get("role") in ("tool", "function"):
        raise invalid(f"{field}.role", "tools are not supported")
    message = convert({name: value for name, value in given.items() if name not in MESSAGE_REFUSED}, Message, field)
    content = message.content or message.refusal
    if isinstance(content, list):
        content = "\n".join(text_of(part, f"{field}.content[{i}]") for i, part in enumerate(content))
    return inference_pb2.ChatMessage(role="system" if message.role == "developer" else message.role, content=content)


def text_of(part: dict[str, Any], field: str) -> str:
    """Return the text of a part of a message."""
    if part.get("type") != "text":
        raise invalid(f"{field}.type", "must be text: messages are text")
    return convert(part, TextPart, field).text


class ChatAnswer:
    """Answers a chat, as vLLM and OpenAI do."""

    def __init__(self, call: Call, body: bytes) -> None:
        self.call, (self.form, self.asked) = call, read_chat(body)
        self.begun = False

    def head(self, kind: str) -> dict[str, Any]:
        """Return what every part of the answer begins with."""
        call = self.call
        request = f"chatcmpl-{call.record.request_id}"
        return {"id": request, "object": kind, "created": call.created, "model": call.model}

    def chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a chunk of the stream."""
        return self.head("chat.completion.chunk") | {"choices": choices}

    async def events(self, message: inference_pb2.GenerateResponse) -> bytes:
        """Return the role of each choice, once, and what the message adds to its choices."""
        chunks = [] if self.begun else self.roles()
        self.begun = True
        for delta in message.choices:
            chunk = self.chunk([await self.delta(delta)])
            if self.form.stream_options.continuous_usage_stats:
                chunk["usage"] = self.usage(delta.index)
            if extension := answer_extension(message):
                chunk["rudder"] = extension
            chunks.append(chunk)
        return b"".join(map(event, chunks))

    def roles(self) -> list[dict[str, Any]]:
        """Return the first chunk of each choice."""
        delta = {"role": "assistant", "content": ""}
        choices = [
            {"index": i, "delta": delta, "logprobs": None, "finish_reason": None}
            for i in range(len(self.call.record.choices))
        ]
        rest: dict[str, Any] = {"prompt_token_ids": None, "prompt_text": None}
        if self.form.stream_options.continuous_usage_stats:
            rest = {"usage": self.usage(0, begun=False)} | rest
        return [self.chunk([choice]) | rest for choice in choices]

    def usage(self, index: int, begun: bool = True) -> dict[str, Any]:
        """Return what a choice used so far."""
        return choice_usage(self.call.record, index, begun) | {"completion_tokens_details": None}

    async def delta(self, delta: inference_pb2.ChoiceDelta) -> dict[str, Any]:
        """Return what a message adds to one choice."""
        content: dict[str, Any] = {"content": delta.text}
        if delta.HasField("refusal"):
            content["refusal"] = delta.refusal.text or REFUSED
        choice = {
            "index": delta.index, "delta": content, "logprobs": await self.logprobs(delta),
            "finish_reason": finish_reason(delta),
        }  # fmt: skip
        if delta.finish_reason:
            choice["stop_reason"] = stop_reason(delta)
        choice["token_ids"] = None
        return with_extension(choice, delta)

    async def logprobs(self, choice: Choice) -> dict[str, Any] | None:
        """Return the log-probabilities of a choice's tokens, if they are asked for."""
        if not self.form.logprobs:
            return None
        await self.call.texts.know(self.call.serving, self.call.record, tokens_of(choice))
        return chat_logprobs(choice, self.call.texts)

    async def last_events(self) -> bytes:
        """Return the usage, if it is asked for, and the end."""
        if not self.form.stream_options.include_usage:
            return DONE
        return event(self.chunk([]) | {"usage": usage_of(self.call.record)}) + DONE

    async def document(self, response: inference_pb2.CompleteResponse) -> dict[str, Any]:
        """Return the whole answer."""
        choices = [await self.choice(choice) for choice in response.choices]
        head = self.head("chat.completion")
        rest = {"usage": usage_of(self.call.record), "rudder": answer_extension(response)}
        return head | {"choices": choices, "service_tier": "default"} | rest

    async def choice(self, choice: inference_pb2.Choice) -> dict[str, Any]:
        """Return one choice of the whole answer."""
        refused = choice.HasField("refusal")
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if refused and not choice.text else choice.text,
            "refusal": (choice.refusal.text or REFUSED) if refused else None,
            "annotations": [],
        }
        document = {
            "index": choice.index, "message": message, "logprobs": await self.logprobs(choice),
            "finish_reason": finish_reason(choice), "stop_reason": stop_reason(choice), "token_ids": None,
        }  # fmt: skip
        return with_extension(document, choice)

    def failure(self, body: dict[str, Any]) -> bytes:
        """Return the end of a stream that fails: clients raise what `error` says."""
        return event(body) + DONE


def with_extension(document: dict[str, Any], choice: Choice) -> dict[str, Any]:
    """Return a choice with what it has beyond the OpenAI API."""
    extension = choice_extension(choice)
    return document | {"rudder": extension} if extension else document
