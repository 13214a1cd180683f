"""The contract's services: each method hands its request to the service, and a stream's messages to gRPC."""

import asyncio

import grpc
from google.protobuf.message import Message

from rudder.server import config, failpoints
from rudder.server.grpc.interceptors import RECORD
from rudder.server.grpc.status import Context
from rudder.server.service import catalogue, inference, ledger, model, policies
from rudder.server.service.errors import Refusal
from rudder.server.service.serving import Serving
from rudder.v1 import (
    catalogue_pb2,
    catalogue_pb2_grpc,
    debug_pb2,
    debug_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    policy_pb2,
    policy_pb2_grpc,
)

# How long gRPC may take to cancel the handler of a call whose client is gone.
CANCELLATION_S = 1.0


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Generation, as a stream or whole, and the features of a text."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:
        """Write deltas as they come."""

        async def write(message: inference_pb2.GenerateResponse) -> None:
            await send(context, message, self.serving.config.limits)

        await inference.generate(self.serving, RECORD.get(), request, write)

    async def Complete(self, request: inference_pb2.CompleteRequest, _: Context) -> inference_pb2.CompleteResponse:
        """Return all choices in one message."""
        return await inference.complete(self.serving, RECORD.get(), request)

    async def Inspect(self, request: inference_pb2.InspectRequest, _: Context) -> inference_pb2.InspectResponse:
        """Return the features of each prompt token."""
        return await inference.inspect(self.serving, RECORD.get(), request)

    async def Tokenize(self, request: inference_pb2.TokenizeRequest, _: Context) -> inference_pb2.TokenizeResponse:
        """Return the tokens of a prompt."""
        return await inference.tokenize(self.serving, RECORD.get(), request)


class FeatureServicer(catalogue_pb2_grpc.FeatureServiceServicer):
    """The catalogues of the bundles."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving

    async def Get(
        self, request: catalogue_pb2.FeatureServiceGetRequest, _: Context
    ) -> catalogue_pb2.FeatureServiceGetResponse:
        """Return one latent with its contexts."""
        return await catalogue.get_feature(self.serving, request)

    async def List(
        self, request: catalogue_pb2.FeatureServiceListRequest, _: Context
    ) -> catalogue_pb2.FeatureServiceListResponse:
        """Return a page of latents."""
        return await catalogue.list_features(self.serving, request)

    async def Search(
        self, request: catalogue_pb2.FeatureServiceSearchRequest, _: Context
    ) -> catalogue_pb2.FeatureServiceSearchResponse:
        """Return latents by the words of their labels, or by what labels mean."""
        return await catalogue.search_features(self.serving, request)


class ModelServicer(catalogue_pb2_grpc.ModelServiceServicer):
    """What is served, and within which limits."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving

    async def Get(self, _: catalogue_pb2.ModelServiceGetRequest, __: Context) -> catalogue_pb2.ModelServiceGetResponse:
        """Return model, sites, bundles with hashes, and limits."""
        return model.get_model(self.serving)

    async def ListPrograms(
        self, _: catalogue_pb2.ListProgramsRequest, __: Context
    ) -> catalogue_pb2.ListProgramsResponse:
        """Return the operator's programs."""
        return model.list_programs(self.serving)


class PolicyServicer(policy_pb2_grpc.PolicyServiceServicer):
    """Policies in force, checked, applied and explained."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving

    async def List(self, _: policy_pb2.PolicyServiceListRequest, __: Context) -> policy_pb2.PolicyServiceListResponse:
        """Return the policies in force."""
        return policies.list_policies(self.serving)

    async def Get(self, request: policy_pb2.PolicyServiceGetRequest, _: Context) -> policy_pb2.PolicyServiceGetResponse:
        """Return one of them whole."""
        return policies.get_policy(self.serving, request)

    async def Validate(self, request: policy_pb2.ValidateRequest, _: Context) -> policy_pb2.ValidateResponse:
        """Return every problem of a policy."""
        return await policies.validate(self.serving, request)

    async def Apply(self, request: policy_pb2.ApplyRequest, _: Context) -> policy_pb2.ApplyResponse:
        """Put a policy in force."""
        return await policies.apply(self.serving, RECORD.get().caller, request)

    async def Explain(self, request: policy_pb2.ExplainRequest, _: Context) -> policy_pb2.ExplainResponse:
        """Return what binds a caller, in words."""
        return policies.explain(self.serving, RECORD.get().caller, request)


class DebugServicer(debug_pb2_grpc.DebugServiceServicer):
    """What an operator looks into."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving

    async def GetLedger(self, _: debug_pb2.GetLedgerRequest, __: Context) -> debug_pb2.GetLedgerResponse:
        """Return what calls hold of the server."""
        return await ledger.get_ledger(self.serving, RECORD.get())


async def send(context: Context, message: Message, limits: config.Limits) -> None:
    """Write one message of a stream. Raises Refusal CLIENT_TOO_SLOW if the client does not take it in time."""
    try:
        async with asyncio.timeout(limits.write_timeout_s):
            await failpoints.pause("stream.write")
            await context.write(message)
    except TimeoutError as error:
        problem = f"a message lay unread for {limits.write_timeout_s:g} s"
        raise Refusal("CLIENT_TOO_SLOW", problem) from error
    except grpc.aio.InternalError:
        # The client is gone, and the cancellation of this task is on its way: that says so, and an error would not.
        await asyncio.sleep(CANCELLATION_S)
        raise
