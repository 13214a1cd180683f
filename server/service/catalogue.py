"""The methods of FeatureService: the catalogues of the bundles. Reading runs in threads, as a search takes a while."""

import asyncio
from collections.abc import Sequence

from rudder.sae_models.bundle import semantic
from rudder.sae_models.bundle.bundle import Bundle
from rudder.sae_models.bundle.catalogue import QUANTILES, Catalogue, Context, Latent, Summary, Word, by_output
from rudder.sae_models.bundle.semantic import MeaningUnknown
from rudder.server.service import limits
from rudder.server.service.errors import invalid
from rudder.server.service.serving import Serving, requested_bundle
from rudder.v1 import catalogue_pb2

DEFAULT_PAGE_SIZE = 100
DEFAULT_SEARCH_LIMIT = 20


async def get_feature(
    serving: Serving, request: catalogue_pb2.FeatureServiceGetRequest
) -> catalogue_pb2.FeatureServiceGetResponse:
    """Return one latent with the contexts in which it is active."""
    bundle = requested_bundle(serving.engine, request.bundle)
    if request.index >= bundle.manifest.latents:
        problem = f"{bundle.manifest.name} has latents 0 to {bundle.manifest.latents - 1}, not {request.index}"
        raise invalid("index", problem, "FEATURE_UNKNOWN")
    latent, neighbours = await asyncio.to_thread(with_neighbours, bundle.catalogue, request.index)
    detail = catalogue_pb2.FeatureDetail(
        summary=summary_of(bundle, latent.summary),
        top_tokens=latent.tokens,
        contexts=map(context_of, latent.contexts),
        quantiles=map(quantile_of, QUANTILES, latent.quantiles),
        promoted=map(word_of, latent.promoted),
        suppressed=map(word_of, latent.suppressed),
        neighbours=neighbours,
    )
    return catalogue_pb2.FeatureServiceGetResponse(feature=detail)


def with_neighbours(reader: Catalogue, index: int) -> tuple[Latent, list[catalogue_pb2.FeatureNeighbour]]:
    """Read a latent and the labels of its neighbours."""
    latent = reader.get(index)
    labels = (reader.get(near.index).summary.label for near in latent.neighbours)
    return latent, [
        catalogue_pb2.FeatureNeighbour(index=near.index, label=label, cosine=near.cosine)
        for near, label in zip(latent.neighbours, labels, strict=True)
    ]


async def list_features(
    serving: Serving, request: catalogue_pb2.FeatureServiceListRequest
) -> catalogue_pb2.FeatureServiceListResponse:
    """Return a page of latents in order. A page token is the last index of the page before."""
    limits.check(request, serving.bounds)
    bundle = requested_bundle(serving.engine, request.bundle)
    token = request.page_token
    if token and not (token.isascii() and token.isdecimal() and len(token) < 10):
        raise invalid("page_token", "is not one that this method gave")
    after = int(token) if token else -1
    page = await asyncio.to_thread(bundle.catalogue.page, after, request.page_size or DEFAULT_PAGE_SIZE)
    more = bool(page) and page[-1].index < bundle.manifest.latents - 1
    return catalogue_pb2.FeatureServiceListResponse(
        features=summaries_of(bundle, page), next_page_token=str(page[-1].index) if more else ""
    )


async def search_features(
    serving: Serving, request: catalogue_pb2.FeatureServiceSearchRequest
) -> catalogue_pb2.FeatureServiceSearchResponse:
    """Return latents by the words of their labels, or by what labels mean; for steering by output score.

    Raises Refusal if the catalogue has no meanings, or no output scores.
    """
    limits.check(request, serving.bounds)
    bundle = requested_bundle(serving.engine, request.bundle)
    if request.for_steering and not bundle.catalogue.has_output_scores:
        raise invalid("for_steering", f"{bundle.manifest.name} has no output scores: see `rudder steer scores`")
    matches = await asyncio.to_thread(
        search, bundle.catalogue, request.query, request.limit or DEFAULT_SEARCH_LIMIT,
        by_meaning=request.by_meaning, for_steering=request.for_steering,
    )  # fmt: skip
    return catalogue_pb2.FeatureServiceSearchResponse(features=summaries_of(bundle, matches))


def search(reader: Catalogue, words: str, limit: int, *, by_meaning: bool, for_steering: bool) -> list[Summary]:
    """Return up to `limit` latents that a search finds, best first. By meaning, only their order changes."""
    if not by_meaning:
        return reader.search(words, limit, for_steering=for_steering)
    found = search_by_meaning(reader, words, limit)
    return sorted(found, key=by_output, reverse=True) if for_steering else found


def search_by_meaning(reader: Catalogue, words: str, limit: int) -> list[Summary]:
    """Return `semantic.search_by_meaning`. Raises Refusal if the catalogue or the server cannot search by meaning."""
    try:
        return semantic.search_by_meaning(reader, words, limit)
    except MeaningUnknown as error:
        raise invalid("by_meaning", str(error)) from error


def summaries_of(bundle: Bundle, summaries: Sequence[Summary]) -> list[catalogue_pb2.FeatureSummary]:
    """Convert catalogue summaries to FeatureSummary messages."""
    return [summary_of(bundle, summary) for summary in summaries]


def summary_of(bundle: Bundle, summary: Summary) -> catalogue_pb2.FeatureSummary:
    """Convert a catalogue summary to a FeatureSummary."""
    return catalogue_pb2.FeatureSummary(
        bundle=bundle.manifest.name,
        site=bundle.manifest.site,
        index=summary.index,
        label=summary.label,
        frequency=summary.frequency,
        max_activation=summary.max_activation,
        label_origin=summary.origin,
        label_score=summary.label_score,
        label_error=summary.label_error,
        intervention=summary.intervention,
        output_score=summary.output_score,
        input_score=summary.input_score,
    )


def quantile_of(share: float, activation: float) -> catalogue_pb2.ActivationQuantile:
    """Convert a quantile of a latent's activation."""
    return catalogue_pb2.ActivationQuantile(share=share, activation=activation)


def word_of(word: Word) -> catalogue_pb2.LogitWord:
    """Convert a word that a latent promotes or suppresses."""
    return catalogue_pb2.LogitWord(token=word.token, logit=word.logit)


def context_of(context: Context) -> catalogue_pb2.FeatureContext:
    """Convert an excerpt in which a latent is active."""
    return catalogue_pb2.FeatureContext(
        before=context.before,
        token=context.token,
        after=context.after,
        activation=context.activation,
        source=context.source,
        held_out=context.held_out,
    )
