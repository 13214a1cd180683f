"""FeatureService: the catalogues of the bundles."""

import asyncio
from collections.abc import Sequence

from rudder.sae_models.bundle.bundle import Bundle
from rudder.sae_models.bundle.catalogue import QUANTILES, Catalogue, Summary, Word
from rudder.sae_models.bundle.catalogue import Context as Excerpt
from rudder.sae_models.bundle.semantic import MeaningUnknown, search_by_meaning
from rudder.server.service import limits
from rudder.server.service.errors import invalid
from rudder.server.service.serving import Context, Serving, bundle_named
from rudder.v1 import catalogue_pb2, catalogue_pb2_grpc

PAGE_SIZE = 100
FOUND = 20


class FeatureServicer(catalogue_pb2_grpc.FeatureServiceServicer):
    """The contract's methods; the catalogue is read in threads, since a search may take a while."""

    def __init__(self, serving: Serving) -> None:
        self.serving = serving

    async def Get(
        self, request: catalogue_pb2.FeatureServiceGetRequest, _: Context
    ) -> catalogue_pb2.FeatureServiceGetResponse:
        """One latent with its contexts."""
        bundle = bundle_named(self.serving.engine, request.bundle)
        if request.index >= bundle.manifest.latents:
            problem = f"{bundle.manifest.name} has latents 0 to {bundle.manifest.latents - 1}, not {request.index}"
            raise invalid("index", problem, "FEATURE_UNKNOWN")
        latent = await asyncio.to_thread(bundle.catalogue.get, request.index)
        detail = catalogue_pb2.FeatureDetail(
            summary=summary_of(bundle, latent.summary),
            top_tokens=latent.tokens,
            contexts=map(context_of, latent.contexts),
            quantiles=map(quantile_of, QUANTILES, latent.quantiles),
            promoted=map(word_of, latent.promoted),
            suppressed=map(word_of, latent.suppressed),
        )
        return catalogue_pb2.FeatureServiceGetResponse(feature=detail)

    async def List(
        self, request: catalogue_pb2.FeatureServiceListRequest, _: Context
    ) -> catalogue_pb2.FeatureServiceListResponse:
        """A page of latents in order; its token is the last index of the page before."""
        limits.check(request, self.serving.bounds)
        bundle = bundle_named(self.serving.engine, request.bundle)
        token = request.page_token
        if token and not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise invalid("page_token", "is not one that this method gave")
        size = request.page_size or PAGE_SIZE
        after = int(token) if token else -1
        found = await asyncio.to_thread(bundle.catalogue.page, after, size)
        more = bool(found) and found[-1].index < bundle.manifest.latents - 1
        return catalogue_pb2.FeatureServiceListResponse(
            features=summaries_of(bundle, found), next_page_token=str(found[-1].index) if more else ""
        )

    async def Search(
        self, request: catalogue_pb2.FeatureServiceSearchRequest, _: Context
    ) -> catalogue_pb2.FeatureServiceSearchResponse:
        """Latents by words of their label, or by what it means."""
        limits.check(request, self.serving.bounds)
        bundle = bundle_named(self.serving.engine, request.bundle)
        search = by_meaning if request.by_meaning else Catalogue.search
        found = await asyncio.to_thread(search, bundle.catalogue, request.query, request.limit or FOUND)
        return catalogue_pb2.FeatureServiceSearchResponse(features=summaries_of(bundle, found))


def by_meaning(reader: Catalogue, words: str, limit: int) -> list[Summary]:
    """`search_by_meaning`, or the refusal that says what is missing."""
    try:
        return search_by_meaning(reader, words, limit)
    except MeaningUnknown as error:
        raise invalid("by_meaning", str(error)) from error


def summaries_of(bundle: Bundle, found: Sequence[Summary]) -> list[catalogue_pb2.FeatureSummary]:
    """The contract's form of a list of latents."""
    return [summary_of(bundle, summary) for summary in found]


def summary_of(bundle: Bundle, summary: Summary) -> catalogue_pb2.FeatureSummary:
    """The contract's form of a latent in a list."""
    return catalogue_pb2.FeatureSummary(
        bundle=bundle.manifest.name,
        site=bundle.manifest.site,
        index=summary.index,
        label=summary.label,
        frequency=summary.frequency,
        max_activation=summary.max_activation,
        label_origin=summary.origin,
    )


def quantile_of(share: float, activation: float) -> catalogue_pb2.ActivationQuantile:
    """The contract's form of a quantile."""
    return catalogue_pb2.ActivationQuantile(share=share, activation=activation)


def word_of(word: Word) -> catalogue_pb2.LogitWord:
    """The contract's form of a word that a latent promotes or suppresses."""
    return catalogue_pb2.LogitWord(token=word.token, logit=word.logit)


def context_of(context: Excerpt) -> catalogue_pb2.FeatureContext:
    """The contract's form of a place where a latent is active."""
    return catalogue_pb2.FeatureContext(
        before=context.before,
        token=context.token,
        after=context.after,
        activation=context.activation,
        source=context.source,
    )
