"""Search for latents by what their labels mean, with a sentence embedder (optional dependency)."""

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
    """A search by meaning that cannot be made here; the message says what is missing."""


@cache
def embedder(name: str) -> Embed:
    """Texts to unit vectors [n, e], by a sentence-transformers model: a folder or a name on the hub.

    MeaningUnknown: the package is not installed, or there is no such model.
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


def store(path: Path, name: str, embed: Embed) -> int:
    """Stores the meaning of every label of the catalogue file at `path`; how many."""
    reader = Catalogue(path)
    labelled = [summary for summary in reader.page(-1, PAGE) if summary.label]
    reader.close()
    vectors = embed([summary.label for summary in labelled]) if labelled else np.zeros((0, 0), np.float32)
    catalogue.write_meanings(path, name, [summary.index for summary in labelled], vectors)
    return len(labelled)


def nearest(reader: Catalogue, words: str, limit: int, embed: Embed | None = None) -> list[Summary]:
    """Up to `limit` latents whose labels mean most nearly what the words mean, nearest first.

    Without `embed`, the catalogue's own embedder. MeaningUnknown: no meanings are stored, or no embedder is at hand.
    """
    if not reader.embedder:
        raise MeaningUnknown("the catalogue has no meanings stored: import the bundle with --embedder")
    embed = embed or embedder(reader.embedder)
    indices, vectors = reader.meanings()
    cosine = vectors @ embed([words])[0]
    best = np.argsort(-cosine, kind="stable")[: max(limit, 0)]
    return [reader.get(indices[place]).summary for place in best]
