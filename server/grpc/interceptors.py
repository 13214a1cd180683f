"""Adapts `service.call.begin_call` to gRPC: metadata in, trailers and statuses out."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import grpc

from rudder.server import failpoints
from rudder.server.grpc.credentials import credentials_of
from rudder.server.grpc.status import Context, abort
from rudder.server.identity.errors import CredentialError
from rudder.server.identity.roles import require_method
from rudder.server.monitoring.traces import correlation_of
from rudder.server.service.call import begin_call
from rudder.server.service.errors import Refusal, refusal_of
from rudder.server.service.record import CallRecord
from rudder.server.service.serving import Serving

OWN_SERVICES = "/rudder."
REFLECTION = "/grpc.reflection."
# gRPC clients add it to a call that they retry by themselves.
PREVIOUS_ATTEMPTS = "grpc-previous-rpc-attempts"
Behaviour = Callable[[Any, Context], Awaitable[Any]]
# A servicer's signature has no room for it.
RECORD: ContextVar[CallRecord] = ContextVar("record")


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the behaviours of Rudder's own services. Reflection is for authenticated callers; health is for all."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """Return the method's handler with its behaviour wrapped."""
        handler = await continuation(details)
        method: str = details.method
        if handler is not None and method.startswith(REFLECTION):
            return authenticated(handler, method_name(method), self.serving)
        if handler is None or not method.startswith(OWN_SERVICES):
            return handler
        make_handler = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        behaviour = handler.unary_stream if handler.response_streaming else handler.unary_unary
        call = surrounded(behaviour, method_name(method), handler.request_deserializer, self.serving)
        # Without a deserialiser of its own: gRPC's error about bytes that it cannot parse would carry no reason.
        return make_handler(call, None, handler.response_serializer)


def method_name(path: str) -> str:
    """Return `Service.Method` of a gRPC path."""
    return path.rpartition(".")[2].replace("/", ".")


def authenticated(handler: Any, method: str, serving: Serving) -> Any:
    """Return a bidirectional handler whose callers must authenticate and have a role for `method`."""

    async def call(requests: Any, context: Context) -> Any:
        try:
            require_method(serving.authenticator.caller(credentials_of(context)), method)
        except CredentialError as error:
            await abort(context, refusal_of(error))
        async for response in handler.stream_stream(requests, context):
            yield response

    return grpc.stream_stream_rpc_method_handler(call, handler.request_deserializer, handler.response_serializer)


def surrounded(behaviour: Behaviour, method: str, deserialize: Callable[[bytes], Any], serving: Serving) -> Behaviour:
    """Return `behaviour` within `begin_call`, its request id in the trailers and its refusals as statuses."""

    async def call(request: bytes, context: Context) -> Any:
        metadata = context.invocation_metadata() or ()
        if any(key == PREVIOUS_ATTEMPTS for key, _ in metadata):
            serving.metrics.request_retried(method)
        try:
            correlation, deadline = correlation_of(metadata), deadline_of(context)
            credentials = credentials_of(context)
            async with begin_call(serving, method, credentials, len(request), correlation, deadline) as record:
                RECORD.set(record)
                require_size(request, serving.config.limits.max_message_bytes)
                with serving.pending.held(len(request)):
                    failpoints.hit("decode")
                    response = await behaviour(deserialize(request), context)
                context.set_trailing_metadata(trailers_of(record))
                return response
        except Refusal as refusal:
            # A client that reads nothing does not take its refusal either: then gRPC drops the call.
            async with asyncio.timeout(serving.config.limits.write_timeout_s):
                await abort(context, refusal)

    return call


def require_size(request: bytes, maximum: int) -> None:
    """Raise Refusal MESSAGE_TOO_LARGE if a request message has more than `maximum` bytes."""
    if len(request) > maximum:
        raise Refusal("MESSAGE_TOO_LARGE", f"the request has {len(request)} bytes, at most {maximum}")


def deadline_of(context: Context) -> float | None:
    """Return the call's deadline by `time.monotonic`; None without one."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def trailers_of(record: CallRecord) -> tuple[tuple[str, str], ...]:
    """Return what a successful call's trailers say: its request id; of a generation, its program and routing key."""
    trailers = [("rudder-request-id", record.request_id)]
    if record.choices:
        trailers.append(("rudder-program-digest", record.program_digest))
        trailers.append(("rudder-routing-key", record.routing_key))
    return tuple(trailers)
