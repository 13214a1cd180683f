"""Guards, and policies of guards, in the JSON form of their messages (proto/rudder/v1/policy.proto)."""

from collections.abc import Mapping

import torch

from rudder.sae_models.analysis.probe_training import Linear
from rudder.sae_models.analysis.program import Message, Probe, Row
from rudder.sae_models.statistics import Statistic

# Numbers in files keep this many digits; levels are calibrated on what the file says.
DIGITS = 6
BOTH_PHASES, STOP = "PHASE_BOTH", "GUARD_ACTION_STOP"
PROMPTS, REJECT = "PHASE_PROMPT", "GUARD_ACTION_REJECT"


class ScoreTerm(Message, frozen=True):
    """weight * the activation of a row at a site."""

    site: str
    row: Row
    weight: float = 0.0


class TokenModelFile(Message, frozen=True):
    """A file of token_model.py, beside that of the policy."""

    file: str
    sha256: str


class Score(Message, frozen=True):
    """bias + the sum of the terms, or the score of a token model."""

    terms: tuple[ScoreTerm, ...] = ()
    bias: float = 0.0
    token_model: TokenModelFile | None = None


class MovingAverage(Message, frozen=True):
    """s = (1 - decay) * s + decay * score."""

    decay: float


class Guard(Message, frozen=True):
    """A guard whose statistic is a moving average. Defaults are those of the message, which its file leaves out."""

    name: str
    score: Score
    moving_average: MovingAverage
    level: float
    phase: str
    action: str
    hold_back: int | None = None
    refusal: str = ""

    @property
    def statistic(self) -> Statistic:
        """Its statistic, before the first token."""
        return Statistic("moving_average", self.moving_average.decay)


class Binding(Message, frozen=True):
    """Whom a policy binds."""

    all: bool = False


class Policy(Message, frozen=True):
    """A policy of guards."""

    name: str
    description: str
    version: int
    binds: Binding
    guards: tuple[Guard, ...]


def rounded(value: float) -> float:
    """Return a number as files hold it."""
    return float(f"{value:.{DIGITS}g}")


def probe_score(name: str, probe: Linear, widths: Mapping[str, int]) -> Score:
    """Return the score of a probe on the concatenated vectors of several sites: a row at each, whose activations add.

    widths: of the vectors of each site, in the order of the concatenation.
    """
    parts = probe.weights.split([*widths.values()])
    rows = [Row(probe=Probe(name, tuple(rounded(w) for w in weights.tolist()))) for weights in parts]
    terms = tuple(ScoreTerm(site, row, 1.0) for site, row in zip(widths, rows, strict=True))
    return Score(terms, rounded(probe.bias))


def probe_of(score: Score) -> Linear:
    """Return the probe that a score of `probe_score` is, as its file says."""
    weights = [w for term in score.terms if term.row.probe for w in term.row.probe.weights]
    return Linear(torch.tensor(weights), score.bias)
