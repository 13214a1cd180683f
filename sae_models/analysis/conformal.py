"""Levels of guards by split conformal prediction (Vovk et al. 2005), and what is known of the rates they realise."""

import math

import torch

from rudder.sae_models.analysis.detector import level_for
from rudder.sae_models.errors import UserError
from rudder.sae_models.statistics import Floats

CONFIDENCE = 0.95
BISECTIONS = 60


def conformal_level(highest: Floats, false_alarms: float) -> float:
    """Return the level that an exchange like the benign ones exceeds with a probability of at most `false_alarms`.

    highest [n]: the maximum of the served statistic over each of n benign exchanges; the level is the ceil((n + 1) * (1
    - false_alarms))-th smallest. Raise UserError where n is too small for there to be one.
    """
    needed = math.ceil(1 / false_alarms) - 1
    if len(highest) < needed:
        raise UserError(
            f"false_alarms: {false_alarms:g} takes {needed} benign exchanges to calibrate on; there are {len(highest)}"
        )
    return level_for(torch.from_numpy(highest), false_alarms)


def upper_bound(alarms: int, exchanges: int, confidence: float = CONFIDENCE) -> float:
    """Return the exact one-sided upper bound of a rate (Clopper and Pearson 1934) that showed `alarms` alarms."""
    if alarms >= exchanges:
        return 1.0
    low, high = alarms / exchanges, 1.0
    for _ in range(BISECTIONS):
        rate = (low + high) / 2
        low, high = (rate, high) if at_most(alarms, exchanges, rate) > 1 - confidence else (low, rate)
    return high


def at_most(alarms: int, exchanges: int, rate: float) -> float:
    """Return the probability of at most this many alarms in `exchanges` independent ones, for a rate in (0, 1)."""
    total = math.lgamma(exchanges + 1)
    return math.fsum(
        math.exp(
            total - math.lgamma(k + 1) - math.lgamma(exchanges - k + 1)
            + k * math.log(rate) + (exchanges - k) * math.log1p(-rate)
        )
        for k in range(alarms + 1)
    )  # fmt: skip
