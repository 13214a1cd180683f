"""Classify whole texts by a few latents: a logistic model or a small tree over pooled activations, calibrated.

Latents that a classifier must not use are neither read nor stood in for: latents parallel to them are left out, and
training holds down how far the score varies with them among texts of one class. What was used, and what was not, is in
the classifier's file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from rudder.sae_models.analysis.exchanges import Exchange
from rudder.sae_models.analysis.guard_training import Rig
from rudder.sae_models.errors import UserError
from rudder.sae_models.files import write_atomically
from rudder.sae_models.sae import SAE
from rudder.sae_models.statistics import Floats

Bools = NDArray[np.bool_]
Pooling = Literal["maximum", "mean", "share"]
Kind = Literal["logistic", "tree"]
# Cosine of encoders or decoders from which two latents count as one.
PARALLEL = 0.5
STEPS, DEPTH, LEAF = 200, 3, 10
BINS = 10


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the file."""


class Node(Section, frozen=True):
    """A node of a tree: it asks whether column `column` is above `above`, and goes on with node `yes` or `no`.

    A leaf has neither, and the probability of its texts.
    """

    column: int = -1
    above: float = 0.0
    yes: int = -1
    no: int = -1
    probability: float = 0.5


class Classifier(Section, frozen=True):
    """A classifier of one topic. `latents`: what its columns are, each divided by its `scale`.

    `weights`, `bias`: of a logistic model, whose logit `calibration` (slope, offset) turns into that of a probability.
    `nodes`: of a tree, the root first. `forbidden`: latents that it must not use; `excluded`: others that are parallel
    to one of them. `record`: what it was trained and measured on.
    """

    name: str
    kind: Kind
    pooling: Pooling
    bundle: str
    bundle_sha256: str
    model_sha256: str
    latents: tuple[int, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...] = ()
    bias: float = 0.0
    calibration: tuple[float, float] = (1.0, 0.0)
    nodes: tuple[Node, ...] = ()
    forbidden: tuple[int, ...] = ()
    excluded: tuple[int, ...] = ()
    record: dict[str, Any] = {}

    def probabilities(self, pooled: Floats) -> Floats:
        """Return the probability [n] of texts with these pooled activations [n, F] of the whole dictionary."""
        columns = pooled[:, list(self.latents)] / np.array(self.scale)
        if self.kind == "tree":
            return np.array([self.nodes[leaf_of(self.nodes, row)].probability for row in columns])
        slope, offset = self.calibration
        logits = slope * (columns @ np.array(self.weights) + self.bias) + offset
        return np.asarray(1 / (1 + np.exp(-logits)))


@dataclass(frozen=True)
class Settings:
    """How a classifier is trained. `latents`: at most so many. `aversion`: weight of the forbidden latents' term."""

    kind: Kind = "logistic"
    pooling: Pooling = "maximum"
    latents: int = 16
    penalty: float = 1e-3
    aversion: float = 10.0


def pool(f: Tensor, pooling: Pooling) -> Tensor:
    """Return pooled activations [F] of f [tokens, F]: the largest, the mean, or the share of tokens with one."""
    if not len(f):
        return f.new_zeros(f.shape[1])
    match pooling:
        case "maximum":
            return f.amax(0)
        case "mean":
            return f.mean(0)
        case "share":
            return (f > 0).float().mean(0)


def pooled(rig: Rig, sae: SAE, exchanges: Sequence[Exchange], pooling: Pooling, task: str) -> Floats:
    """Return the pooled activations [n, F] of exchanges, over the tokens that a server counts."""
    rows = [pool(sae.encode(x), pooling).double().numpy() for x, _ in rig.features(exchanges, task)]
    return np.stack(rows) if rows else np.zeros((0, sae.latents))


def parallel_to(sae: SAE, forbidden: Sequence[int]) -> tuple[int, ...]:
    """Return the other latents whose encoder or decoder is parallel to that of a forbidden one."""
    found: set[int] = set()
    for weights in (sae.encoder, sae.decoder) if forbidden else ():
        units = torch.nn.functional.normalize(weights.float(), dim=1)
        cosines = (units @ units[list(forbidden)].T).abs().amax(1)
        found |= set(torch.nonzero(cosines >= PARALLEL)[:, 0].tolist())
    return tuple(sorted(found - set(forbidden)))


def select(values: Floats, label: Bools, barred: Sequence[int], count: int) -> list[int]:
    """Return up to `count` latents, by the difference of class means [n, F] in units of the spread within classes."""
    positive, negative = values[label], values[~label]
    spread = np.sqrt((positive.var(0) + negative.var(0)) / 2)
    effect = np.abs(positive.mean(0) - negative.mean(0)) / np.maximum(spread, 1e-9)
    effect[list(barred)] = 0.0
    return [int(i) for i in np.argsort(-effect, kind="stable")[:count] if effect[i] > 0]


def train(
    values: Floats, label: Bools, tune: Floats, tune_label: Bools, sae: SAE, forbidden: Sequence[int],
    settings: Settings, **identity: Any,
) -> Classifier:  # fmt: skip
    """Train on pooled activations [n, F] with labels [n], and calibrate on others. UserError: a class is missing."""
    for side, name in ((label, "training"), (tune_label, "tuning")):
        if side.all() or not side.any():
            raise UserError(f"label: no {'benign' if side.any() else 'positive'} text in the {name} split")
    excluded = parallel_to(sae, forbidden)
    latents = select(values, label, [*forbidden, *excluded], settings.latents)
    if not latents:
        raise UserError("latents: none that may be used tells the classes apart")
    scale = np.maximum(values[:, latents].std(0), 1e-9)
    columns, tuning = values[:, latents] / scale, tune[:, latents] / scale
    fields: dict[str, Any]
    if settings.kind == "tree":
        nodes = recounted(grow(columns, label), tuning, tune_label)
        fields = {"nodes": tuple(nodes)}
    else:
        weights, bias = fit(columns, label, values[:, list(forbidden)], settings)
        fields = {"weights": tuple(weights.tolist()), "bias": bias}
        fields["calibration"] = calibrate(tuning @ weights + bias, tune_label)
    return Classifier(
        kind=settings.kind, pooling=settings.pooling, latents=tuple(latents), scale=tuple(scale.tolist()),
        forbidden=tuple(forbidden), excluded=excluded, **fields, **identity,
    )  # fmt: skip


def fit(columns: Floats, label: Bools, averse: Floats, settings: Settings) -> tuple[Floats, float]:
    """Fit a logistic model of balanced classes; `averse` [n, m]: what its logit must not vary with within a class."""
    x, y = torch.from_numpy(columns), torch.from_numpy(label).double()
    balance = torch.where(y > 0, 0.5 / y.mean(), 0.5 / (1 - y).mean())
    avoid = torch.from_numpy(within_classes(averse, label))
    parameters = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([parameters], max_iter=STEPS, line_search_fn="strong_wolfe")
    # Of the columns, so that the term below is the square of a covariance with each forbidden latent.
    leaning = avoid.T @ torch.from_numpy(within_classes(columns, label, scaled=False)) / len(x)

    def objective() -> Tensor:
        optimiser.zero_grad()
        weights, bias = parameters[:-1], parameters[-1]
        loss = binary_cross_entropy_with_logits(x @ weights + bias, y, balance)
        loss = loss + settings.penalty * weights.square().sum() + settings.aversion * (leaning @ weights).square().sum()
        loss.backward()
        return loss

    optimiser.step(objective)
    found = parameters.detach().numpy()
    return found[:-1], float(found[-1])


def within_classes(values: Floats, label: Bools, scaled: bool = True) -> Floats:
    """Return values [n, m] less the mean of their class, and by their spread."""
    centred = values.copy()
    for side in (label, ~label):
        centred[side] -= values[side].mean(0)
    return centred / np.maximum(centred.std(0), 1e-9) if scaled else centred


def reliance(probabilities: Floats, averse: Floats, label: Bools) -> list[float]:
    """Return the correlation [m] of a classifier's probability with each forbidden latent, within classes."""
    scores, others = within_classes(probabilities[:, None], label), within_classes(averse, label)
    return [float(value) for value in (scores * others).mean(0)]


def calibrate(logits: Floats, label: Bools) -> tuple[float, float]:
    """Return slope and offset that turn logits into those of probabilities (Platt 1999), for the share of positives."""
    x, y = torch.from_numpy(logits), torch.from_numpy(label).double()
    # Platt's targets: no finite number of texts makes a probability 0 or 1.
    target = torch.where(y > 0, (y.sum() + 1) / (y.sum() + 2), 1 / ((1 - y).sum() + 2))
    parameters = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([parameters], max_iter=STEPS, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimiser.zero_grad()
        loss = binary_cross_entropy_with_logits(parameters[0] * x + parameters[1], target)
        loss.backward()
        return loss

    optimiser.step(objective)
    slope, offset = parameters.detach().tolist()
    return slope, offset


def grow(columns: Floats, label: Bools) -> list[Node]:
    """Grow a tree of depth DEPTH by Gini impurity; no leaf has fewer than LEAF texts."""
    nodes: list[Node] = []

    def add(index: NDArray[np.int64], depth: int) -> int:
        number = len(nodes)
        nodes.append(Node(probability=float(label[index].mean())))
        split = best_split(columns[index], label[index]) if depth < DEPTH else None
        if split:
            column, above = split
            yes = columns[index, column] > above
            children = [add(index[side], depth + 1) for side in (yes, ~yes)]
            nodes[number] = Node(column=column, above=above, yes=children[0], no=children[1])
        return number

    add(np.arange(len(label)), 0)
    return nodes


def best_split(columns: Floats, label: Bools) -> tuple[int, float] | None:
    """Return the (column, value) that leaves the least impurity; None if no split lowers it."""
    best, least = None, impurity(label) * len(label) - 1e-9
    for column, values in enumerate(columns.T):
        for above in np.unique(np.quantile(values, np.linspace(0, 1, 33)[:-1])).tolist():
            yes = values > above
            if LEAF <= yes.sum() <= len(label) - LEAF:
                left = impurity(label[yes]) * yes.sum() + impurity(label[~yes]) * (~yes).sum()
                if left < least:
                    best, least = (column, above), left
    return best


def impurity(label: Bools) -> float:
    """Return the Gini impurity of labels."""
    share = float(label.mean())
    return 2 * share * (1 - share)


def recounted(nodes: Sequence[Node], columns: Floats, label: Bools) -> list[Node]:
    """Return a tree whose leaves have the smoothed share of positives of other texts, where they have some."""
    leaves = [leaf_of(nodes, row) for row in columns]
    counted = list(nodes)
    for leaf in set(leaves):
        of_leaf = label[np.array(leaves) == leaf]
        probability = (float(of_leaf.sum()) + 1) / (len(of_leaf) + 2)
        counted[leaf] = msgspec.structs.replace(nodes[leaf], probability=probability)
    return counted


def leaf_of(nodes: Sequence[Node], row: Floats) -> int:
    """Return the number of the leaf that a text comes to."""
    number = 0
    while (node := nodes[number]).column >= 0:
        number = node.yes if row[node.column] > node.above else node.no
    return number


def calibration_error(probabilities: Floats, label: Bools) -> float:
    """Return the expected calibration error over BINS bins of equal width."""
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    gaps = [
        np.abs(probabilities[bins == b].mean() - label[bins == b].mean()) * (bins == b).sum() for b in np.unique(bins)
    ]
    return float(np.sum(gaps) / max(len(label), 1))


def save(path: Path, classifier: Classifier) -> None:
    """Write a classifier."""
    write_atomically(path, msgspec.json.format(msgspec.json.encode(classifier)) + b"\n")


def load(path: Path, bundle_sha256: str) -> Classifier:
    """Read a classifier of this bundle. UserError: it is none, or of another bundle."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Classifier)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is no classifier: {error}") from error
    if found.bundle_sha256 != bundle_sha256:
        problem = f"bundle_sha256: is {found.bundle_sha256}, the bundle has {bundle_sha256}"
        raise UserError(f"{path}: {problem}: latents mean nothing in another one")
    return found
