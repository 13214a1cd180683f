"""`/v1/completions`."""

from typing import Any

from rudder.server.http.answers import DONE, Asked, Call, event
from rudder.server.http.chat import with_extension
from rudder.server.http.extension import answer_extension
from rudder.server.http.fields import UInt32, convert, read
from rudder.server.http.sampling import SAMPLING_NAMES, Sampled, sampling_of
from rudder.server.http.usage import (
    Choice,
    choice_usage,
    completion_logprobs,
    finish_reason,
    stop_reason,
    tokens_of,
    usage_of,
)
from rudder.server.service.errors import invalid
from rudder.server.service.limits import DEFAULT_MAX_TOKENS
from rudder.v1 import inference_pb2


class CompletionRequest(Sampled, kw_only=True, forbid_unknown_fields=True):
    """The request of a completion. `prompt`: a text, token ids, or a list of one of them."""

    prompt: str | list[Any]
    logprobs: UInt32 | None = None


def read_completion(body: bytes) -> tuple[CompletionRequest, Asked]:
    """Read a request. Raises Refusal, which names the field."""
    form = read(body, CompletionRequest)
    names = SAMPLING_NAMES | {
        "sampling.structured": "structured_outputs" if form.structured_outputs else "response_format",
        "prompt.text": "prompt",
        "prompt.token_ids.ids": "prompt",
        "prompt.token_ids": "prompt",
    }
    prompt = prompt_of(form.prompt)
    if form.truncate_prompt_tokens is not None:
        prompt.truncate_prompt_tokens = form.truncate_prompt_tokens
    sampling = sampling_of(form, form.max_tokens, form.logprobs)
    default = DEFAULT_MAX_TOKENS
    return form, Asked(
        form.model, form.stream, prompt, sampling, form.rudder, names, form.cache_salt or "", default_max_tokens=default
    )


def prompt_of(prompt: str | list[Any]) -> inference_pb2.Prompt:
    """Return the prompt of a request. Raises Refusal for several: each choice is of one prompt here."""
    if isinstance(prompt, list) and any(isinstance(entry, str | list) for entry in prompt):
        if len(prompt) > 1:
            raise invalid("prompt", f"has {len(prompt)} prompts: send one request for each")
        prompt = prompt[0]
    if isinstance(prompt, str):
        return inference_pb2.Prompt(text=prompt)
    return inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=convert(prompt, list[UInt32], "prompt")))


class CompletionAnswer:
    """Answers a completion, as vLLM and OpenAI do."""

    def __init__(self, call: Call, body: bytes) -> None:
        self.call, (self.form, self.asked) = call, read_completion(body)
        # Characters of the tokens of each choice whose log-probabilities have been reported.
        self.offsets: dict[int, int] = {}

    def head(self) -> dict[str, Any]:
        """Return what every part of the answer begins with."""
        call = self.call
        request = f"cmpl-{call.record.request_id}"
        return {"id": request, "object": "text_completion", "created": call.created, "model": call.model}

    async def events(self, message: inference_pb2.GenerateResponse) -> bytes:
        """Return what the message adds to its choices."""
        chunks = []
        for delta in message.choices:
            chunk = self.head() | {"choices": [await self.choice(delta)]}
            if self.form.stream_options.continuous_usage_stats:
                chunk["usage"] = choice_usage(self.call.record, delta.index)
            if extension := answer_extension(message):
                chunk["rudder"] = extension
            chunks.append(chunk)
        return b"".join(map(event, chunks))

    async def choice(self, choice: Choice) -> dict[str, Any]:
        """Return one choice, or what a message adds to it."""
        document = {
            "index": choice.index, "text": choice.text, "logprobs": await self.logprobs(choice),
            "finish_reason": finish_reason(choice), "stop_reason": stop_reason(choice), "prompt_token_ids": None,
            "token_ids": None,
        }  # fmt: skip
        return with_extension(document, choice)

    async def logprobs(self, choice: Choice) -> dict[str, Any] | None:
        """Return the log-probabilities of a choice's tokens, if they are asked for."""
        if self.form.logprobs is None:
            return None
        texts, offset = self.call.texts, self.offsets.get(choice.index, 0)
        await texts.know(self.call.serving, self.call.record, tokens_of(choice))
        self.offsets[choice.index] = offset + sum(len(texts.texts[token]) for token in choice.token_ids)
        return completion_logprobs(choice, texts, offset)

    async def last_events(self) -> bytes:
        """Return the usage, if it is asked for, and the end."""
        if not self.form.stream_options.include_usage:
            return DONE
        return event(self.head() | {"choices": [], "usage": usage_of(self.call.record)}) + DONE

    async def document(self, response: inference_pb2.CompleteResponse) -> dict[str, Any]:
        """Return the whole answer."""
        choices = [await self.choice(choice) for choice in response.choices]
        rest = {"usage": usage_of(self.call.record), "rudder": answer_extension(response)}
        return self.head() | {"choices": choices, "service_tier": "default"} | rest

    def failure(self, body: dict[str, Any]) -> bytes:
        """Return the end of a stream that fails: clients raise what `error` says."""
        return event(body) + DONE
