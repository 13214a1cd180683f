"""The client for asyncio; as `client`, method by method."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from rudder.v1 import catalogue_pb2, catalogue_pb2_grpc, inference_pb2_grpc
from rudder_client import channel as wire
from rudder_client.errors import error_of, not_ready, translated
from rudder_client.requests import Prompt, Report, Sampling, Steer, complete_request, generate_request, inspect_request
from rudder_client.results import Chunk, Completion, Inspection, Names, chunk_of, completion_of, inspection_of

PAGE_SIZE = 1000


class AsyncStream:
    """An answer as it comes: an asynchronous iterator of chunks; leaving its `async with` block ends it."""

    def __init__(self, call: Any) -> None:
        self.call, self.names, self.waiting = call, Names(), deque[Chunk]()
        self.request_id = ""

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        """The next chunk. RudderError: the call failed."""
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
        """End the answer now."""
        self.call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()


class AsyncClient:
    """A connection to a server. `timeout`: seconds that each call may take, unless it says otherwise."""

    def __init__(self, address: str = "localhost:50051", *, timeout: float | None = None) -> None:
        self.channel = grpc.aio.insecure_channel(address, wire.OPTIONS)
        self.timeout = timeout
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.catalogue = catalogue_pb2_grpc.FeatureServiceStub(self.channel)
        self.models = catalogue_pb2_grpc.ModelServiceStub(self.channel)
        self.health = self.channel.unary_unary(wire.HEALTH_CHECK, wire.as_bytes, wire.as_bytes)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection and what runs over it."""
        await self.channel.close()

    def generate(
        self, prompt: Prompt, *, steer: Steer = None, report: Report | None = None, cache_salt: str = "",
        stream_interval: int = 0, timeout: float | None = None, **sampling: Unpack[Sampling],
    ) -> AsyncStream:  # fmt: skip
        """Generate, chunk by chunk; `prompt` is text, token ids or the messages of a chat."""
        request = generate_request(prompt, steer, report, cache_salt, stream_interval, sampling)
        return AsyncStream(self.inference.Generate(request, timeout=timeout or self.timeout))

    async def complete(
        self, prompt: Prompt, *, steer: Steer = None, report: Report | None = None, cache_salt: str = "",
        timeout: float | None = None, **sampling: Unpack[Sampling],
    ) -> Completion:  # fmt: skip
        """Generate, and return when all choices are whole."""
        request = complete_request(prompt, steer, report, cache_salt, sampling)
        with translated():
            return completion_of(await self.inference.Complete(request, timeout=timeout or self.timeout))

    async def inspect(
        self, prompt: Prompt, *, steer: Steer = None, report: Report | None = None, timeout: float | None = None
    ) -> Inspection:
        """The features of a text; by default the five strongest of each token."""
        request = inspect_request(prompt, steer, report or Report(top_k=5))
        with translated():
            return inspection_of(await self.inference.Inspect(request, timeout=timeout or self.timeout))

    async def feature(self, index: int, bundle: str = "") -> catalogue_pb2.FeatureDetail:
        """One latent: label, frequency, strongest tokens and contexts."""
        request = catalogue_pb2.FeatureServiceGetRequest(bundle=bundle, index=index)
        with translated():
            response: catalogue_pb2.FeatureServiceGetResponse = await self.catalogue.Get(request, timeout=self.timeout)
        return response.feature

    async def features(self, bundle: str = "") -> AsyncIterator[catalogue_pb2.FeatureSummary]:
        """Every latent of a bundle, in order."""
        request = catalogue_pb2.FeatureServiceListRequest(bundle=bundle, page_size=PAGE_SIZE)
        while True:
            with translated():
                page = await self.catalogue.List(request, timeout=self.timeout)
            for feature in page.features:
                yield feature
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def search(
        self, words: str, *, bundle: str = "", limit: int = 20, by_meaning: bool = False
    ) -> list[catalogue_pb2.FeatureSummary]:
        """Latents by words of their label, or by what labels mean; best first."""
        request = catalogue_pb2.FeatureServiceSearchRequest(
            bundle=bundle, query=words, limit=limit, by_meaning=by_meaning
        )
        with translated():
            return list((await self.catalogue.Search(request, timeout=self.timeout)).features)

    async def model(self) -> catalogue_pb2.ModelServiceGetResponse:
        """What is served, and within which limits."""
        request = catalogue_pb2.ModelServiceGetRequest()
        with translated():
            response: catalogue_pb2.ModelServiceGetResponse = await self.models.Get(request, timeout=self.timeout)
        return response

    async def programs(self) -> list[catalogue_pb2.NamedProgram]:
        """The operator's programs, which `steer` takes by name."""
        with translated():
            return list(
                (await self.models.ListPrograms(catalogue_pb2.ListProgramsRequest(), timeout=self.timeout)).programs
            )

    async def wait_ready(self, timeout: float = 60.0) -> None:
        """Return when the server is SERVING. RudderError when it is not in time."""
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            try:
                if await self.health(wire.WHOLE_SERVER, timeout=max(min(left, wire.CHECK_S), 0.01)) == wire.IS_SERVING:
                    return
                problem = None
            except grpc.RpcError as failure:
                problem = failure
            if left <= 0:
                raise not_ready(timeout) if problem is None else error_of(problem)
            await asyncio.sleep(wire.BETWEEN_CHECKS_S)
