"""The running engine and the state that all calls share."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from rudder.sae_models.bundle.bundle import Bundle
from rudder.server import config as configuration
from rudder.server.caller import Caller
from rudder.server.config import Config
from rudder.server.engine.engine import Engine
from rudder.server.identity.authenticator import Authenticator, authenticator_of
from rudder.server.monitoring.metrics import Metrics
from rudder.server.monitoring.spans import Spans
from rudder.server.program.cache import ByteCache
from rudder.server.program.watch import Watched
from rudder.server.safety.audit.trail import Trail
from rudder.server.safety.store import PolicyStore
from rudder.server.service.budget import ByteBudget
from rudder.server.service.errors import invalid
from rudder.server.service.limits import Bounds, bounds_of
from rudder.server.service.pace import Pace
from rudder.server.service.quotas import QuotaLedger
from rudder.server.service.tokenizing import Tokenizers
from rudder.v1 import inference_pb2

T = TypeVar("T")
WATCH_CACHE_BYTES = 32 << 20


class Sized(Protocol):
    """A protobuf message, for what it weighs."""

    def ByteSize(self) -> int:  # noqa: N802
        """Return the serialised size in bytes."""


S = TypeVar("S", bound=Sized)


@dataclass
class Serving:
    """A running engine and the state that all calls share.

    `labels`: of each bundle's latents; `pending`: bytes of the requests in progress; `policies`: those in force;
    `authenticator`: makes callers of credentials. `draining`: new calls are refused; `watched`: cache of compiled
    reports. `calls`: tasks of the calls in progress; `aborted`: they were cancelled. `audit`: the audit log, if there
    is one. `spans`: what sends spans, if the server has a collector.
    """

    config: Config
    engine: Engine
    metrics: Metrics
    bounds: Bounds
    pace: Pace
    labels: dict[str, list[str]]
    tokenizers: Tokenizers
    pending: ByteBudget
    policies: PolicyStore
    authenticator: Authenticator = field(default_factory=Authenticator)
    quotas: QuotaLedger = field(default_factory=QuotaLedger)
    draining: bool = False
    watched: ByteCache[tuple[Watched, ...]] = field(default_factory=lambda: ByteCache(WATCH_CACHE_BYTES))
    calls: set["asyncio.Task[Any]"] = field(default_factory=set)
    aborted: bool = False
    audit: Trail | None = None
    spans: Spans | None = None

    @classmethod
    def around(
        cls,
        engine: Engine,
        config: Config,
        metrics: Metrics,
        policies: PolicyStore | None = None,
        audit: Trail | None = None,
    ) -> "Serving":
        """Read what calls need from the engine's model and bundles. Without `policies`, none is in force."""
        bounds = bounds_of(config.limits, engine.model.max_model_len, engine.model.vocab_size)
        labels = {name: latent_labels(bundle) for name, bundle in engine.bundles.items()}
        pending = ByteBudget(config.limits.max_pending_bytes, metrics.set_pending_bytes)
        tokenizers = Tokenizers(lambda: engine.tokenizer)
        authenticator = authenticator_of(config.identity, metrics.reload_failed)
        store = policies or PolicyStore(engine, allow_uncertified=config.policies.allow_uncertified)
        pace = Pace(config.stream)
        return cls(
            config, engine, metrics, bounds, pace, labels, tokenizers, pending, store, authenticator, audit=audit
        )

    def abort(self) -> None:
        """Fail all calls in progress with DRAINING."""
        self.aborted = True
        for task in self.calls:
            task.cancel()

    async def in_tokenizer_thread(self, caller: Caller, chars: int, work: Callable[[Any], T]) -> T:
        """Return the result of work with a tokenizer on so many characters, or tokens, of this caller."""
        return await self.tokenizers.run(caller.share_key, chars, work)


def latent_labels(bundle: Bundle) -> list[str]:
    """Return the label of each latent."""
    return [latent.label for latent in bundle.catalogue.page(-1, bundle.manifest.latents)]


def requested_bundle(engine: Engine, name: str) -> Bundle:
    """Return the bundle of a request's field `bundle`; without a name the only one."""
    if name:
        if name not in engine.bundles:
            raise invalid("bundle", f"no bundle {name!r} is served", "FEATURE_UNKNOWN")
        return engine.bundles[name]
    if len(engine.bundles) != 1:
        raise invalid("bundle", f"must be one of {', '.join(engine.bundles) or 'none: the server has no bundle'}")
    return next(iter(engine.bundles.values()))


def bundle_at_site(engine: Engine, site: str) -> str | None:
    """Return the name of the first bundle of a site, whose dictionary is read where the strongest latents are asked."""
    return next((name for name, bundle in engine.bundles.items() if bundle.manifest.site == site), None)


def feature_info(serving: Serving, site: str, latent: int) -> inference_pb2.FeatureInfo:
    """Return site, bundle, index and label of a latent of the site's bundle."""
    bundle = bundle_at_site(serving.engine, site) or ""
    return inference_pb2.FeatureInfo(site=site, bundle=bundle, index=latent, label=serving.labels[bundle][latent])


def require_sendable(response: S, limits: configuration.Limits) -> S:
    """Return `response`; Refusal if it is larger than limits.max_reply_bytes."""
    size = response.ByteSize()
    if size > limits.max_reply_bytes:
        problem = f"the answer has {size} bytes, at most {limits.max_reply_bytes}: ask for fewer features"
        raise invalid("report", problem)
    return response
