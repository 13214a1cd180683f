"""Semantic search over a catalogue's labels, with sentence-transformers (optional dependency)."""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from rudder.sae_models.bundle import catalogue
from rudder.sae_models.bundle.catalogue import Catalogue, Summary, Vectors
from rudder.sae_models.errors import UserError

PAGE = 1 << 20

Embed = Callable[[Sequence[str]], Vectors]


class MeaningUnknown(UserError):
    """Semantic search is not available; the message says what is missing."""


@cache
def load_embedder(name: str) -> Embed:
    """Return a function from texts to unit vectors [n, e]; `name` is a sentence-transformers model or its folder.

    MeaningUnknown: the package is not installed, or the model does not exist.
    """
    try:
        package: Any = import_module("sentence_transformers")
    except ImportError as error:
        needed = "search by meaning needs sentence-transformers: pip install 'rudder-server[semantic]'"
        raise MeaningUnknown(needed) from error
    try:
        model = package.SentenceTransformer(name, device="cpu")
    except (OSError, ValueError) as error:
        raise MeaningUnknown(f"sentence embedder {name}: {error}") from error
    return lambda texts: np.asarray(model.encode(list(texts), normalize_embeddings=True), np.float32)


def embed_labels(path: Path, name: str, embed: Embed) -> int:
    """Embed every label of the catalogue file at `path` and store the vectors in it. Return the number of labels."""
    reader = Catalogue(path)
    labelled = [summary for summary in reader.page(-1, PAGE) if summary.label]
    reader.close()
    vectors = embed([summary.label for summary in labelled]) if labelled else np.zeros((0, 0), np.float32)
    catalogue.write_embeddings(path, name, [summary.index for summary in labelled], vectors)
    return len(labelled)


def search_by_meaning(reader: Catalogue, query: str, limit: int, embed: Embed | None = None) -> list[Summary]:
    """Return up to `limit` latents, those with labels most similar in meaning to the query first.

    `embed` defaults to the catalogue's own embedder. MeaningUnknown: the catalogue has no embeddings, or the embedder
    cannot be loaded.
    """
    if not reader.embedder:
        raise MeaningUnknown("the catalogue has no meanings stored: import the bundle with --embedder")
    embed = embed or load_embedder(reader.embedder)
    indices, vectors = reader.embeddings()
    cosine = vectors @ embed([query])[0]
    best = np.argsort(-cosine, kind="stable")[: max(limit, 0)]
    return [reader.get(indices[position]).summary for position in best]
