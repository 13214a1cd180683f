"""Methods of the contract beyond the OpenAI API, at their gRPC paths and in protobuf's JSON form; and live figures."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from rudder.server.http.answers import answer_headers, event
from rudder.server.http.exchange import Exchange
from rudder.server.http.extension import as_document, parsed
from rudder.server.http.fields import document_of
from rudder.server.service import catalogue, inference, live, model, policies
from rudder.server.service.record import CallRecord
from rudder.server.service.serving import Serving
from rudder.v1 import catalogue_pb2, inference_pb2, policy_pb2

# Live figures come so often. A stream of them ends after some minutes: who goes on shows credentials again.
LIVE_INTERVAL_S, LIVE_S = 1.0, 300.0
LIVE, LIVE_METHOD = b"/rudder.v1.Live/Watch", "Live.Watch"
# Where protobuf's messages about a request begin: no name of a field.
WHOLE_REQUEST = "request"
Behaviour = Callable[[Serving, CallRecord, Any], Awaitable[Message]]


@dataclass(frozen=True)
class Method:
    """A method that takes one message and returns one. `name`: `Service.Method`, as in the table of roles."""

    name: str
    request: type[Message]
    behaviour: Behaviour

    @property
    def path(self) -> bytes:
        """Path of the method, the same as over gRPC."""
        return f"/rudder.v1.{self.name.replace('.', '/')}".encode()


def at_once(function: Callable[[Serving, CallRecord, Any], Message]) -> Behaviour:
    """Return a behaviour that waits for nothing."""

    async def behaviour(serving: Serving, record: CallRecord, request: Any) -> Message:
        return function(serving, record, request)

    return behaviour


ALL = (
    Method("InferenceService.Inspect", inference_pb2.InspectRequest, inference.inspect),
    Method("InferenceService.Tokenize", inference_pb2.TokenizeRequest, inference.tokenize),
    Method("FeatureService.Get", catalogue_pb2.FeatureServiceGetRequest, lambda s, _, r: catalogue.get_feature(s, r)),
    Method(
        "FeatureService.List", catalogue_pb2.FeatureServiceListRequest, lambda s, _, r: catalogue.list_features(s, r)
    ),
    Method(
        "FeatureService.Search",
        catalogue_pb2.FeatureServiceSearchRequest,
        lambda s, _, r: catalogue.search_features(s, r),
    ),
    Method("ModelService.Get", catalogue_pb2.ModelServiceGetRequest, at_once(lambda s, *_: model.get_model(s))),
    Method(
        "ModelService.ListPrograms", catalogue_pb2.ListProgramsRequest, at_once(lambda s, *_: model.list_programs(s))
    ),
    Method("PolicyService.List", policy_pb2.PolicyServiceListRequest, at_once(lambda s, *_: policies.list_policies(s))),
    Method("PolicyService.Get", policy_pb2.PolicyServiceGetRequest, at_once(lambda s, _, r: policies.get_policy(s, r))),
    Method("PolicyService.Validate", policy_pb2.ValidateRequest, lambda s, _, r: policies.validate(s, r)),
    Method(
        "PolicyService.Explain",
        policy_pb2.ExplainRequest,
        at_once(lambda s, record, r: policies.explain(s, record.caller, r)),
    ),
)
METHODS: Mapping[bytes, Method] = {method.path: method for method in ALL}


async def answer_method(exchange: Exchange, serving: Serving, record: CallRecord, method: Method) -> None:
    """Read a request of a method and answer it. Raises Refusal, which names the field as over gRPC."""
    exchange.names = {WHOLE_REQUEST: ""}
    with serving.pending.held(exchange.length):
        document = document_of(await exchange.body())
        request = parsed(document, method.request(), WHOLE_REQUEST)
        async with exchange.watched():
            response = await method.behaviour(serving, record, request)
            await exchange.answer(200, as_document(response), answer_headers(record))


async def answer_live(exchange: Exchange, serving: Serving, record: CallRecord) -> None:
    """Write an event with live figures every second, until the client goes, the server drains or LIVE_S have passed."""
    await exchange.body()
    ends = time.monotonic() + LIVE_S
    async with exchange.watched():
        while True:
            await exchange.event(event(live.figures(serving)), answer_headers(record))
            if serving.draining or not serving.engine.healthy or time.monotonic() >= ends:
                break
            await asyncio.sleep(LIVE_INTERVAL_S)
        await exchange.end()
