"""Which fields of the OpenAI API are taken, left out or refused, and how a request is read: strictly, by one table."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from rudder.server.service.errors import Refusal, invalid

T = TypeVar("T")
UInt32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
UInt63 = Annotated[int, Meta(ge=0, le=2**63 - 1)]

# Fields that change nothing here, and why.
IGNORED: Mapping[str, str] = {
    "user": "callers are who their credentials say",
    "safety_identifier": "as `user`",
    "metadata": "nothing is stored",
    "store": "nothing is stored, whatever it says",
    "service_tier": "there is one",
    "prompt_cache_key": "the prefix cache needs no hint",
    "prompt_cache_retention": "as `prompt_cache_key`",
    "parallel_tool_calls": "there are no tools",
}
# Fields that would be obeyed or change the answer elsewhere, and that are refused whatever they hold but null; why.
REFUSED: Mapping[str, str] = {
    "vllm_xargs": "only the server writes the engine's extra arguments: a program goes into `rudder.program`",
    "extra_args": "only the server writes the engine's extra arguments: a program goes into `rudder.program`",
    "request_id": "the server chooses it: send your own as the header x-request-id",
    "session_id": "requests do not belong to sessions",
    "priority": "requests are served in fair turns",
    "kv_transfer_params": "keys and values come from no other server",
    "ec_transfer_params": "encoded inputs come from no other server",
    "data_parallel_rank": "the server chooses where a request runs",
    "prompt_embeds": "prompts are text, token ids or messages",
    "chat_template": "chats are written by the model's own template",
    "documents": "the model's template is given messages alone",
    "mm_processor_kwargs": "prompts are text",
    "media_io_kwargs": "prompts are text",
    "use_beam_search": "a program would not run in its steps",
    "best_of": "every choice is returned: ask for `n`",
    "suffix": "the model completes texts at their end",
    "echo": "the answer has generated text alone",
    "audio": "answers are text",
    "modalities": "answers are text",
    "prediction": "there is no speculative decoding",
    "web_search_options": "the server reaches no network",
    "functions": "tools are not supported",
    "function_call": "tools are not supported",
    "reasoning_effort": "the model's template has its own variables: `chat_template_kwargs`",
    "reasoning": "the model's template has its own variables: `chat_template_kwargs`",
    "thinking_token_budget": "answers are not split into reasoning and content",
    "verbosity": "the model has no such setting",
    "logprob_token_ids": "log-probabilities are of the most likely tokens",
    "prompt_logprobs": "the gRPC services have them",
    "previous_response_id": "no response is stored: send the whole conversation as `input`",
    "conversation": "no conversation is stored: send all of it as `input`",
    "prompt": "no prompt is stored",
    "max_tool_calls": "tools are not supported",
    "moderation": "the server's own policies apply",
    "context_management": "the conversation is taken as it is sent",
}
# Fields of no effect in the values that clients send by default; refused in any other.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "priority": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "background": (False,),
    "truncation": ("disabled",),
    "modalities": (["text"],),
    "add_special_tokens": (False,),
    "include_reasoning": (True,),
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "verbosity": ("medium",),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "stream_usage": (False,),
}
# At `$.messages[0].role` of msgspec's messages.
PLACE = re.compile(r" - at `(?:key in )?\$\.?(?P<path>[^`]*)`$")
AT_FAULT = re.compile(r"(?:unknown|(?P<missing>missing required)) field `(?P<name>[^`]*)`")


def document_of(body: bytes) -> dict[str, Any]:
    """Read the JSON object of a body. Raises Refusal."""
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Refusal("FIELD_INVALID", f"the body is not JSON: {error or 'too deep'}") from error
    if not isinstance(document, dict):
        raise Refusal("FIELD_INVALID", "the body is not a JSON object")
    return document


def read(body: bytes, form: type[T]) -> T:
    """Read the JSON body of a request. Raises Refusal, which names the field."""
    document = document_of(body)
    taken = {field.encode_name for field in msgspec.structs.fields(form)}  # type: ignore[arg-type]
    return convert({name: value for name, value in document.items() if is_taken(name, value, taken)}, form)


def is_taken(name: str, value: Any, taken: set[str]) -> bool:
    """Return whether a field is to be read. Raises Refusal for one that is refused.

    A field that nobody knows is read, and refused there, even if it holds nothing: it may be misspelt.
    """
    if name in taken:
        return value is not None
    if name in IGNORED or (value is None and name in {*REFUSED, *NEUTRAL}) or value in NEUTRAL.get(name, ()):
        return False
    if name in REFUSED:
        raise invalid(name, f"is refused: {REFUSED[name]}")
    if name in NEUTRAL:
        raise invalid(name, f"is not supported; may be {' or '.join(map(repr, NEUTRAL[name]))}")
    return True


def convert(document: Any, form: type[T], field: str = "") -> T:
    """Convert a document, which is at `field` of the request, to a form. Raises Refusal, which names the field."""
    try:
        return msgspec.convert(document, form)
    except msgspec.ValidationError as error:
        raise validation_refusal(str(error), field) from error


def validation_refusal(message: str, field: str) -> Refusal:
    """Return the refusal of a document that msgspec does not take, by its message."""
    place = PLACE.search(message)
    problem = message[: place.start()] if place else message
    fault = AT_FAULT.search(problem)
    if fault:
        problem = "is missing" if fault["missing"] else "is no field of this request"
    parts = [field, place["path"] if place else "", fault["name"] if fault else ""]
    path = ".".join(part for part in parts if part).replace(".[", "[")
    return invalid(path or "body", problem)
