"""A gate fitted on one fold and calibrated on another: a linear detector, and a level by split conformal.

The detector is fitted on means over SMOOTHING tokens, as the gate reads means: a single token says little about a topic
(sliding-window training, arXiv 2601.04603).
"""

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from rudder.sae_models.analysis import detector
from rudder.sae_models.analysis.detector import Detector
from rudder.sae_models.analysis.unlearning.material import Material
from rudder.sae_models.analysis.unlearning.rig import Texts
from rudder.sae_models.analysis.unlearning.steering import AlarmGate, ShareGate, TokenGate
from rudder.sae_models.sae import Rows

# Share of the negative weight that the neighbours have.
NEIGHBOUR_WEIGHT = 0.5
# Shares of texts of the far books, and of the neighbours, at which the gate may open by mistake.
FAR_ALARMS, NEAR_ALARMS = 0.01, 0.10
SMOOTHING, STRIDE, PENALTY = 16, 3, 1e-2
# DSG: share of retained texts.
SHARE_ALARMS = 0.05


def fit_detector(material: Material, folds: Collection[int]) -> Detector:
    """Fit a logistic regression of the topic on windows and definitions; of the negative weight NEIGHBOUR_WEIGHT is on
    the neighbours.
    """
    topic, far = material.split.topic, material.split.far
    groups = [
        (topic.books, 1.0),
        (topic.neighbours, NEIGHBOUR_WEIGHT if topic.neighbours else 0.0),
        (far, 1 - NEIGHBOUR_WEIGHT if topic.neighbours else 1.0),
    ]
    # A definition is short: windows and definitions of a group have half of its weight each.
    x, weight, positive = [], [], []
    for number, (books, share) in enumerate(groups):
        for texts in texts_of(material, folds, books):
            means = smoothed(texts)
            x.append(means)
            weight.append(torch.full((len(means),), share / 2 / max(1, len(means))))
            positive.append(torch.full((len(means),), number == 0))
    return detector.fit(torch.cat(x), torch.cat(positive), torch.cat(weight), PENALTY)


def smoothed(texts: Texts) -> Tensor:
    """Return means of the residuals over the last SMOOTHING tokens, at every STRIDE-th counted token [m, d]."""
    counted = texts.windows.counted[..., None]
    sums = functional.pad(torch.where(counted, texts.x, 0.0).cumsum(1), (0, 0, SMOOTHING, 0))
    count = functional.pad(counted.float().cumsum(1), (0, 0, SMOOTHING, 0))
    difference = sums[:, SMOOTHING:] - sums[:, :-SMOOTHING]
    means = difference / (count[:, SMOOTHING:] - count[:, :-SMOOTHING]).clamp(min=1)
    return means[texts.windows.counted][::STRIDE]


def texts_of(material: Material, folds: Collection[int], books: Collection[str]) -> tuple[Texts, Texts]:
    """Return the windows and the definitions of some folds and books."""
    windows = material.windows.take(material.windows_of(folds, books))
    return windows, material.lines.take(material.lines_of(folds, books))


def fit_gate(material: Material, select: Collection[int], tune: Collection[int]) -> AlarmGate:
    """Fit the detector on `select`, and set the level on `tune`: at most FAR_ALARMS of the far books' windows, and of
    their definitions, exceed it, and NEAR_ALARMS of the neighbours'.
    """
    gate = AlarmGate(fit_detector(material, select), -torch.inf)
    topic, far = material.split.topic, material.split.far
    levels = [
        detector.level_for(highest(gate, texts), share)
        for books, share in ((far, FAR_ALARMS), (topic.neighbours, NEAR_ALARMS))
        for texts in texts_of(material, tune, books)
        if len(texts)
    ]
    return replace(gate, level=max(levels))


def highest(gate: AlarmGate, texts: Texts) -> Tensor:
    """Return the highest statistic of each text [n]."""
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
