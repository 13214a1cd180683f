"""Judge one choice: the first token, if any, at which each guard holds. Pure, and to the bit independent of chunks."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from math import inf
from typing import NamedTuple

import numpy as np

from rudder.sae_models.statistics import Statistic
from rudder.sae_models.token_model import MAX_ORDER
from rudder.server.engine.telemetry.frame import TelemetryLost
from rudder.server.engine.telemetry.hub import Features
from rudder.server.safety.guards import Guard


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
        self.maximum = -inf
        self.held: Held | None = None

    def take(self, first: int, scores: Iterable[float | None]) -> None:
        """Take in the scores of the positions from `first` on; that of a token that is not counted is None."""
        for position, score in enumerate(scores, first):
            if score is None or self.held or not self.begin <= position < self.end:
                continue
            value = self.statistic.step(score)
            if value > self.maximum:
                self.maximum = value
            # NaN holds.
            if not value <= self.guard.level and self.statistic.count >= self.guard.min_tokens:
                self.held = Held(position, value)


class Judge:
    """All guards over the tokens of one choice, whose features come in the columns of all guards' rows, in their order.

    `uncounted`: positions that no guard judges, in ascending order: that of BOS, and excluded ones. `next_features`:
    position of the next features; `next_token`: of the next token. `context`: the last tokens that were counted.
    """

    def __init__(self, guards: Sequence[Guard], prompt_tokens: int, uncounted: Sequence[int] = ()) -> None:
        self.tracks = [Track(guard, prompt_tokens) for guard in guards]
        self.uncounted = frozenset(uncounted)
        reading = [track for track in self.tracks if track.guard.rows]
        self.next_features = min((track.begin for track in reading), default=0)
        self.next_token = 0
        self.context: list[int] = []
        widths = np.cumsum([0, *(len(track.guard.rows) for track in self.tracks)]).tolist()
        self.columns = [slice(*span) for span in pairwise(widths)]

    def take(self, features: Features) -> None:
        """Take in features of the next positions.

        Raises TelemetryLost if there are others between, or a guard's row could not be read: x is not finite there.
        """
        if not len(features.activations):
            return
        if features.first != self.next_features:
            raise TelemetryLost(f"features of position {features.first} came where {self.next_features} was due")
        self.next_features = features.end
        if not np.isfinite(features.activations).all():
            position = features.first + int(np.flatnonzero(~np.isfinite(features.activations).all(1))[0])
            raise TelemetryLost(f"the residual of position {position} is not finite: no guard can judge it")
        rows = features.activations.tolist()
        for track, columns in zip(self.tracks, self.columns, strict=True):
            if track.guard.rows and not track.held:
                scores = (score(track.guard, row[columns]) for row in rows)
                track.take(features.first, self.counted(features.first, scores))

    def take_tokens(self, ids: Sequence[int]) -> None:
        """Take in the ids of the next tokens, which token models judge before they run."""
        first, self.next_token = self.next_token, self.next_token + len(ids)
        models = [track for track in self.tracks if track.guard.token_model]
        if not models or not len(ids):
            return
        kept = [token for position, token in enumerate(ids, first) if position not in self.uncounted]
        for track in models:
            assert track.guard.token_model
            scores = iter(track.guard.token_model.scores(kept, self.context).tolist())
            track.take(first, (None if p in self.uncounted else next(scores) for p in range(first, self.next_token)))
        self.context = [*self.context, *kept][-MAX_ORDER:]

    def counted(self, first: int, scores: Iterable[float]) -> Iterator[float | None]:
        """Yield the scores of the positions from `first` on, None where no guard judges."""
        return (None if position in self.uncounted else score for position, score in enumerate(scores, first))

    def judged(self, number: int) -> float:
        """Return the position before which guard `number` has judged all tokens; inf once it judges no more."""
        track = self.tracks[number]
        seen = self.next_token if track.guard.token_model else self.next_features
        return inf if seen >= track.end else seen


def score(guard: Guard, activations: Sequence[float]) -> float:
    """Return the score of a token with these activations of the guard's rows.

    Summed in the order of the rows: a matrix product may add up differently for another number of tokens.
    """
    total = guard.bias
    for weight, activation in zip(guard.weights, activations, strict=True):
        total += weight * activation
    return total
