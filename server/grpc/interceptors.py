"""What surrounds every call of the contract, once per call: its id, its end as an error with a reason, its metrics."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from rudder.server.monitoring import metrics
from rudder.server.service.errors import Refusal, abort, refusal_of
from rudder.server.service.serving import REQUEST_ID, Context, Serving

OURS = "/rudder."
# What gRPC adds to a call that an earlier attempt at the same call came before.
PREVIOUS_ATTEMPTS = "grpc-previous-rpc-attempts"
Behaviour = Callable[[Any, Context], Awaitable[Any]]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the behaviours of Rudder's own services; health and reflection stay as they are."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """The handler with its behaviour wrapped."""
        handler = await continuation(details)
        method: str = details.method
        if handler is None or not method.startswith(OURS):
            return handler
        make = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        behaviour = handler.unary_stream if handler.response_streaming else handler.unary_unary
        name = method.rpartition(".")[2].replace("/", ".")
        call = surrounded(behaviour, name, handler.request_deserializer, self.serving)
        # The request stays bytes until `call`: what gRPC itself says of bytes that it cannot read has no reason.
        return make(call, None, handler.response_serializer)


def surrounded(behaviour: Behaviour, method: str, deserialize: Callable[[bytes], Any], serving: Serving) -> Behaviour:
    """`behaviour` with a fresh request id, its exceptions as statuses, and its outcome counted."""

    async def call(request: bytes, context: Context) -> Any:
        request_id = secrets.token_hex(12)
        REQUEST_ID.set(request_id)
        context.set_trailing_metadata((("rudder-request-id", request_id),))
        began = time.monotonic()
        if any(key == PREVIOUS_ATTEMPTS for key, _ in context.invocation_metadata() or ()):
            metrics.retried(method)

        def ended(outcome: str) -> None:
            metrics.request_done(method, outcome, time.monotonic() - began)

        try:
            check_open(serving)
            response = await behaviour(deserialize(request), context)
        except asyncio.CancelledError:
            ended(how_cancelled(context))
            raise
        except Exception as error:
            refusal = refusal_of(error)
            ended(refusal.reason)
            # A client that reads nothing does not take its refusal either: then the call is dropped.
            async with asyncio.timeout(serving.config.limits.write_timeout_s):
                await abort(context, refusal, request_id)
        ended("OK")
        return response

    return call


def how_cancelled(context: Context) -> str:
    """By its deadline, or by the client."""
    left = context.time_remaining()
    return "DEADLINE_EXCEEDED" if left is not None and left <= 0 else "CANCELLED"


def check_open(serving: Serving) -> None:
    """Refuse calls that could not end well."""
    if serving.draining:
        raise Refusal("DRAINING", "the server is leaving")
    if not serving.engine.healthy:
        raise Refusal("ENGINE_DEAD", "the engine is gone")
