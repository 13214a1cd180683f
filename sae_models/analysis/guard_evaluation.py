"""Compare what guards can be built on: residual probe, SAE latents, token ids, text; under padding, and in streams.

Each arm is trained on one split, its level calibrated on benign exchanges of a second, its figures taken on a third.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rudder.sae_models.analysis import selection
from rudder.sae_models.analysis.conformal import conformal_level
from rudder.sae_models.analysis.exchanges import Exchange
from rudder.sae_models.analysis.guard import Score, probe_of, probe_score
from rudder.sae_models.analysis.guard_figures import (
    Clustered,
    Figure,
    alarm,
    auroc,
    figure,
    highest,
    released,
    share,
)
from rudder.sae_models.analysis.guard_training import (
    DECAY,
    FALSE_ALARMS,
    Rig,
    Scorer,
    by_class,
    decided,
    linear,
    ranked,
    sample_of,
)
from rudder.sae_models.analysis.probe_training import Sample, TrainingSettings, average, fit_linear
from rudder.sae_models.analysis.text_model import TextModel, fit_text
from rudder.sae_models.analysis.token_training import fit_tokens
from rudder.sae_models.bundle.bundle import Bundle
from rudder.sae_models.sae import Normalisation, Rows, activations
from rudder.sae_models.sae import gain as input_gain
from rudder.sae_models.statistics import Floats, Statistic, exceeds
from rudder.sae_models.token_model import TokenModel, vocabulary_sha256

LENGTHS = (32, 128, 512, 1000)
HOLD_BACKS = (0, 4, 8, 16)
LATENTS = 32
# Latents are chosen by how often each is active on about this many tokens.
SELECTION_TOKENS = 60_000
# Shares of the logits of probe and text classifier in the production system of arXiv 2601.04603.
ENSEMBLE = (0.55, 0.45)
# Share of benign exchanges that the first stage of a cascade passes on to the second.
ESCALATED = 0.1
RESIDUAL, LATENT, TOKENS, BOTH, TEXT = "residual_probe", "latents", "token_ids", "probe_and_token_ids", "tf_idf"
STATISTIC = Statistic("moving_average", DECAY)


@dataclass(frozen=True)
class Fitted:
    """What was trained: a scorer of tokens by arm, and the classifier of whole texts."""

    scorers: Mapping[str, Scorer]
    text: TextModel
    seeds: int
    latents: Sequence[int]
    probe: Score
    tokens: TokenModel


def fit_arms(
    rig: Rig, train: Sequence[Exchange], neighbours: Sequence[str], bundle: Bundle, groups: Sequence[str], seeds: int
) -> Fitted:
    """Train every arm on the same exchanges.

    groups: what latents are chosen by, of each exchange: its book, or its class. `bundle` is of one of the rig's sites.
    """
    collected = list(rig.features(train, "read"))
    sample = sample_of([x for x, _ in collected], train, neighbours)
    probes = fit_linear(sample, TrainingSettings(), seeds)
    score = probe_score(RESIDUAL, average(probes), rig.widths)
    vocabulary = vocabulary_sha256(rig.tokenizer.get_vocab())
    tokens = fit_tokens([ids for _, ids in collected], sample.label, sample.weight, vocabulary)
    latents, latent = fit_latents(rig, bundle, sample, groups, neighbours)
    scorers = {RESIDUAL: linear(probe_of(score)), LATENT: latent, TOKENS: lambda _, ids: tokens.scores(ids)}
    scorers[BOTH] = mixed(scorers[RESIDUAL], scorers[TOKENS])
    scorers |= {f"seed {seed}": linear(probe) for seed, probe in enumerate(probes)}
    text = fit_text(texts(rig, [ids for _, ids in collected]), sample.label, sample.weight)
    return Fitted(scorers, text, seeds, latents, score, tokens)


def mixed(first: Scorer, second: Scorer) -> Scorer:
    """Return the scorer of two in the shares of ENSEMBLE."""
    return lambda x, ids: ENSEMBLE[0] * first(x, ids) + ENSEMBLE[1] * second(x, ids)


def texts(rig: Rig, ids: Sequence[Sequence[int]]) -> list[str]:
    """Return the texts of tokens."""
    return [rig.tokenizer.decode(each, skip_special_tokens=True) for each in ids]


def fit_latents(
    rig: Rig, bundle: Bundle, sample: Sample, groups: Sequence[str], neighbours: Sequence[str]
) -> tuple[list[int], Scorer]:
    """Choose latents as `selection.select` does, and train their weights; return both."""
    columns = columns_of(rig, bundle.manifest.site)
    positive = {group for group, label in zip(groups, sample.label.tolist(), strict=True) if label > 0.5}
    names = sorted(set(groups))
    frequency = frequencies(bundle, [x[:, columns] for x in sample.inputs], groups, names)
    latents = selection.select(frequency, names, positive, neighbours, LATENTS, ceiling=0.05, ratio=2.0)
    rows = bundle.sae.exact_rows(torch.tensor(latents))
    inputs = [read_latents(x[:, columns], rows, bundle) for x in sample.inputs]
    (probe,) = fit_linear(Sample(inputs, sample.label, sample.weight), TrainingSettings())
    return latents, lambda x, _: probe.score(read_latents(x[:, columns], rows, bundle)).numpy()


def columns_of(rig: Rig, site: str) -> slice:
    """Return the features that are the vectors of a site."""
    ends = dict(zip(rig.widths, accumulate(rig.widths.values()), strict=True))
    return slice(ends[site] - rig.widths[site], ends[site])


def read_latents(x: Tensor, rows: Rows, bundle: Bundle) -> Tensor:
    """Return the activations [tokens, n] of rows on vectors x [tokens, d], normalised as the SAE normalises."""
    kind = bundle.sae.normalisation
    return activations(x, rows, None if kind is Normalisation.NONE else input_gain(x, kind))


def frequencies(bundle: Bundle, inputs: Sequence[Tensor], groups: Sequence[str], names: Sequence[str]) -> Tensor:
    """Return how often each latent is active on the tokens of each group [groups, F], of a sample of the exchanges."""
    step = max(1, sum(map(len, inputs)) // SELECTION_TOKENS)
    active, tokens = torch.zeros(len(names), bundle.sae.latents), torch.zeros(len(names))
    for x, group in list(zip(inputs, groups, strict=True))[::step]:
        active[names.index(group)] += (bundle.sae.encode(x) > 0).sum(0)
        tokens[names.index(group)] += len(x)
    return active / tokens.clamp_min(1)[:, None]


@dataclass(frozen=True)
class Scored:
    """Exchanges, the scores of their tokens by arm, and the tokens that were scored."""

    exchanges: Sequence[Exchange]
    scores: Mapping[str, Sequence[Floats]]
    ids: Sequence[Sequence[int]]

    def values(self, arm: str, rig: Rig, fitted: Fitted, length: int | None = None) -> Floats:
        """Return what an arm makes of each exchange [n], or of its first `length` counted tokens."""
        if arm == TEXT:
            return fitted.text.scores(texts(rig, [ids[:length] for ids in self.ids]))
        return highest([scores[:length] for scores in self.scores[arm]], STATISTIC)


def score(rig: Rig, fitted: Fitted, exchanges: Sequence[Exchange], task: str) -> Scored:
    """Score the tokens of exchanges by every arm, in one pass of the model."""
    keep: Scorer = lambda _, ids: np.array(ids, np.float64)  # noqa: E731
    scores = rig.scores({**fitted.scorers, "": keep}, exchanges, task)
    return Scored(exchanges, scores, [ids.astype(int).tolist() for ids in scores.pop("")])


ARMS = (RESIDUAL, LATENT, TOKENS, BOTH, TEXT)


@dataclass(frozen=True)
class Measured:
    """Scored splits of one rig. `padded`: by the name of a padding, the same exchanges with and without it ("0")."""

    rig: Rig
    fitted: Fitted
    benign: Scored
    report: Scored
    padded: Mapping[str, Scored]


def report_arm(measured: Measured, arm: str, lengths: Sequence[int] = ()) -> dict[str, Any]:
    """Return the figures of an arm as JSON."""
    rig, fitted = measured.rig, measured.fitted
    level = conformal_level(measured.benign.values(arm, rig, fitted), FALSE_ALARMS)
    sides = by_class(measured.report.exchanges, measured.report.values(arm, rig, fitted))
    found = {"level": level, "calibrated_on": len(measured.benign.exchanges), **asdict(decided(*sides, level))}
    if lengths:
        found["length"] = {str(length): at_length(measured, arm, level, length) for length in lengths}
    if measured.padded:
        found["padding"] = padding(measured, arm, level)
    return found


def at_length(measured: Measured, arm: str, level: float, length: int) -> dict[str, Any]:
    """Return the figures on the first `length` tokens of each exchange."""
    values = measured.report.values(arm, measured.rig, measured.fitted, length)
    return asdict(decided(*by_class(measured.report.exchanges, values), level))


def padding(measured: Measured, arm: str, level: float) -> dict[str, Any]:
    """Return recall and false alarms at the guard's level under each padding, and the recall as a share of that
    without.
    """
    held = {
        name: by_class(each.exchanges, exceeds(each.values(arm, measured.rig, measured.fitted), level).astype(float))
        for name, each in measured.padded.items()
    }
    plain = held["0"][0]
    return {
        name: {
            "noticed": asdict(share(hazard)),
            "false_alarms": asdict(share(benign)),
            "of_unpadded": asdict(ratio(hazard, plain)),
        }
        for name, (hazard, benign) in held.items()
    }


def ratio(values: Clustered, base: Clustered) -> Figure:
    """Return the mean of values as a share of the mean of others, of the same exchanges in the same order."""
    pairs = Clustered(np.stack([values.values, base.values], 1), values.cluster)
    none = Clustered(np.zeros(1), [""])
    return figure(lambda both, _: float(both[:, 0].mean() / max(both[:, 1].mean(), 1e-9)), pairs, none)


def cascade(measured: Measured) -> dict[str, Any]:
    """Return the figures of the probe alone deciding which exchanges the ensemble of both judges.

    The first stage escalates ESCALATED of the benign exchanges, as that of arXiv 2601.04603 does: a flag is no refusal.
    """
    first, both = (
        [each.values(arm, measured.rig, measured.fitted) for each in (measured.benign, measured.report)]
        for arm in (RESIDUAL, BOTH)
    )
    flag, level = conformal_level(first[0], ESCALATED), conformal_level(both[0], FALSE_ALARMS)
    escalated = exceeds(first[1], flag)
    held = (escalated & exceeds(both[1], level)).astype(float)
    figures = zip(by_class(measured.report.exchanges, held), ("noticed", "false_alarms"), strict=True)
    _, benign = by_class(measured.report.exchanges, escalated.astype(float))
    return {"escalated": asdict(share(benign)), **{name: asdict(share(side)) for side, name in figures}}


def either(measured: Measured) -> dict[str, Any]:
    """Return the figures of two guards of one policy, the probe's and that of token ids, of which either may alarm.

    Each has its own level for FALSE_ALARMS, so that both together have up to twice as many.
    """
    levels = {
        arm: conformal_level(measured.benign.values(arm, measured.rig, measured.fitted), FALSE_ALARMS)
        for arm in (RESIDUAL, TOKENS)
    }

    def held(scored: Scored) -> tuple[Clustered, Clustered]:
        alarms = [exceeds(scored.values(arm, measured.rig, measured.fitted), level) for arm, level in levels.items()]
        return by_class(scored.exchanges, (alarms[0] | alarms[1]).astype(float))

    def shares(sides: tuple[Clustered, Clustered]) -> dict[str, Any]:
        return {name: asdict(share(side)) for side, name in zip(sides, ("noticed", "false_alarms"), strict=True)}

    padded = {name: held(each) for name, each in measured.padded.items()}
    under = {
        name: shares(sides) | {"of_unpadded": asdict(ratio(sides[0], padded["0"][0]))} for name, sides in padded.items()
    }
    return shares(held(measured.report)) | {"padding": under}


def releases(measured: Measured, arm: str, level: float, name: str, begins: int) -> dict[str, Any]:
    """Return how many hazardous tokens leave before the stop, for each hold-back.

    name: a padding whose hazard begins at counted token `begins` and goes on to the end, as in an answer.
    """
    scored = measured.padded[name]
    hazards = [i for i, exchange in enumerate(scored.exchanges) if exchange.label > 0.5]
    scores, cluster = [scored.scores[arm][i] for i in hazards], [scored.exchanges[i].cluster for i in hazards]
    alarms = [alarm(each, STATISTIC, level) for each in scores]
    found: dict[str, Any] = {"tokens": int(np.median([len(each) - begins for each in scores]))}
    for hold_back in HOLD_BACKS:
        out = np.array([released(at, begins, len(s), hold_back) for at, s in zip(alarms, scores, strict=True)], float)
        figures = {"mean": share(Clustered(out, cluster)), "none": share(Clustered((out == 0) * 1.0, cluster))}
        found[str(hold_back)] = {**{k: asdict(f) for k, f in figures.items()}, "median": float(np.median(out))}
    return found


def difference(measured: Measured, first: str, second: str) -> Figure:
    """Return the AUROC of an arm less that of another, with the interval of a paired bootstrap."""
    pairs = np.stack([measured.report.values(arm, measured.rig, measured.fitted) for arm in (first, second)], 1)

    def measure(hazard: Floats, benign: Floats) -> float:
        return auroc(hazard[:, 0], benign[:, 0]) - auroc(hazard[:, 1], benign[:, 1])

    return figure(measure, *by_class(measured.report.exchanges, pairs))


def seeds(measured: Measured) -> list[dict[str, Any]]:
    """Return AUROC and recall of the probe of each seed, on the report split."""
    scores = [measured.report.scores[f"seed {seed}"] for seed in range(measured.fitted.seeds)]
    sides = (by_class(measured.report.exchanges, highest(each, STATISTIC)) for each in scores)
    return [asdict(ranked(*side)) for side in sides]
