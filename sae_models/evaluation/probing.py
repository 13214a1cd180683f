"""Sparse probing (arXiv 2305.01610): how well k latents classify labelled windows of text.

A window is represented by the mean of its tokens' activations. For each class, a logistic regression reads the k
latents whose means differ most between the class and the rest. The score is the balanced accuracy on other documents,
averaged over classes; chance is 0.5.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# L2 penalty of the regression, on standardised features.
RIDGE = 1e-2
STEPS = 50


@dataclass(frozen=True)
class Labelled:
    """Pooled windows [n, features] and the class [n] of each."""

    features: Tensor
    label: Tensor


def balanced_accuracy(train: Labelled, test: Labelled, k: int) -> float:
    """Return the mean balanced accuracy over classes, each against the rest.

    ValueError: a class occurs in only one of `train` and `test`.
    """
    classes = train.label.unique()
    if not torch.equal(classes, test.label.unique()):
        raise ValueError("probing: training and test windows do not have the same classes")
    scale = train.features.std(0).clamp_min(1e-6)
    x, y = train.features / scale, test.features / scale
    scores = [_class_accuracy(x, train.label == c, y, test.label == c, k) for c in classes]
    return float(torch.stack(scores).mean())


def _class_accuracy(x: Tensor, is_class: Tensor, y: Tensor, expected: Tensor, k: int) -> Tensor:
    """Balanced accuracy on y [m, features], whose class is `expected` [m], of a probe fitted to x [n, features]."""
    difference = (x[is_class].mean(0) - x[~is_class].mean(0)).abs()
    chosen = difference.topk(min(k, x.shape[1])).indices
    predicted = _predict(x[:, chosen], is_class, y[:, chosen])
    return (predicted[expected].double().mean() + (~predicted[~expected]).double().mean()) / 2


def _predict(x: Tensor, is_class: Tensor, y: Tensor) -> Tensor:
    """Fit a logistic regression to x [n, k], both classes with equal weight; return its prediction [m] for y [m, k]."""
    centre = x.mean(0)
    x, target = (x - centre).double(), is_class.double()
    weight = torch.where(is_class, 0.5 / is_class.sum(), 0.5 / (~is_class).sum())
    parameters = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([parameters], max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        z = x @ parameters[1:] + parameters[0]
        nats = functional.binary_cross_entropy_with_logits(z, target, weight=weight, reduction="sum")
        loss = nats + RIDGE * parameters[1:].square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    bias, weights = parameters.detach().tensor_split([1])
    return (y - centre).double() @ weights + bias > 0
