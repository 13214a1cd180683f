"""From the engine's reported features to the contract's columns: each feature named once a stream, zeros left out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rudder.server.engine.telemetry.hub import Features
from rudder.v1 import inference_pb2

MAX_SLICE_VALUES = 4096

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


class Activations(NamedTuple):
    """Non-zero activations as columns [n]. `features`: numbers in the stream's FeatureTable."""

    positions: Ints
    features: Ints
    values: Floats


class FeatureTable:
    """The stream's numbering of features: first the watched ones, then latents of the top-k sites as they appear."""

    def __init__(
        self,
        watched: Sequence[inference_pb2.FeatureInfo],
        sites: Sequence[str],
        info: Callable[[str, int], inference_pb2.FeatureInfo],
    ) -> None:
        self.sites, self.info = sites, info
        self.watched = self.count = len(watched)
        self.unsent = list(watched)
        self.numbers: dict[tuple[int, int], int] = {}
        self.watched_latents = {(sites.index(w.site), w.index) for w in watched if w.bundle and w.site in sites}

    def number(self, site: int, latent: int) -> int:
        """Return the number of a latent, a new one at its first appearance; -1 if it is watched: reported already."""
        if (site, latent) in self.watched_latents:
            return -1
        if (site, latent) not in self.numbers:
            self.numbers[site, latent] = self.count
            self.unsent.append(self.info(self.sites[site], latent))
            self.count += 1
        return self.numbers[site, latent]

    def take(self) -> list[inference_pb2.FeatureInfo]:
        """Return the features added since the last call, in the order of their numbers."""
        features, self.unsent = self.unsent, []
        return features


@dataclass
class PoolingState:
    """Sum, maximum and number of active tokens per feature of one choice, over `tokens` tokens."""

    tokens: int = 0
    sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    maxima: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    active: Ints = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, activations: Activations, tokens: int) -> None:
        """Add the activations of the next tokens."""
        self.tokens += tokens
        missing = int(activations.features.max(initial=-1)) + 1 - len(self.sums)
        if missing > 0:
            self.sums, self.active = np.pad(self.sums, (0, missing)), np.pad(self.active, (0, missing))
            self.maxima = np.pad(self.maxima, (0, missing), constant_values=-np.inf)
        np.add.at(self.sums, activations.features, activations.values)
        np.add.at(self.active, activations.features, 1)
        np.maximum.at(self.maxima, activations.features, activations.values)

    def features(self, always: int) -> list[inference_pb2.PooledFeature]:
        """Return the features that were active on any token, and the first `always` of the table."""
        missing = max(0, always - len(self.sums))
        sums, active = np.pad(self.sums, (0, missing)), np.pad(self.active, (0, missing))
        maxima = np.where(active > 0, np.pad(self.maxima, (0, missing)), 0.0)
        return [
            inference_pb2.PooledFeature(
                feature=i, sum=sums[i], max=maxima[i], active_tokens=int(active[i]), tokens=self.tokens
            )
            for i in np.flatnonzero((active > 0) | (np.arange(len(active)) < always)).tolist()
        ]


def slices(features: Features) -> Iterator[Features]:
    """Cut features of many tokens into parts of about MAX_SLICE_VALUES values, each worth some milliseconds."""
    values = features.activations.shape[1] + int(np.prod(features.top_values.shape[1:]))
    tokens = max(1, MAX_SLICE_VALUES // max(1, values))
    if len(features.activations) <= tokens:
        yield features
        return
    for begin in range(features.first, features.end, tokens):
        yield features.between(begin, begin + tokens)


def activations_of(features: Features, table: FeatureTable) -> Activations:
    """Return the non-zero activations of watched rows and top-k latents, in the order of positions."""
    tokens, watched = np.nonzero(features.activations)
    parts = [(features.first + tokens, watched, features.activations[tokens, watched])]
    if features.top_values.size:
        parts.append(top_activations(features, table))
    positions, numbers, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(positions, kind="stable")
    return Activations(
        positions[order].astype(np.int64), numbers[order].astype(np.int64), values[order].astype(np.float32)
    )


def top_activations(features: Features, table: FeatureTable) -> tuple[Ints, Ints, Floats]:
    """Return (positions, numbers, values) of the active top-k latents that are not watched."""
    tokens, sites, ranks = np.nonzero(features.top_values > 0)
    latents = features.top_latents[tokens, sites, ranks].astype(np.int64)
    # The table is a Python dictionary: look each distinct latent up once, not once a token.
    keys, inverse = np.unique((sites << 32) | latents, return_inverse=True)
    distinct = [table.number(key >> 32, key & 0xFFFFFFFF) for key in keys.tolist()]
    numbers = np.array(distinct, np.int64)[inverse.reshape(-1)]
    unwatched = numbers >= 0
    values = features.top_values[tokens, sites, ranks]
    return (features.first + tokens)[unwatched], numbers[unwatched], values[unwatched]


def feature_columns(activations: Activations) -> inference_pb2.FeatureColumns:
    """Convert activations to FeatureColumns."""
    return inference_pb2.FeatureColumns(
        positions=activations.positions.tolist(),
        features=activations.features.tolist(),
        activations=activations.values.tolist(),
    )


def logprobs(tokens: Sequence[dict[int, Any]] | None, width: int) -> inference_pb2.Logprobs | None:
    """Convert vLLM's log-probabilities to columns. `tokens`: per token, a dict {id: Logprob} with its own id first."""
    if not tokens:
        return None
    result = inference_pb2.Logprobs(width=width)
    for alternatives in tokens:
        values = {token: float(entry.logprob) for token, entry in alternatives.items()}
        result.chosen.append(next(iter(values.values())))
        best = sorted(values.items(), key=lambda item: -item[1])[:width]
        result.alternative_ids.extend(token for token, _ in best)
        result.alternatives.extend(value for _, value in best)
    return result
