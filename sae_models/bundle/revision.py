"""A bundle with another catalogue in place of its own."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

from rudder.sae_models.bundle import bundle, catalogue, semantic
from rudder.sae_models.bundle.bundle import Bundle
from rudder.sae_models.bundle.catalogue import Latent


def write(old: Bundle, latents: Iterable[Latent], measured: bool) -> Bundle:
    """Write a bundle anew, atomically and in place, with the entries of its latents, and with its statistics if
    `measured`. Labels that were embedded for semantic search are embedded again. The catalogue of `old` is closed.

    MeaningUnknown: that embedder cannot be loaded; the bundle is as it was.
    """
    embedder = old.catalogue.embedder
    embed = semantic.load_embedder(embedder) if embedder else None
    with tempfile.TemporaryDirectory() as scratch:
        database = Path(scratch) / bundle.CATALOGUE
        catalogue.write(database, latents)
        old.catalogue.close()
        if embed is not None:
            semantic.embed_labels(database, embedder, embed)
        statistics = old.statistics if measured else None
        return bundle.write(old.path, old.manifest, old.sae, statistics, old.conformance, database)
