"""From what the engine reports of features to the contract's columns: names once per stream, active entries only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rudder.server.engine.telemetry.hub import Features
from rudder.v1 import inference_pb2

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Entries:
    """Active features, one entry each: position, place in the stream's list of features, activation."""

    positions: Ints
    places: Ints
    values: Floats


class Names:
    """The stream's list of features: first the watched ones, then latents of the top-k sites as they come."""

    def __init__(
        self,
        watched: Sequence[inference_pb2.FeatureInfo],
        sites: Sequence[str],
        info: Callable[[str, int], inference_pb2.FeatureInfo],
    ) -> None:
        self.sites, self.info = sites, info
        self.watched = self.count = len(watched)
        self.fresh = list(watched)
        self.places: dict[tuple[int, int], int] = {}
        self.told = {(sites.index(w.site), w.index) for w in watched if w.bundle and w.site in sites}

    def place(self, site: int, latent: int) -> int:
        """Where a latent stands in the list; put there if it is new. -1: it is watched, so it has its entries."""
        if (site, latent) in self.told:
            return -1
        if (site, latent) not in self.places:
            self.places[site, latent] = self.count
            self.fresh.append(self.info(self.sites[site], latent))
            self.count += 1
        return self.places[site, latent]

    def take(self) -> list[inference_pb2.FeatureInfo]:
        """The features named since the last take."""
        fresh, self.fresh = self.fresh, []
        return fresh


@dataclass
class Pool:
    """Sum, maximum and number of active tokens per feature of one choice, over `tokens` tokens."""

    tokens: int = 0
    sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    maxima: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    active: Ints = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, entries: Entries, tokens: int) -> None:
        """Take in the entries of the next tokens."""
        self.tokens += tokens
        missing = int(entries.places.max(initial=-1)) + 1 - len(self.sums)
        if missing > 0:
            self.sums, self.active = np.pad(self.sums, (0, missing)), np.pad(self.active, (0, missing))
            self.maxima = np.pad(self.maxima, (0, missing), constant_values=-np.inf)
        np.add.at(self.sums, entries.places, entries.values)
        np.add.at(self.active, entries.places, 1)
        np.maximum.at(self.maxima, entries.places, entries.values)

    def features(self, always: int) -> list[inference_pb2.PooledFeature]:
        """Those that were active, and the first `always` of the list."""
        missing = max(0, always - len(self.sums))
        sums, active = np.pad(self.sums, (0, missing)), np.pad(self.active, (0, missing))
        maxima = np.where(active > 0, np.pad(self.maxima, (0, missing)), 0.0)
        return [
            inference_pb2.PooledFeature(
                feature=i, sum=sums[i], max=maxima[i], active_tokens=int(active[i]), tokens=self.tokens
            )
            for i in np.flatnonzero((active > 0) | (np.arange(len(active)) < always)).tolist()
        ]


def entries_of(features: Features, names: Names) -> Entries:
    """The active entries, in the order of positions."""
    rows, places = np.nonzero(features.activations)
    parts = [(features.first + rows, places, features.activations[rows, places])]
    if features.top_values.size:
        parts.append(strongest(features, names))
    positions, places, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(positions, kind="stable")
    return Entries(positions[order].astype(np.int64), places[order].astype(np.int64), values[order].astype(np.float32))


def strongest(features: Features, names: Names) -> tuple[Ints, Ints, Floats]:
    """The active ones among the strongest latents; each distinct latent is looked up once."""
    rows, sites, ranks = np.nonzero(features.top_values > 0)
    latents = features.top_latents[rows, sites, ranks].astype(np.int64)
    pairs, inverse = np.unique(np.stack([sites, latents]), axis=1, return_inverse=True)
    found = np.array([names.place(site, latent) for site, latent in pairs.T.tolist()], np.int64)
    places = found[inverse.reshape(-1)] if len(found) else np.zeros(0, np.int64)
    new = places >= 0
    return (features.first + rows)[new], places[new], features.top_values[rows, sites, ranks][new]


def columns(entries: Entries) -> inference_pb2.FeatureColumns:
    """The contract's form of entries."""
    return inference_pb2.FeatureColumns(
        positions=entries.positions.tolist(), features=entries.places.tolist(), activations=entries.values.tolist()
    )


def logprobs(rows: Sequence[dict[int, object]] | None, width: int) -> inference_pb2.Logprobs | None:
    """Columns of log-probabilities; `rows` are vLLM's, one per token, with its own token first."""
    if not rows:
        return None
    found = inference_pb2.Logprobs(width=width)
    for row in rows:
        values = {token: float(entry.logprob) for token, entry in row.items()}  # type: ignore[attr-defined]
        found.chosen.append(next(iter(values.values())))
        best = sorted(values.items(), key=lambda item: -item[1])[:width]
        found.alternative_ids.extend(token for token, _ in best)
        found.alternatives.extend(value for _, value in best)
    return found
