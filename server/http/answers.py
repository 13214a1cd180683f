"""What every endpoint does with a request: reads it, asks the service, writes the answer whole or as events."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from rudder.server.http.errors import Headers
from rudder.server.http.exchange import Exchange
from rudder.server.http.extension import Rudder, extend
from rudder.server.http.usage import TokenTexts
from rudder.server.service import inference
from rudder.server.service.errors import Refusal, invalid
from rudder.server.service.record import CallRecord
from rudder.server.service.serving import Serving
from rudder.v1 import inference_pb2

STREAMED, WHOLE = "InferenceService.Generate", "InferenceService.Complete"
# The operator's text of a refusal may be empty, and OpenAI's may not.
REFUSED = "The request was refused by a policy of this server."


@dataclass(frozen=True)
class Asked:
    """A request in the contract's terms.

    `names`: its own names of the contract's fields. `default_max_tokens`: see `prepare`.
    """

    model: str
    stream: bool
    prompt: inference_pb2.Prompt
    sampling: inference_pb2.Sampling
    extension: Rudder
    names: Mapping[str, str]
    cache_salt: str = ""
    default_max_tokens: int | None = None

    def fill(self, request: Any) -> Any:
        """Return a message of the contract, filled."""
        request.prompt.CopyFrom(self.prompt)
        request.sampling.CopyFrom(self.sampling)
        request.cache_salt = self.cache_salt
        extend(request, self.extension)
        return request


@dataclass
class Call:
    """One call of an endpoint, as its answer needs it. `created`: seconds since 1970."""

    serving: Serving
    record: CallRecord
    texts: TokenTexts
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def model(self) -> str:
        """Name of the model."""
        name: str = self.serving.engine.model.name
        return name


class Answer(Protocol):
    """The form of an endpoint's answer to one call."""

    asked: Asked

    async def events(self, message: inference_pb2.GenerateResponse) -> bytes:
        """Return the events of a message of the stream."""

    async def last_events(self) -> bytes:
        """Return the events that end the stream."""

    async def document(self, response: inference_pb2.CompleteResponse) -> dict[str, Any]:
        """Return the whole answer."""

    def failure(self, body: dict[str, Any]) -> bytes:
        """Return the events that end a stream which fails, with the body of the error."""


async def respond(exchange: Exchange, call: Call, answer: Answer) -> None:
    """Run a request and answer it. Raises Refusal."""
    asked, record = answer.asked, call.record
    if asked.model != call.model:
        raise invalid("model", f"no model {asked.model[:100]!r} is served, but {call.model!r}")
    if asked.stream:
        record.method = STREAMED
        await respond_as_stream(exchange, call, answer)
        return
    request = asked.fill(inference_pb2.CompleteRequest())
    response = await inference.complete(call.serving, record, request, asked.default_max_tokens)
    for choice in response.choices:
        require_sound(choice)
    await exchange.answer(200, await answer.document(response), answer_headers(record))


async def respond_as_stream(exchange: Exchange, call: Call, answer: Answer) -> None:
    """Answer with events as tokens come; nothing before the first token."""

    async def send(message: inference_pb2.GenerateResponse) -> None:
        for delta in message.choices:
            require_sound(delta)
        await exchange.event(await answer.events(message), answer_headers(call.record))

    request = answer.asked.fill(inference_pb2.GenerateRequest())
    await inference.generate(call.serving, call.record, request, send, answer.asked.default_max_tokens)
    await exchange.end(await answer.last_events())


def answer_headers(record: CallRecord) -> Headers:
    """Return the headers of an answer: the request's id, and its program's digest if it runs one."""
    headers = [(b"x-request-id", record.request_id.encode())]
    if record.program_digest:
        headers.append((b"x-rudder-program-digest", record.program_digest.encode()))
    return headers


def require_sound(choice: inference_pb2.ChoiceDelta | inference_pb2.Choice) -> None:
    """Raise Refusal INTERNAL if the engine failed on a choice, for which the API has no reason of the end."""
    if choice.finish_reason == inference_pb2.FINISH_REASON_ERROR:
        raise Refusal("INTERNAL", "the engine failed on this request")


def event(document: Any) -> bytes:
    """Return a JSON document as an event of a stream."""
    return b"data: " + msgspec.json.encode(document) + b"\n\n"


DONE = b"data: [DONE]\n\n"
