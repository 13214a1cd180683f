"""A linear detector of a topic on the residual stream, and a CUSUM alarm (Page 1954) over its score."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rudder.sae_models import edit as formula
from rudder.sae_models.operations import STATISTICS


@dataclass(frozen=True)
class Detector:
    """score = x . weights + bias, the log-odds that a token is of the topic; weights [d]."""

    weights: Tensor
    bias: float

    def score(self, x: Tensor) -> Tensor:
        """[...] of residuals x [..., d]."""
        return x @ self.weights + self.bias


def fit(x: Tensor, positive: Tensor, weight: Tensor, penalty: float = 1e-3) -> Detector:
    """Logistic regression of `positive` [n] on residuals x [n, d], each token counted `weight` [n] times.

    The penalty is on the squared weights of the standardised x.
    """
    mean, deviation = x.mean(0), x.std(0)
    standardised = (x - mean) / deviation
    share, target = weight / weight.sum(), positive.float()
    weights, bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros((), requires_grad=True)
    optimiser = torch.optim.LBFGS([weights, bias], max_iter=100, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimiser.zero_grad()
        loss = functional.binary_cross_entropy_with_logits(
            standardised @ weights + bias, target, share, reduction="sum"
        )
        loss = loss + penalty * weights.square().sum()
        loss.backward()
        return loss

    optimiser.step(objective)
    raw = (weights / deviation).detach()
    return Detector(raw, float(bias.detach() - mean @ raw))


def cusum(score: Tensor, drift: float) -> Tensor:
    """S_t = max(0, S_{t-1} + score_t - drift) along the last dimension, by the formula's scan."""
    p = STATISTICS["cusum"](drift)
    u = score.double().reshape(-1)
    start = torch.arange(len(u)) // score.shape[-1] * score.shape[-1]
    steps = (score.shape[-1] - 1).bit_length()
    ones = torch.ones_like(u)
    _, shift, floor = formula.scan(ones, u + p["offset"], p["floor"] * ones, start, steps)
    return torch.maximum(floor, shift).reshape(score.shape)


def level_for(highest: Tensor, false_alarms: float) -> float:
    """The level that at most this share of benign texts' highest CUSUM values [n] exceeds (split conformal, n + 1)."""
    rank = min(len(highest), -(-int((1 - false_alarms) * (len(highest) + 1) * 1e6) // 1_000_000))
    return float(highest.sort().values[rank - 1])
