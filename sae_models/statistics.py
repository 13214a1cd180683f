"""Statistics of a score over the tokens of a sequence, as streams: what guards, calibration and evaluation compute.

A statistic is defined by the parameters of `operations.STATISTICS`, as the gates of the graph have them
(`edit.sequence_condition`): the state s_t = max(floor, decay * s_{t-1} + gain * u_t + offset) of the score u_t, or of
1[score > binary]; or the mean of the last `window` scores. Imports no torch.
"""

import copy
from collections import deque
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from rudder.sae_models.operations import NO_FLOOR, STATISTICS

Floats = NDArray[np.float64]

# The statistics of guards, by the name of their field in message Guard: those of gates, the share of the last `tokens`
# scores that is above a value, and the score of a token itself.
GUARD_STATISTICS: Mapping[str, Callable[..., dict[str, float]]] = {
    **STATISTICS,
    "agreement": lambda above, tokens: {"binary": above, "window": tokens},
    "none": lambda: {"window": 1},
}


class Statistic:
    """A statistic of one sequence. It carries its state, so the cuts between chunks change nothing, to the last bit.

    name, operands: an entry of GUARD_STATISTICS and its arguments: ("share", above), ("moving_average", decay),
    ("window", tokens), ("cusum", drift), ("agreement", above, tokens), ("none",). The share is that of the tokens so
    far, which the graph compares as a count with the level times the number of tokens. A window that is not full yet
    is the mean of what it has.
    """

    def __init__(self, name: str = "none", *operands: float) -> None:
        self.parameters = GUARD_STATISTICS[name](*operands)
        self.is_share = name == "share"
        self.count, self.state = 0, 0.0
        self.recent: deque[float] = deque(maxlen=int(self.parameters.get("window", 0)))

    def update(self, scores: Floats) -> Floats:
        """Take in the scores [n] of the next tokens; return the statistic [n] as after each of them.

        A score that is not finite makes the statistic NaN for as long as the score is part of it: see `exceeds`.
        """
        u = np.asarray(scores, np.float64)
        u = np.where(np.isfinite(u), u, np.nan)
        if (binary := self.parameters.get("binary")) is not None:
            u = np.where(np.isnan(u), u, u > binary)
        values = np.array(list((self._means if self.recent.maxlen else self._states)(u.tolist())), np.float64)
        first, self.count = self.count + 1, self.count + len(u)
        return values / np.arange(first, self.count + 1) if self.is_share else values

    def _states(self, scores: Iterable[float]) -> Iterable[float]:
        p = self.parameters
        decay, gain, offset = p.get("decay", 1.0), p.get("gain", 1.0), p.get("offset", 0.0)
        floor, state = p.get("floor", NO_FLOOR), self.state
        for score in scores:
            state = decay * state + gain * score + offset
            # In this order, NaN stays.
            if state < floor:
                state = floor
            yield state
        self.state = state

    def _means(self, scores: Iterable[float]) -> Iterable[float]:
        for score in scores:
            self.recent.append(score)
            yield sum(self.recent) / len(self.recent)

    def copy(self) -> "Statistic":
        """Return a statistic that goes on from here by itself, as before tokens that may be taken back."""
        other = copy.copy(self)
        other.recent = self.recent.copy()
        return other


def exceeds(statistic: Floats, level: float) -> NDArray[np.bool_]:
    """Return where a statistic [n] is above a level: also where it is NaN, so that guards fail closed."""
    return ~(statistic <= level)
