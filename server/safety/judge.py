"""Judge one choice: the first token, if any, at which each guard holds. Pure, and to the bit independent of chunks."""

from collections.abc import Sequence
from itertools import pairwise
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rudder.sae_models.statistics import Statistic, exceeds
from rudder.sae_models.token_model import MAX_ORDER
from rudder.server.engine.telemetry.frame import TelemetryLost
from rudder.server.engine.telemetry.hub import Features
from rudder.server.safety.guards import Guard

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Held(NamedTuple):
    """The first token at which a guard held, and the guard's statistic there."""

    position: int
    statistic: float


class Track:
    """One guard over the tokens of one choice.

    `begin`, `end`: the positions that it judges. `maximum`: the largest statistic up to where it held; -inf before the
    first token.
    """

    def __init__(self, guard: Guard, prompt_tokens: int) -> None:
        self.guard, self.statistic = guard, Statistic(*guard.statistic)
        self.begin = 0 if guard.prompt else prompt_tokens
        self.end = inf if guard.generated else prompt_tokens
        self.counted, self.maximum = 0, -inf
        self.held: Held | None = None

    def take(self, first: int, scores: Floats, counted: Bools) -> None:
        """Take in the scores [n] of the positions from `first` on. A token that is not `counted` [n] has none."""
        positions = first + np.flatnonzero(counted)
        positions = positions[(positions >= self.begin) & (positions < self.end)]
        if self.held or not len(positions):
            return
        values = self.statistic.update(scores[positions - first])
        holds = exceeds(values, self.guard.level)
        holds[: max(0, self.guard.min_tokens - 1 - self.counted)] = False
        self.counted += len(values)
        last = int(holds.argmax()) if holds.any() else len(values) - 1
        self.maximum = max(self.maximum, float(np.fmax.reduce(values[: last + 1])))
        if holds[last]:
            self.held = Held(int(positions[last]), float(values[last]))


class Judge:
    """All guards over the tokens of one choice, whose features come in the columns of all guards' rows, in their order.

    `uncounted`: positions that no guard judges, in ascending order: that of BOS, and excluded ones. `next_features`:
    position of the next features; `next_token`: of the next token. `context`: the last tokens that were counted.
    """

    def __init__(self, guards: Sequence[Guard], prompt_tokens: int, uncounted: Sequence[int] = ()) -> None:
        self.tracks = [Track(guard, prompt_tokens) for guard in guards]
        self.uncounted = np.array(uncounted, np.int64)
        reading = [track for track in self.tracks if track.guard.rows]
        self.next_features = min((track.begin for track in reading), default=0)
        self.next_token = 0
        self.context: list[int] = []
        widths = np.cumsum([0, *(len(track.guard.rows) for track in self.tracks)]).tolist()
        self.columns = [slice(*span) for span in pairwise(widths)]

    def take(self, features: Features) -> None:
        """Take in features of the next positions. Raises TelemetryLost if there are others between."""
        if not len(features.activations):
            return
        if features.first != self.next_features:
            raise TelemetryLost(f"features of position {features.first} came where {self.next_features} was due")
        self.next_features = features.end
        counted = self.counted(features.first, features.end)
        for track, columns in zip(self.tracks, self.columns, strict=True):
            if track.guard.rows:
                scores = score(track.guard, features.activations[:, columns])
                track.take(features.first, scores, counted)

    def take_tokens(self, ids: Sequence[int]) -> None:
        """Take in the ids of the next tokens, which token models judge before they run."""
        first, self.next_token = self.next_token, self.next_token + len(ids)
        models = [track for track in self.tracks if track.guard.token_model]
        if not models or not len(ids):
            return
        counted = self.counted(first, self.next_token)
        kept = [token for token, counts in zip(ids, counted.tolist(), strict=True) if counts]
        for track in models:
            scores = np.zeros(len(ids))
            assert track.guard.token_model
            scores[counted] = track.guard.token_model.scores(kept, self.context)
            track.take(first, scores, counted)
        self.context = [*self.context, *kept][-MAX_ORDER:]

    def counted(self, first: int, end: int) -> Bools:
        """Return whether guards judge each of the positions from `first` to before `end`."""
        counted = np.ones(end - first, bool)
        begin, stop = np.searchsorted(self.uncounted, (first, end))
        counted[self.uncounted[begin:stop] - first] = False
        return counted

    def judged(self, number: int) -> float:
        """Return the position before which guard `number` has judged all tokens; inf once it judges no more."""
        track = self.tracks[number]
        seen = self.next_token if track.guard.token_model else self.next_features
        return inf if seen >= track.end else seen


def score(guard: Guard, activations: NDArray[np.float32]) -> Floats:
    """Return the scores [n] of tokens with these activations [n, rows].

    Term by term, since a matrix product may add up differently for another n.
    """
    scores = np.full(len(activations), guard.bias)
    for column, weight in enumerate(guard.weights):
        scores += weight * activations[:, column].astype(np.float64)
    return scores
