"""Fields that the endpoints share, as the contract's Sampling."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from rudder.server.http.extension import NAMES, Rudder
from rudder.server.http.fields import UInt32, UInt63
from rudder.server.service.errors import invalid
from rudder.v1 import inference_pb2

# Fields with the same name and meaning in the contract.
SHARED = (
    "min_tokens", "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "seed", "n", "skip_special_tokens",
)  # fmt: skip
LISTS = ("stop_token_ids", "bad_words", "allowed_token_ids")
# The contract's fields by their names here; each endpoint adds those of its own.
SAMPLING_NAMES = NAMES | {
    "sampling.include_stop": "include_stop_str_in_output",
    "sampling.structured": "structured_outputs",
    "prompt.truncate_prompt_tokens": "truncate_prompt_tokens",
    "prompt.chat.template_arguments": "chat_template_kwargs",
    "prompt.chat.messages": "messages",
    "prompt.chat": "messages",
    "sampling": "",
}


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a stream has besides the text. `include_obfuscation` is not done here, whatever it says."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The form of the output, by vLLM's names."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class JsonSchema(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A JSON schema. Its name and description are for people; it is always obeyed strictly."""

    schema: dict[str, Any]
    name: str = ""
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The form of the output, by OpenAI's names."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Sampled(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields of OpenAI's and vLLM's that chats and completions share."""

    model: str
    rudder: Rudder = msgspec.field(default_factory=Rudder)
    stream: bool = False
    stream_options: StreamOptions = msgspec.field(default_factory=StreamOptions)
    max_tokens: UInt32 | None = None
    min_tokens: UInt32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**32 - 1)] | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: UInt63 | None = None
    n: UInt32 | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[UInt32] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool | None = None
    logit_bias: dict[str, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[UInt32] | None = None
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None
    truncate_prompt_tokens: UInt32 | None = None
    cache_salt: str | None = None


def sampling_of(request: Sampled, max_tokens: int | None, logprobs: int | None) -> inference_pb2.Sampling:
    """Return the request's Sampling. Raises Refusal for what the contract cannot say."""
    values = {name: value for name in SHARED if (value := getattr(request, name)) is not None}
    values |= {name: value for name in LISTS if (value := getattr(request, name)) is not None}
    sampling = inference_pb2.Sampling(**values, max_tokens=max_tokens, logprobs=logprobs)
    if request.min_tokens and max_tokens is None:
        raise invalid("min_tokens", "needs a maximum number of tokens beside it")
    if request.top_k is not None:
        # vLLM's -1 is all tokens, as 0 is.
        sampling.top_k = max(request.top_k, 0)
    sampling.stop.extend([request.stop] if isinstance(request.stop, str) else request.stop or ())
    sampling.include_stop, sampling.ignore_eos = request.include_stop_str_in_output, request.ignore_eos
    for token, bias in (request.logit_bias or {}).items():
        sampling.logit_bias[token_id(token)] = float32(bias)
    if form := structured_of(request.structured_outputs, request.response_format):
        sampling.structured.CopyFrom(form)
    return sampling


def token_id(text: str) -> int:
    """Return the token id that a key of `logit_bias` is."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise invalid("logit_bias", f"{text[:20]!r} is no token id")
    return int(text)


def float32(value: float) -> float:
    """Return a value that fits the contract's fp32 field; what is larger is refused later, as the table says."""
    return max(-3e38, min(value, 3e38))


def structured_of(
    structured: StructuredOutputs | None, response_format: ResponseFormat | None
) -> inference_pb2.StructuredOutput | None:
    """Return the form that the output must have; None if any."""
    if response_format and response_format.type != "text":
        if structured:
            raise invalid("structured_outputs", "may not be beside response_format")
        return formatted(response_format)
    if structured is None:
        return None
    given = [name for name in structured.__struct_fields__ if getattr(structured, name) not in (None, False)]
    if len(given) != 1:
        raise invalid("structured_outputs", f"must name one form, has {len(given)}")
    value = getattr(structured, given[0])
    match given[0]:
        case "json":
            return inference_pb2.StructuredOutput(json_schema=value if isinstance(value, str) else as_json(value))
        case "choice":
            return inference_pb2.StructuredOutput(choice=inference_pb2.Choices(texts=value))
    return inference_pb2.StructuredOutput(**{given[0]: value})


def formatted(response_format: ResponseFormat) -> inference_pb2.StructuredOutput:
    """Return OpenAI's `response_format` as the contract's form."""
    if response_format.type == "json_object":
        return inference_pb2.StructuredOutput(json_object=True)
    if response_format.json_schema is None:
        raise invalid("response_format.json_schema", "is missing")
    return inference_pb2.StructuredOutput(json_schema=as_json(response_format.json_schema.schema))


def as_json(document: Any) -> str:
    """Write a JSON document."""
    return msgspec.json.encode(document).decode()
