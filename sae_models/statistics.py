"""Statistics of a score over the tokens of a sequence, as streams: what guards, calibration and evaluation compute.

A statistic is defined by the parameters of `operations.STATISTICS`, as the gates of the graph have them
(`edit.sequence_condition`): the state s_t = max(floor, decay * s_{t-1} + gain * u_t + offset) of the score u_t, or of
1[score > binary]; or the mean of the last `window` scores. Imports no torch.
"""

import copy
from collections import deque
from collections.abc import Callable, Mapping
from math import isfinite, nan

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
        self.parameters = p = GUARD_STATISTICS[name](*operands)
        self.is_share, self.binary, self.window = name == "share", p.get("binary"), int(p.get("window", 0))
        self.decay, self.gain, self.offset = p.get("decay", 1.0), p.get("gain", 1.0), p.get("offset", 0.0)
        self.floor = p.get("floor", NO_FLOOR)
        self.count, self.state = 0, 0.0
        self.recent: deque[float] = deque(maxlen=self.window)

    def update(self, scores: Floats) -> Floats:
        """Take in the scores [n] of the next tokens; return the statistic [n] as after each of them."""
        return np.array([self.step(score) for score in np.asarray(scores, np.float64).tolist()], np.float64)

    def step(self, score: float) -> float:
        """Take in the score of the next token; return the statistic after it. A server does so for each token.

        A score that is not finite makes the statistic NaN for as long as the score is part of it: see `exceeds`.
        """
        u = score if isfinite(score) else nan
        if self.binary is not None and isfinite(u):
            u = float(u > self.binary)
        self.count += 1
        if self.window:
            self.recent.append(u)
            return sum(self.recent) / len(self.recent)
        state = self.decay * self.state + self.gain * u + self.offset
        # In this order, NaN stays.
        self.state = self.floor if state < self.floor else state
        return self.state / self.count if self.is_share else self.state

    def copy(self) -> "Statistic":
        """Return a statistic that goes on from here by itself, as before tokens that may be taken back."""
        other = copy.copy(self)
        other.recent = self.recent.copy()
        return other


def exceeds(statistic: Floats, level: float) -> NDArray[np.bool_]:
    """Return where a statistic [n] is above a level: also where it is NaN, so that guards fail closed."""
    return ~(statistic <= level)
