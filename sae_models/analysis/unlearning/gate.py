"""A gate fitted on one fold and calibrated on another: a linear detector, and a CUSUM level by split conformal."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from rudder.sae_models.analysis import detector
from rudder.sae_models.analysis.detector import Detector
from rudder.sae_models.analysis.unlearning.material import Material
from rudder.sae_models.analysis.unlearning.rig import Texts
from rudder.sae_models.analysis.unlearning.steering import AlarmGate, Gate, ShareGate, TokenGate
from rudder.sae_models.sae import Rows

# Share of the negative weight that the neighbours have.
NEIGHBOUR_WEIGHT = 0.5
# Shares of texts of the far books, and of the neighbours, at which the gate may open by mistake.
FAR_ALARMS, NEAR_ALARMS = 0.01, 0.05
# DSG: share of retained texts.
SHARE_ALARMS = 0.05


def fit_detector(material: Material, folds: Collection[int]) -> Detector:
    """Fit a logistic regression of the topic on the tokens of windows and definitions; neighbours weigh
    NEIGHBOUR_WEIGHT of all negative tokens.
    """
    topic, far = material.split.topic, material.split.far
    groups = [
        (topic.books, 1.0),
        (topic.neighbours, NEIGHBOUR_WEIGHT if topic.neighbours else 0.0),
        (far, 1 - NEIGHBOUR_WEIGHT if topic.neighbours else 1.0),
    ]
    # A definition is short: windows and definitions of a group have half of its weight each.
    parts = [(texts_of(material, folds, books), share / 2) for books, share in groups]
    x, weight, positive = [], [], []
    for number, (texts, share) in enumerate(parts):
        for some in texts:
            tokens = some.x[some.windows.counted]
            x.append(tokens)
            weight.append(torch.full((len(tokens),), share / max(1, len(tokens))))
            positive.append(torch.full((len(tokens),), number == 0))
    return detector.fit(torch.cat(x), torch.cat(positive), torch.cat(weight))


def texts_of(material: Material, folds: Collection[int], books: Collection[str]) -> tuple[Texts, Texts]:
    """Return the windows and the definitions of some folds and books."""
    windows = material.windows.take(material.windows_of(folds, books))
    return windows, material.lines.take(material.lines_of(folds, books))


def fit_gate(material: Material, select: Collection[int], tune: Collection[int]) -> AlarmGate:
    """Fit the detector on `select`; on `tune`, set the drift to the middle between the classes' mean scores, and the
    level to one that at most FAR_ALARMS of the far books' texts and NEAR_ALARMS of the neighbours' exceed.
    """
    fitted = fit_detector(material, select)
    topic, far = material.split.topic, material.split.far
    near = topic.neighbours or far
    drift = (mean_score(material, fitted, tune, topic.books) + mean_score(material, fitted, tune, near)) / 2
    gate = AlarmGate(fitted, drift, 0.0)
    levels = [
        detector.level_for(torch.cat([highest(gate, texts) for texts in texts_of(material, tune, books)]), share)
        for books, share in ((far, FAR_ALARMS), (near, NEAR_ALARMS))
    ]
    return AlarmGate(fitted, drift, max(0.0, *levels))


def mean_score(material: Material, fitted: Detector, folds: Collection[int], books: Sequence[str]) -> float:
    """Return the mean score over tokens."""
    texts = texts_of(material, folds, books)
    return float(fitted.score(torch.cat([some.x[some.windows.counted] for some in texts])).mean())


def highest(gate: AlarmGate, texts: Texts) -> Tensor:
    """Return the highest statistic of each text [n]."""
    if not len(texts):
        return torch.zeros(0)
    return gate.statistic(texts.context(torch.arange(len(texts)))).amax(1)


def share_gate(material: Material, rows: Rows, tune: Collection[int]) -> ShareGate:
    """Return the gate of DSG: its level is that which SHARE_ALARMS of the retained texts exceed."""
    others = [*material.split.topic.neighbours, *material.split.far]
    gate, shares = ShareGate(rows, 0.0), []
    for texts in texts_of(material, tune, others):
        if len(texts):
            context = texts.context(torch.arange(len(texts)))
            shares.append(gate.share(context, TokenGate(rows)(context)))
    return ShareGate(rows, detector.level_for(torch.cat(shares), SHARE_ALARMS))


def opens(gate: Gate, texts: Texts) -> Tensor:
    """Return whether a gate opens anywhere in each text [n]."""
    return gate(texts.context(torch.arange(len(texts)))).any(1) if len(texts) else torch.zeros(0, dtype=torch.bool)
