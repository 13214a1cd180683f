"""A hashed n-gram model over token ids: a logistic score that reads no activations, so that no edit can reach it.

The score of token t is bias + the sum over k = 1..order of weights[bucket of the k-gram that ends at t], in log-odds of
what the model was trained to notice. N-grams are hashed into buckets (Weinberger et al., arXiv 0902.2206). A model is
one safetensors file. Imports no torch; `analysis/token_training.py` trains models.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from rudder.sae_models.errors import UserError
from rudder.sae_models.files import write_atomically
from rudder.sae_models.statistics import Floats

FORMAT_VERSION = 1
MAX_ORDER = 5
MIN_BUCKETS, MAX_BUCKETS = 1 << 10, 1 << 20
# Stands before the first token of a text; no vocabulary has this id.
START = (1 << 32) - 1
# Odd multipliers of the newest token, the one before it, ... (digits of pi), and of the finaliser (splitmix64).
MULTIPLIERS = 0x243F6A8885A308D3, 0x13198A2E03707345, 0xA4093822299F31D1, 0x082EFA98EC4E6C89, 0x452821E638D01377
FINALISER, FOLD, MASK = 0xBF58476D1CE4E5B9, 29, (1 << 64) - 1


@dataclass(frozen=True)
class TokenModel:
    """weights: float32 [buckets], a power of two of them. `vocabulary`: `vocabulary_sha256` of its tokenizer."""

    weights: NDArray[np.float32]
    bias: float
    order: int
    vocabulary: str

    def scores(self, ids: Sequence[int], context: Sequence[int] = ()) -> Floats:
        """Return the score [n] of each token of `ids` [n].

        context: the tokens before them, of which the last `order - 1` matter; a text begins where it has fewer. Pass
        what a guard counts: without BOS and excluded tokens.
        """
        before = list(context)[-(self.order - 1) :] if self.order > 1 else []
        grams, weight = buckets([*before, *ids], self.order, len(self.weights)), self.weights.item
        return np.array([sum(map(weight, each)) + self.bias for each in grams[len(before) :]], np.float64)


def buckets(ids: Sequence[int], order: int, count: int) -> list[list[int]]:
    """Return the bucket [n, order] of the k-gram, k = 1..order, that ends at each token of a text's ids [n].

    count: number of buckets, a power of two. A server scores one token at a time, where a loop is ten times as fast as
    array operations.
    """
    padded, shift = [*[START] * (order - 1), *map(int, ids)], 65 - count.bit_length()
    multipliers = MULTIPLIERS[:order]
    return [_buckets(padded[last - order + 1 : last + 1], multipliers, shift) for last in range(order - 1, len(padded))]


def _buckets(tokens: Sequence[int], multipliers: Sequence[int], shift: int) -> list[int]:
    """Return the buckets of the n-grams that end at the last of `tokens`, the shortest first."""
    total, found = 0, []
    for length, (token, multiplier) in enumerate(zip(reversed(tokens), multipliers, strict=True)):
        total = (total + (token + 1) * multiplier) & MASK
        hashed = (total + length) & MASK
        found.append((((hashed ^ (hashed >> FOLD)) * FINALISER) & MASK) >> shift)
    return found


def vocabulary_sha256(vocabulary: Mapping[str, int]) -> str:
    """Return the SHA-256 of a tokenizer's vocabulary (`get_vocab()`): ids mean nothing under another one."""
    ordered = sorted(vocabulary.items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(ordered, ensure_ascii=True).encode()).hexdigest()


def save(path: Path, model: TokenModel) -> str:
    """Write a model; return the SHA-256 of its file."""
    metadata = {
        "format_version": FORMAT_VERSION,
        "order": model.order,
        "bias": repr(model.bias),
        "vocabulary": model.vocabulary,
    }
    content = save_tensors({"weights": model.weights}, {name: str(value) for name, value in metadata.items()})
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def load(path: Path, sha256: str = "") -> TokenModel:
    """Read a model. Raise UserError if its SHA-256 is not the one given, or it is not a valid model.

    An empty `sha256` accepts any file.
    """
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if sha256 and found != sha256:
        raise UserError(f"token model: {path}: SHA-256 is {found}, not {sha256}")
    try:
        tensors = load_tensors(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
        return _checked(tensors, metadata)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"token model: {path}: {error}") from error


def _checked(tensors: Mapping[str, NDArray[np.generic]], metadata: Mapping[str, str]) -> TokenModel:
    """Return the model that a file's tensors and metadata describe. ValueError: they are not of a model."""
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise ValueError(f"format_version is {metadata.get('format_version')}, not {FORMAT_VERSION}")
    weights, order, bias = tensors.get("weights"), int(metadata.get("order", "")), float(metadata.get("bias", ""))
    if weights is None or weights.dtype != np.float32 or weights.ndim != 1 or len(tensors) != 1:
        raise ValueError("weights: must be the only tensor, float32 [buckets]")
    if not MIN_BUCKETS <= len(weights) <= MAX_BUCKETS or len(weights).bit_count() != 1:
        raise ValueError(f"weights: {len(weights)} is not a power of two between {MIN_BUCKETS} and {MAX_BUCKETS}")
    if not 1 <= order <= MAX_ORDER:
        raise ValueError(f"order: {order} is not between 1 and {MAX_ORDER}")
    if not np.isfinite(weights).all() or not math.isfinite(bias):
        raise ValueError("weights, bias: must be finite")
    return TokenModel(weights.astype(np.float32), bias, order, metadata.get("vocabulary", ""))
