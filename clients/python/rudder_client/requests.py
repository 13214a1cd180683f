"""Conversion of Python values to request messages."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, TypedDict

from rudder.v1 import inference_pb2, program_pb2
from rudder_client.program import Program, Row, row_message


class Sampling(TypedDict, total=False):
    """Sampling parameters, with the defaults of vLLM. Choice i of n uses seed + i.

    `truncate_prompt_tokens`: keep so many tokens, the last of the prompt.
    """

    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    include_stop: bool
    logprobs: int
    n: int
    logit_bias: Mapping[int, float]
    structured: "Structured"
    bad_words: Sequence[str]
    allowed_token_ids: Sequence[int]
    skip_special_tokens: bool
    prompt_logprobs: int
    truncate_prompt_tokens: int


@dataclass(frozen=True)
class Structured:
    """The form that an output must have: one of these. `json_schema`: a schema as a mapping, or as JSON text."""

    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: Sequence[str] | None = None
    json_object: bool | None = None


@dataclass(frozen=True)
class Chat:
    """The messages of a chat. `arguments`: variables of the chat template. `continue_final_message`: do not begin a new
    message, continue the last one.
    """

    messages: "Sequence[Message]"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    continue_final_message: bool = False


# A message of a chat: `role` and `content`.
Message = Mapping[str, str]
Prompt = str | Sequence[int] | Sequence[Message] | Chat


@dataclass(frozen=True)
class Topic:
    """A topic to steer towards: a concept of a served bundle, by name or word.

    `strength`: share, at most 1, of the largest dose that keeps texts within budgets of fluency; by default 1. `kl`:
    the dose by its divergence from the unsteered model instead, in nats per generated token.
    """

    topic: str
    strength: float | None = None
    kl: float | None = None


Steer = Program | program_pb2.Program | Topic | str | None


@dataclass(frozen=True)
class Report:
    """Features to report: rows by site, and the `top_k` strongest latents of each token at `sites`.

    `sites`: by default every site with an SAE. `prompt`: report the tokens of the prompt too. `pooled`: report sum,
    maximum and count over a choice. `tokens`: report each token.
    """

    features: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    top_k: int = 0
    sites: Sequence[str] = ()
    prompt: bool = False
    pooled: bool = False
    tokens: bool = True


def prompt_message(prompt: Prompt) -> inference_pb2.Prompt:
    """Convert text, token ids or the messages of a chat. ValueError: something else, or several of them mixed."""
    if isinstance(prompt, Chat):
        message = prompt_message(prompt.messages)
        message.chat.template_arguments = json.dumps(dict(prompt.arguments)) if prompt.arguments else ""
        message.chat.continue_final_message = prompt.continue_final_message
        return message
    if isinstance(prompt, str):
        return inference_pb2.Prompt(text=prompt)
    if isinstance(prompt, bytes | Mapping):
        raise ValueError(f"prompt: a {type(prompt).__name__} is neither text, token ids nor the messages of a chat")
    parts = list(prompt)
    chat = [chat_message(part) for part in parts if isinstance(part, Mapping)]
    if chat and len(chat) < len(parts):
        raise ValueError("prompt: give token ids or the messages of a chat, not both")
    if chat:
        return inference_pb2.Prompt(chat=inference_pb2.Chat(messages=chat))
    return inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=[token_id(part) for part in parts]))


def chat_message(message: Message) -> inference_pb2.ChatMessage:
    """Convert a message of a chat. ValueError: it has other keys than role and content."""
    if set(message) != {"role", "content"}:
        raise ValueError(f"prompt: a message has role and content, not {', '.join(map(str, message)) or 'nothing'}")
    for key, value in message.items():
        if not isinstance(value, str):
            raise ValueError(f"prompt: the {key} of a message is text, not {type(value).__name__}")
    return inference_pb2.ChatMessage(role=message["role"], content=message["content"])


def token_id(value: Any) -> int:
    """Return a token id; whole numbers of NumPy and PyTorch are taken too. ValueError: it is none."""
    try:
        if not isinstance(value, bool):
            return index(value)
    except TypeError:
        pass
    raise ValueError(f"prompt: {value!r} is neither a token id nor a message of a chat")


def truncated(prompt: inference_pb2.Prompt, sampling: Sampling) -> inference_pb2.Prompt:
    """Return the prompt, to be truncated if the sampling parameters say so."""
    if "truncate_prompt_tokens" in sampling:
        prompt.truncate_prompt_tokens = sampling["truncate_prompt_tokens"]
    return prompt


def steering_message(steer: Steer) -> inference_pb2.Steering | None:
    """Convert a program, the name of one of the server's, or a topic."""
    match steer:
        case None:
            return None
        case str():
            return inference_pb2.Steering(name=steer)
        case Program():
            return inference_pb2.Steering(program=steer.message)
        case Topic():
            return inference_pb2.Steering(topic=topic_message(steer))
    return inference_pb2.Steering(program=steer)


def topic_message(steer: Topic) -> inference_pb2.TopicSteering:
    """Convert a topic. ValueError: it has a strength and a divergence."""
    if steer.strength is not None and steer.kl is not None:
        raise ValueError("Topic: give strength or kl, not both")
    return inference_pb2.TopicSteering(topic=steer.topic, strength=steer.strength, kl=steer.kl)


def report_message(report: Report | None) -> inference_pb2.Report | None:
    """Convert a report."""
    if report is None:
        return None
    return inference_pb2.Report(
        features=[
            inference_pb2.SiteFeature(site=site, row=row_message(row))
            for site, rows in report.features.items()
            for row in rows
        ],
        top_k=report.top_k,
        sites=report.sites,
        prompt=report.prompt,
        pooled=report.pooled,
        no_tokens=not report.tokens,
    )


def sampling_message(sampling: Sampling) -> inference_pb2.Sampling:
    """Convert sampling parameters."""
    values: dict[str, Any] = dict(sampling)
    structured = values.pop("structured", None)
    values.pop("truncate_prompt_tokens", None)
    for name in {"stop", "bad_words"} & values.keys():
        values[name] = texts(name, values[name])
    message = inference_pb2.Sampling(**values)
    if structured is not None:
        message.structured.CopyFrom(structured_message(structured))
    return message


def texts(name: str, value: Sequence[str]) -> list[str]:
    """Return several texts as a list. ValueError: it is one text, whose characters would count as texts."""
    if isinstance(value, str | bytes):
        raise ValueError(f"{name}: give a list of texts, not one text")
    return list(value)


def structured_message(structured: Structured) -> inference_pb2.StructuredOutput:
    """Convert the form of an output. ValueError: it has not exactly one field."""
    values = {name: value for name, value in vars(structured).items() if value is not None}
    if len(values) != 1:
        raise ValueError(f"Structured takes one of its fields, not {', '.join(values) or 'none'}")
    ((name, value),) = values.items()
    match name:
        case "json_schema" if not isinstance(value, str):
            value = json.dumps(value)
        case "choice":
            value = inference_pb2.Choices(texts=texts(name, value))
    return inference_pb2.StructuredOutput(**{name: value})


def generate_request(
    prompt: Prompt, steer: Steer, report: Report | None, cache_salt: str, stream_interval: int, sampling: Sampling
) -> inference_pb2.GenerateRequest:
    """Build the request of `generate`."""
    return inference_pb2.GenerateRequest(
        prompt=truncated(prompt_message(prompt), sampling),
        sampling=sampling_message(sampling),
        steering=steering_message(steer),
        report=report_message(report),
        stream_interval=stream_interval,
        cache_salt=cache_salt,
    )


def complete_request(
    prompt: Prompt, steer: Steer, report: Report | None, cache_salt: str, sampling: Sampling
) -> inference_pb2.CompleteRequest:
    """Build the request of `complete`."""
    return inference_pb2.CompleteRequest(
        prompt=truncated(prompt_message(prompt), sampling),
        sampling=sampling_message(sampling),
        steering=steering_message(steer),
        report=report_message(report),
        cache_salt=cache_salt,
    )


def inspect_request(prompt: Prompt, steer: Steer, report: Report, cache_salt: str = "") -> inference_pb2.InspectRequest:
    """Build the request of `inspect`."""
    return inference_pb2.InspectRequest(
        prompt=prompt_message(prompt),
        steering=steering_message(steer),
        report=report_message(report),
        cache_salt=cache_salt,
    )


def tokenize_request(prompt: Prompt) -> inference_pb2.TokenizeRequest:
    """Build the request of `tokenize`."""
    return inference_pb2.TokenizeRequest(prompt=prompt_message(prompt))
