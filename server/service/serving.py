"""What all servicers share, and how a call is refused or ends in metrics."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from rudder.sae_models.bundle.bundle import Bundle
from rudder.server import config
from rudder.server.engine.engine import Engine
from rudder.server.program.watch import Watched
from rudder.server.service.errors import Refusal, invalid
from rudder.server.service.limits import Bounds
from rudder.server.service.pace import Pace
from rudder.v1 import inference_pb2

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Message, Message]
REQUEST_ID: ContextVar[str] = ContextVar("request_id")


@dataclass
class Serving:
    """A running engine and what the services keep beside it. `draining`: new calls are refused."""

    config: config.Config
    engine: Engine
    bounds: Bounds
    pace: Pace
    labels: dict[str, list[str]]
    draining: bool = False
    watched: dict[bytes, tuple[Watched, ...]] = field(default_factory=dict)
    # One thread: the tokenizer must not be used from two.
    tokenizing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tokenizer"))

    async def in_tokenizer_thread(self, work: Callable[[], T]) -> T:
        """The result of work with the tokenizer."""
        return await asyncio.get_running_loop().run_in_executor(self.tokenizing, work)


def labels_of(bundle: Bundle) -> list[str]:
    """The label of each latent."""
    return [latent.label for latent in bundle.catalogue.page(-1, bundle.manifest.latents)]


def bundle_named(engine: Engine, name: str) -> Bundle:
    """The bundle of a request's field `bundle`; without a name the only one."""
    if name:
        if name not in engine.bundles:
            raise invalid("bundle", f"no bundle {name!r} is served", "FEATURE_UNKNOWN")
        return engine.bundles[name]
    if len(engine.bundles) != 1:
        raise invalid("bundle", f"must be one of {', '.join(engine.bundles) or 'none: the server has no bundle'}")
    return next(iter(engine.bundles.values()))


def bundle_at(engine: Engine, site: str) -> str | None:
    """Name of the bundle at a site."""
    return next((name for name, bundle in engine.bundles.items() if bundle.manifest.site == site), None)


def feature_info(serving: Serving, site: str, latent: int) -> inference_pb2.FeatureInfo:
    """What the catalogue calls a latent of the site's bundle."""
    bundle = bundle_at(serving.engine, site) or ""
    return inference_pb2.FeatureInfo(site=site, bundle=bundle, index=latent, label=serving.labels[bundle][latent])


async def send(context: Context, message: Message, limits: config.Limits) -> None:
    """Write one message of a stream. Refusal CLIENT_TOO_SLOW: it was not taken in time; the caller's request ends."""
    try:
        async with asyncio.timeout(limits.write_timeout_s):
            await context.write(message)
    except TimeoutError as error:
        problem = f"a message lay unread for {limits.write_timeout_s:g} s"
        raise Refusal("CLIENT_TOO_SLOW", problem) from error


def fitting(message: T, limits: config.Limits) -> T:
    """`message`, unless it is too large to send."""
    size = message.ByteSize()  # type: ignore[attr-defined]
    if size > limits.max_reply_bytes:
        raise invalid(
            "report", f"the answer has {size} bytes, at most {limits.max_reply_bytes}: ask for fewer features"
        )
    return message
