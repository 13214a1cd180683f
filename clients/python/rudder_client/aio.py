"""The client for asyncio, with the methods of `client`."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from rudder.v1 import (
    catalogue_pb2,
    catalogue_pb2_grpc,
    debug_pb2,
    debug_pb2_grpc,
    inference_pb2_grpc,
    policy_pb2,
    policy_pb2_grpc,
)
from rudder_client import channel as wire
from rudder_client.errors import error_of, not_ready, translated
from rudder_client.requests import (
    Prompt,
    Report,
    Sampling,
    Steer,
    complete_request,
    generate_request,
    inspect_request,
    tokenize_request,
)
from rudder_client.results import (
    Chunk,
    Completion,
    Inspection,
    Names,
    Token,
    chunk_of,
    completion_of,
    inspection_of,
    tokens_of,
)

PAGE_SIZE = 1000


class AsyncStream(wire.ForkGuard):
    """The chunks of a running call: an asynchronous iterator. Leaving its `async with` block ends the call."""

    FORK_ATTRIBUTES = ("call",)

    def __init__(self, call: Any) -> None:
        self.call, self.names, self.waiting = call, Names(), deque[Chunk]()
        self.request_id = ""
        self.guard_fork()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        """Return the next chunk. RudderError: the call failed."""
        while not self.waiting:
            with translated():
                message = await self.call.read()
            if message is grpc.aio.EOF:
                raise StopAsyncIteration
            self.request_id = self.request_id or message.request_id
            self.names.learn(message.features)
            self.waiting.extend(chunk_of(delta, self.names) for delta in message.choices)
        return self.waiting.popleft()

    def cancel(self) -> None:
        """End the call; the server frees the request."""
        self.call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()


class AsyncClient(wire.ForkGuard):
    """A connection to a server. A process that is forked must create its own.

    `timeout`: default deadline of a call, in seconds. `credentials`: of TLS, such as `grpc.ssl_channel_credentials()`;
    None: without TLS. `metadata`: sent with every call, names in lower case. `options`: channel options of gRPC.
    """

    FORK_ATTRIBUTES = ("channel", "inference", "catalogue", "models", "policy_service", "debug", "health")

    def __init__(
        self, address: str = "localhost:50051", *, timeout: float | None = None,
        credentials: grpc.ChannelCredentials | None = None, token: str = "", metadata: wire.Metadata = (),
        options: wire.Options = (),
    ) -> None:  # fmt: skip
        settings = wire.options_for(address, options)
        self.timeout = timeout
        self.metadata = (
            *wire.metadata_of(metadata),
            *wire.authorization(token, address, secure=credentials is not None),
        )
        if credentials is None:
            self.channel = grpc.aio.insecure_channel(address, settings)
        else:
            self.channel = grpc.aio.secure_channel(address, credentials, settings)
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.catalogue = catalogue_pb2_grpc.FeatureServiceStub(self.channel)
        self.models = catalogue_pb2_grpc.ModelServiceStub(self.channel)
        self.policy_service = policy_pb2_grpc.PolicyServiceStub(self.channel)
        self.debug = debug_pb2_grpc.DebugServiceStub(self.channel)
        self.health = self.channel.unary_unary(wire.HEALTH_CHECK, wire.as_bytes, wire.as_bytes)
        self.guard_fork()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection and cancel its running calls."""
        closing = self.channel.close()
        # Nothing to wait for in a forked process.
        if closing is not None:
            await closing

    def generate(
        self, prompt: Prompt, *, steer: Steer = None, report: Report | None = None, cache_salt: str = "",
        stream_interval: int = 0, timeout: float | None = None, **sampling: Unpack[Sampling],
    ) -> AsyncStream:  # fmt: skip
        """Generate and stream chunks; `prompt` is text, token ids or the messages of a chat."""
        request = generate_request(prompt, steer, report, cache_salt, stream_interval, sampling)
        return AsyncStream(
            self.inference.Generate(request, timeout=wire.seconds(timeout, self.timeout), metadata=self.metadata)
        )

    async def complete(
        self, prompt: Prompt, *, steer: Steer = None, report: Report | None = None, cache_salt: str = "",
        timeout: float | None = None, **sampling: Unpack[Sampling],
    ) -> Completion:  # fmt: skip
        """Generate, and return when all choices are complete."""
        request = complete_request(prompt, steer, report, cache_salt, sampling)
        with translated():
            return completion_of(
                await self.inference.Complete(
                    request, timeout=wire.seconds(timeout, self.timeout), metadata=self.metadata
                )
            )

    async def inspect(
        self,
        prompt: Prompt,
        *,
        steer: Steer = None,
        report: Report | None = None,
        cache_salt: str = "",
        timeout: float | None = None,
    ) -> Inspection:
        """Return the features of a text; by default the five strongest of each token."""
        request = inspect_request(prompt, steer, report or Report(top_k=5), cache_salt)
        with translated():
            return inspection_of(
                await self.inference.Inspect(
                    request, timeout=wire.seconds(timeout, self.timeout), metadata=self.metadata
                )
            )

    async def tokenize(self, prompt: Prompt, *, timeout: float | None = None) -> tuple[Token, ...]:
        """Return the tokens of a prompt as `generate` would read it, without features."""
        request = tokenize_request(prompt)
        with translated():
            response = await self.inference.Tokenize(
                request, timeout=wire.seconds(timeout, self.timeout), metadata=self.metadata
            )
        return tokens_of(response)

    async def feature(self, index: int, bundle: str = "") -> catalogue_pb2.FeatureDetail:
        """Return one latent: label, frequency, strongest tokens and contexts."""
        request = catalogue_pb2.FeatureServiceGetRequest(bundle=bundle, index=index)
        with translated():
            response: catalogue_pb2.FeatureServiceGetResponse = await self.catalogue.Get(
                request, timeout=self.timeout, metadata=self.metadata
            )
        return response.feature

    async def features(self, bundle: str = "") -> AsyncIterator[catalogue_pb2.FeatureSummary]:
        """List every latent of a bundle, by index."""
        request = catalogue_pb2.FeatureServiceListRequest(bundle=bundle, page_size=PAGE_SIZE)
        while True:
            with translated():
                page = await self.catalogue.List(request, timeout=self.timeout, metadata=self.metadata)
            for feature in page.features:
                yield feature
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def search(
        self,
        words: str,
        *,
        bundle: str = "",
        limit: int = 20,
        by_meaning: bool = False,
        for_steering: bool = False,
    ) -> list[catalogue_pb2.FeatureSummary]:
        """Search latents by words of their label, or by its meaning; best match first, for steering by output score."""
        request = catalogue_pb2.FeatureServiceSearchRequest(
            bundle=bundle, query=words, limit=limit, by_meaning=by_meaning, for_steering=for_steering
        )
        with translated():
            return list((await self.catalogue.Search(request, timeout=self.timeout, metadata=self.metadata)).features)

    async def model(self) -> catalogue_pb2.ModelServiceGetResponse:
        """Return the served model, its bundles and the limits of a request."""
        request = catalogue_pb2.ModelServiceGetRequest()
        with translated():
            response: catalogue_pb2.ModelServiceGetResponse = await self.models.Get(
                request, timeout=self.timeout, metadata=self.metadata
            )
        return response

    async def programs(self) -> list[catalogue_pb2.NamedProgram]:
        """List the operator's programs, which `steer` accepts by name."""
        with translated():
            return list(
                (
                    await self.models.ListPrograms(
                        catalogue_pb2.ListProgramsRequest(), timeout=self.timeout, metadata=self.metadata
                    )
                ).programs
            )

    async def policies(self) -> list[policy_pb2.PolicySummary]:
        """List the policies in force."""
        request = policy_pb2.PolicyServiceListRequest()
        with translated():
            response = await self.policy_service.List(request, timeout=self.timeout, metadata=self.metadata)
        return list(response.policies)

    async def policy(self, name: str) -> policy_pb2.Policy:
        """Return a policy in force. Needs the role `administer`."""
        request = policy_pb2.PolicyServiceGetRequest(name=name)
        with translated():
            response: policy_pb2.PolicyServiceGetResponse = await self.policy_service.Get(
                request, timeout=self.timeout, metadata=self.metadata
            )
        return response.policy

    async def validate(self, policy: policy_pb2.Policy) -> list[policy_pb2.PolicyProblem]:
        """Return every problem that a policy has on the server; none: apply takes it. Needs the role `administer`."""
        request = policy_pb2.ValidateRequest(policy=policy)
        with translated():
            response = await self.policy_service.Validate(request, timeout=self.timeout, metadata=self.metadata)
        return list(response.problems)

    async def apply(self, policy: policy_pb2.Policy) -> policy_pb2.PolicySummary:
        """Put a policy in force in place of the one of its name. Needs the role `administer`."""
        request = policy_pb2.ApplyRequest(policy=policy)
        with translated():
            response: policy_pb2.ApplyResponse = await self.policy_service.Apply(
                request, timeout=self.timeout, metadata=self.metadata
            )
        return response.summary

    async def explain(self, caller: str = "", roles: Sequence[str] = ()) -> policy_pb2.ExplainResponse:
        """Return the policies that bind this caller, and in sentences what they lock and forbid.

        Of another caller, with its roles, only to a caller with the role `administer`.
        """
        request = policy_pb2.ExplainRequest(caller=caller, roles=roles)
        with translated():
            response: policy_pb2.ExplainResponse = await self.policy_service.Explain(
                request, timeout=self.timeout, metadata=self.metadata
            )
        return response

    async def ledger(self) -> debug_pb2.GetLedgerResponse:
        """Return what calls hold of the server: without calls, all of `held` is 0. RudderError: it failed."""
        with translated():
            response: debug_pb2.GetLedgerResponse = await self.debug.GetLedger(
                debug_pb2.GetLedgerRequest(), timeout=self.timeout, metadata=self.metadata
            )
        return response

    async def wait_ready(self, timeout: float = 60.0) -> None:
        """Wait until the server is SERVING. RudderError: it is not after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            remaining = deadline - time.monotonic()
            try:
                if (
                    await self.health(
                        wire.WHOLE_SERVER, timeout=max(min(remaining, wire.CHECK_S), 0.01), metadata=self.metadata
                    )
                    == wire.IS_SERVING
                ):
                    return
                problem = None
            except grpc.RpcError as failure:
                problem = failure
            if remaining <= 0:
                raise not_ready(timeout) if problem is None else error_of(problem)
            await asyncio.sleep(wire.BETWEEN_CHECKS_S)
