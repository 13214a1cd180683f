"""A bundle with another catalogue in place of its own."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

from rudder.sae_models import concepts
from rudder.sae_models.bundle import bundle, catalogue, semantic
from rudder.sae_models.bundle.bundle import Bundle
from rudder.sae_models.bundle.catalogue import Latent
from rudder.sae_models.files import write_atomically


def write(old: Bundle, latents: Iterable[Latent], measured: bool) -> Bundle:
    """Write a bundle anew, atomically and in place, with the entries of its latents, and with its statistics if
    `measured`. Labels that were embedded for semantic search are embedded again; steering concepts, which depend on the
    SAE alone, stay. The catalogue of `old` is closed.

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
        steering = old.path / concepts.FILE
        kept = steering.read_bytes() if steering.is_file() else None
        written = bundle.write(old.path, old.manifest, old.sae, statistics, old.conformance, database)
        if kept is not None:
            write_atomically(steering, kept)
        return written
