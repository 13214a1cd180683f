"""A linear detector of a topic on the residual stream, and statistics of its score: CUSUM (Page 1954), window mean."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rudder.sae_models import edit as formula
from rudder.sae_models.operations import STATISTICS, TOKEN


@dataclass(frozen=True)
class Detector:
    """score = x . weights + bias: log-odds that a token belongs to the topic; weights [d]."""

    weights: Tensor
    bias: float

    def score(self, x: Tensor) -> Tensor:
        """Return scores [...] of residuals x [..., d]."""
        return x @ self.weights + self.bias


def fit(x: Tensor, positive: Tensor, weight: Tensor, penalty: float = 1e-3) -> Detector:
    """Fit a logistic regression of `positive` [n] on residuals x [n, d], with each token weighted by `weight` [n].

    The L2 penalty applies to the weights of the standardised x.
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
    """Return S_t = max(0, S_{t-1} + score_t - drift) along the last dimension, by the same scan as the server."""
    p = STATISTICS["cusum"](drift)
    u = score.double().reshape(-1)
    start = torch.arange(len(u)) // score.shape[-1] * score.shape[-1]
    steps = (score.shape[-1] - 1).bit_length()
    ones = torch.ones_like(u)
    _, shift, floor = formula.scan(ones, u + p["offset"], p["floor"] * ones, start, steps)
    return torch.maximum(floor, shift).reshape(score.shape)


def window_mean(score: Tensor, counted: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Return the mean of the last `window` scores of counted tokens, and their count so far, both [n, length].

    By the same function as the server; score and counted [n, length].
    """
    texts, length = score.shape
    count = counted.long().cumsum(1)
    start = (torch.arange(texts) * length)[:, None].expand_as(count)
    metadata = {"entry": counted.long(), "slot": torch.zeros_like(count), "start": start, "count": count}
    token = torch.stack([metadata.get(name, torch.zeros_like(count)).reshape(-1) for name in TOKEN])
    ring = torch.zeros(1, window, dtype=torch.float64)
    windows = torch.full((texts * length,), window)
    return formula.window_mean(score.double().reshape(-1), ring, token, windows).reshape(score.shape), count


def level_for(highest: Tensor, false_alarms: float) -> float:
    """Return the level that at most this share of benign texts' maximum CUSUM values [n] exceeds (split conformal)."""
    # ceil((1 - false_alarms) * (n + 1)), truncated to 1e-6 first so that a rounding error does not raise the ceiling.
    rank = min(len(highest), -(-int((1 - false_alarms) * (len(highest) + 1) * 1e6) // 1_000_000))
    return float(highest.sort().values[rank - 1])
