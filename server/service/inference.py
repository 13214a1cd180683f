"""The methods of InferenceService: generation, as a stream or whole, and the features of a text."""

from collections.abc import Awaitable, Callable
from typing import Any

from rudder.server.service import limits
from rudder.server.service.errors import Refusal
from rudder.server.service.prepare import prepare, require_possible_length
from rudder.server.service.prompt import prompt_ids, token_texts
from rudder.server.service.record import CallRecord
from rudder.server.service.run import run, run_whole
from rudder.server.service.serving import Serving, require_sendable
from rudder.v1 import inference_pb2

Send = Callable[[inference_pb2.GenerateResponse], Awaitable[None]]


async def generate(
    serving: Serving,
    record: CallRecord,
    request: inference_pb2.GenerateRequest,
    send: Send,
    default_max_tokens: int | None = limits.DEFAULT_MAX_TOKENS,
) -> None:
    """Send deltas as they come; nothing before the first token, so that a client can retry elsewhere until then.

    `default_max_tokens`: see `prepare`.
    """
    job = await prepare(serving, record.caller, request, record.binding, default_max_tokens)
    request_id = record.request_id

    async def emit(delta: inference_pb2.ChoiceDelta) -> None:
        nonlocal request_id
        message = inference_pb2.GenerateResponse(request_id=request_id, features=job.features.take(), choices=[delta])
        request_id = ""
        await send(message)

    await run(serving, job, record, emit)


async def complete(
    serving: Serving,
    record: CallRecord,
    request: inference_pb2.CompleteRequest,
    default_max_tokens: int | None = limits.DEFAULT_MAX_TOKENS,
) -> inference_pb2.CompleteResponse:
    """Return the same choices in one message."""
    job = await prepare(serving, record.caller, request, record.binding, default_max_tokens)
    choices = await run_whole(serving, job, record)
    response = inference_pb2.CompleteResponse(
        request_id=record.request_id, features=job.features.take(), choices=map(choice_of, choices)
    )
    return require_sendable(response, serving.config.limits)


async def inspect(
    serving: Serving, record: CallRecord, request: inference_pb2.InspectRequest
) -> inference_pb2.InspectResponse:
    """Return the features of each prompt token. One token is generated, so that the engine reads the whole prompt."""
    job = await prepare(serving, record.caller, request, record.binding)
    (choice,) = await run_whole(serving, job, record)
    if refusing := record.choices[0].refusing:
        policy, rule, *_, position, _ = refusing.verdict
        raise Refusal("POLICY_REFUSED", f"policy {policy!r}, rule {rule!r}, token {position}: {refusing.text}")
    ids = job.calls[0].prompt_ids
    texts = await serving.in_tokenizer_thread(record.caller, len(ids), lambda tokenizer: token_texts(ids, tokenizer))
    response = inference_pb2.InspectResponse(
        request_id=record.request_id,
        features=job.features.take(),
        token_ids=ids,
        token_texts=texts,
        activations=choice.activations,
        pooled=choice.pooled,
        attestation=choice.attestation,
    )
    return require_sendable(response, serving.config.limits)


async def tokenize(
    serving: Serving, record: CallRecord, request: inference_pb2.TokenizeRequest
) -> inference_pb2.TokenizeResponse:
    """Return the tokens of a prompt, as `generate` would read them."""
    limits.check(request, serving.bounds)
    chars = await require_possible_length(request.prompt, serving)

    def work(tokenizer: Any) -> tuple[tuple[int, ...], list[str]]:
        ids = prompt_ids(request.prompt, tokenizer, serving.bounds, serving.config.prompt)
        return ids, token_texts(ids, tokenizer)

    ids, texts = await serving.in_tokenizer_thread(record.caller, chars, work)
    response = inference_pb2.TokenizeResponse(
        request_id=record.request_id, token_ids=ids, token_texts=texts, tokens=len(ids)
    )
    return require_sendable(response, serving.config.limits)


def choice_of(delta: inference_pb2.ChoiceDelta) -> inference_pb2.Choice:
    """Convert a whole delta to a Choice, which has the same fields by the same numbers."""
    return inference_pb2.Choice.FromString(delta.SerializeToString())
