"""Train a guard's score on labelled exchanges, and calibrate its level on benign ones."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rudder.sae_models import token_model
from rudder.sae_models.activations import harvest
from rudder.sae_models.activations.corpus import TOKENIZER_RULE, ContextRule
from rudder.sae_models.activations.hooks import Site, parse_site
from rudder.sae_models.analysis.conformal import conformal_level, upper_bound
from rudder.sae_models.analysis.exchanges import Exchange, as_windows, counted_ids
from rudder.sae_models.analysis.guard import (
    BOTH_PHASES,
    PROMPTS,
    REJECT,
    STOP,
    Guard,
    MovingAverage,
    Score,
    TokenModelFile,
    probe_of,
    probe_score,
)
from rudder.sae_models.analysis.guard_figures import Clustered, Figure, auroc, figure, highest, recall_at, share
from rudder.sae_models.analysis.probe_training import (
    Linear,
    Sample,
    average,
    class_weights,
)
from rudder.sae_models.errors import UserError
from rudder.sae_models.statistics import Floats, Statistic, exceeds
from rudder.sae_models.token_model import TokenModel

# From the features [tokens, D] and ids of an exchange's counted tokens to a score of each.
Scorer = Callable[[Tensor, Sequence[int]], Floats]
SEEDS = 5
# The moving average with the centre of mass of 16 tokens' mean, 2 / (16 + 1), rounded.
DECAY = 0.12
FALSE_ALARMS = 0.01
HOLD_BACK = 8


@dataclass(frozen=True)
class Rig:
    """A model up to its deepest site. Features of a token are its vectors at the sites, concatenated [D]."""

    trunk: Any
    tokenizer: Any
    sites: tuple[Site, ...]
    rule: ContextRule = TOKENIZER_RULE

    @property
    def widths(self) -> dict[str, int]:
        """Width of the vectors of each site."""
        return {str(site): int(self.trunk.config.get_text_config().hidden_size) for site in self.sites}

    def features(self, exchanges: Sequence[Exchange], task: str) -> Iterator[tuple[Tensor, list[int]]]:
        """Yield, exchange by exchange, features [tokens, D] and ids of the tokens that a server counts."""
        windows = as_windows(exchanges, self.tokenizer, self.rule)
        with tqdm(total=len(windows), desc=task, unit="text") as progress:
            for index in windows.chunks(harvest.WINDOWS_PER_PASS):
                chunk = windows.take(index).trimmed()
                x = torch.cat(harvest.chunk_activations(self.trunk, self.sites, chunk), -1)
                for vectors, counted, ids in zip(x, chunk.counted, counted_ids(chunk), strict=True):
                    yield vectors[counted], ids
                    progress.update()

    def scores(
        self, scorers: Mapping[str, Scorer], exchanges: Sequence[Exchange], task: str
    ) -> dict[str, list[Floats]]:
        """Return what each scorer gives the tokens of each exchange, in one pass of the model."""
        scores: dict[str, list[Floats]] = {name: [] for name in scorers}
        for x, ids in self.features(exchanges, task):
            for name, scorer in scorers.items():
                scores[name].append(scorer(x, ids))
        return scores


def load_rig(model: Path, sites: Sequence[str], rule: ContextRule = TOKENIZER_RULE) -> Rig:
    """Load a model for these sites, the order of which does not matter."""
    parsed = tuple(sorted((parse_site(site) for site in set(sites)), key=lambda site: (site.layer, site.point)))
    return Rig(harvest.load_trunk(model, *parsed), harvest.load_tokenizer(model), parsed, rule)


def linear(probe: Linear) -> Scorer:
    """Return the scorer of a probe."""
    return lambda x, _: probe.score(x).numpy()


def weights_of(exchanges: Sequence[Exchange], neighbours: Sequence[str] = ()) -> Tensor:
    """Return the weight of each exchange in training: classes balanced, half of the benign mass on the neighbours.

    Raise UserError if there is no exchange of one class.
    """
    positive = torch.tensor([exchange.label > 0.5 for exchange in exchanges])
    if positive.all() or not positive.any():
        raise UserError(f"label: no {'benign' if positive.any() else 'positive'} exchange to train on")
    return class_weights(positive, torch.tensor([exchange.group in neighbours for exchange in exchanges]))


def sample_of(inputs: Sequence[Tensor], exchanges: Sequence[Exchange], neighbours: Sequence[str] = ()) -> Sample:
    """Return the exchanges as a training sample."""
    return Sample(inputs, torch.tensor([exchange.label for exchange in exchanges]), weights_of(exchanges, neighbours))


def served(name: str, probes: Sequence[Linear], rig: Rig) -> tuple[Score, Linear]:
    """Return the mean of the probes as a guard's score, and as the probe that the rounded score is."""
    score = probe_score(name, average(probes), rig.widths)
    return score, probe_of(score)


def save_tokens(path: Path, model: TokenModel) -> Score:
    """Write a token model; return the score that names its file."""
    return Score(token_model=TokenModelFile(path.name, token_model.save(path, model)))


def calibrated(
    name: str, score: Score, benign: Sequence[Floats], decay: float, false_alarms: float, prompts: bool = False
) -> Guard:
    """Return a guard that this share of the exchanges like the benign ones sets off, by the scores of their tokens."""
    level = conformal_level(highest(benign, Statistic("moving_average", decay)), false_alarms)
    return guard_of(name, score, decay, level, prompts)


def guard_of(name: str, score: Score, decay: float, level: float, prompts: bool = False) -> Guard:
    """Return a guard that stops what exceeds its level.

    `prompts`: trained and calibrated on requests without answers. It judges prompts alone, and rejects them: at an
    answer's tokens its level has never been measured.
    """
    if prompts:
        return Guard(name, score, MovingAverage(decay), level, PROMPTS, REJECT)
    return Guard(name, score, MovingAverage(decay), level, BOTH_PHASES, STOP, HOLD_BACK)


@dataclass(frozen=True)
class Ranked:
    """How well scores rank the exchanges of a report split, whatever the level.

    recall: at the level that FALSE_ALARMS of the report's own benign exchanges exceed.
    """

    auroc: Figure
    recall: Figure


@dataclass(frozen=True)
class Decided(Ranked):
    """How a guard decides at its level.

    upper_bound: exact 95 % bound of the rate of false alarms, of `benign` exchanges.
    """

    noticed: Figure
    false_alarms: Figure
    upper_bound: float
    positives: int
    benign: int


def by_class(exchanges: Sequence[Exchange], values: Floats) -> tuple[Clustered, Clustered]:
    """Return the values [n] of the exchanges to notice, and of the benign ones. UserError: one class is missing."""
    positive = np.array([exchange.label > 0.5 for exchange in exchanges])
    if positive.all() or not positive.any():
        raise UserError(f"label: no {'benign' if positive.any() else 'positive'} exchange in the report split")
    cluster = np.array([exchange.cluster for exchange in exchanges])
    hazard, benign = (Clustered(values[side], cluster[side].tolist()) for side in (positive, ~positive))
    return hazard, benign


def ranked(hazard: Clustered, benign: Clustered) -> Ranked:
    """Return the figures of values that rank exchanges."""
    return Ranked(figure(auroc, hazard, benign), figure(recall_at(FALSE_ALARMS), hazard, benign))


def decided(hazard: Clustered, benign: Clustered, level: float) -> Decided:
    """Return the figures of a guard, from the highest statistic of each exchange."""
    alarms = int(exceeds(benign.values, level).sum())
    noticed, false_alarms = (
        share(Clustered(exceeds(s.values, level).astype(np.float64), s.cluster)) for s in (hazard, benign)
    )
    order, bound = ranked(hazard, benign), upper_bound(alarms, len(benign.values))
    return Decided(order.auroc, order.recall, noticed, false_alarms, bound, len(hazard.values), len(benign.values))
