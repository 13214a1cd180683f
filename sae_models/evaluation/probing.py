"""How much a few latents say of what a text is about: sparse probes (arXiv 2305.01610) on labelled windows.

A window is the mean of its tokens' activations. For each class the k latents whose means differ most between the class
and the rest are given to a logistic regression; what is reported is the balanced accuracy on other documents, averaged
over classes. Chance is 0.5.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# Ridge of the regression, on standardised features.
RIDGE = 1e-2
STEPS = 50


@dataclass(frozen=True)
class Labelled:
    """Pooled windows [n, features] and the number of each one's class [n]."""

    features: Tensor
    label: Tensor


def balanced_accuracy(train: Labelled, test: Labelled, k: int) -> float:
    """Mean over classes, one against the rest. ValueError: a class is in one of the two alone."""
    classes = train.label.unique()
    if not torch.equal(classes, test.label.unique()):
        raise ValueError("probing: training and test windows do not have the same classes")
    scale = train.features.std(0).clamp_min(1e-6)
    x, y = train.features / scale, test.features / scale
    return float(torch.stack([_one(x, train.label == c, y, test.label == c, k) for c in classes]).mean())


def _one(x: Tensor, is_class: Tensor, y: Tensor, wanted: Tensor, k: int) -> Tensor:
    difference = (x[is_class].mean(0) - x[~is_class].mean(0)).abs()
    chosen = difference.topk(min(k, x.shape[1])).indices
    guessed = _predicted(x[:, chosen], is_class, y[:, chosen])
    return (guessed[wanted].double().mean() + (~guessed[~wanted]).double().mean()) / 2


def _predicted(x: Tensor, is_class: Tensor, y: Tensor) -> Tensor:
    """Which of y [m, k] a logistic regression on x [n, k] takes for the class; both sides weigh the same in it."""
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
    found = parameters.detach()
    return (y - centre).double() @ found[1:] + found[0] > 0
