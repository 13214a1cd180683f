"""Train streaming probes on whole exchanges, after Constitutional Classifiers++ (arXiv 2601.04603).

An exchange has one label, which is wrong on its harmless tokens. Training therefore smooths the logits over a sliding
window (SWiM), zbar_t = mean of z_{t-M+1..t}, and weights the positions of an exchange by their own logits:

    L = sum over t >= M of w_t * BCE(y, sigmoid(zbar_t))       w = softmax over t of zbar_t / tau

Positions that are judged harmless do not count, and a confident false alarm, which costs a whole answer in a stream,
costs most. An exchange shorter than M gives one prediction, the mean of all its logits. Inputs are the tokens that the
server counts: without BOS and excluded tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

EPSILON = 1e-6


@dataclass(frozen=True)
class TrainingSettings:
    """`window`: M of SWiM, in tokens. `temperature`: tau of the softmax. `batch`: exchanges of a step."""

    window: int = 16
    temperature: float = 1.0
    epochs: int = 20
    batch: int = 32
    learning_rate: float = 2e-2
    weight_decay: float = 1e-2


@dataclass(frozen=True)
class Sample:
    """Exchanges to train on.

    inputs: of each exchange, what its tokens are scored by [tokens, ...]. label [n]: probability that the exchange is
    to be noticed, 0 or 1 or a soft label between. weight [n]: of each exchange in the loss.
    """

    inputs: Sequence[Tensor]
    label: Tensor
    weight: Tensor


def class_weights(positive: Tensor, near: Tensor, near_share: float = 0.5) -> Tensor:
    """Return weights [n] by which positives have half of the mass, and near negatives their share of the other half.

    positive, near: bool [n]. Without near negatives, or without others, the rest have all of it. The mean is 1.
    """
    near, far = ~positive & near, ~positive & ~near
    near_share = float(near.any()) if not (near.any() and far.any()) else near_share
    weight = torch.zeros(len(positive))
    for members, share in ((positive, 1.0), (near, near_share), (far, 1 - near_share)):
        weight[members] = share / members.sum()
    return weight * len(weight) / 2


def smoothed(z: Tensor, length: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Return SWiM logits zbar [n, m] and whether each is a prediction, for logits z [n, L] of `length` [n] tokens.

    m = max(L - window + 1, 1); column i holds position i + window - 1.
    """
    window = min(window, z.shape[1])
    means = z.unfold(1, window, 1).mean(-1)
    valid = torch.arange(means.shape[1]) < (length - window + 1).clamp_min(1)[:, None]
    inside = torch.arange(z.shape[1]) < length[:, None]
    whole = (z * inside).sum(1) / length
    first = torch.where(length < window, whole, means[:, 0])
    return torch.cat([first[:, None], means[:, 1:]], 1), valid


def streaming_loss(z: Tensor, length: Tensor, label: Tensor, settings: TrainingSettings) -> Tensor:
    """Return the softmax-weighted loss [n] of exchanges with logits z [n, L], padded behind `length` [n] tokens."""
    zbar, valid = smoothed(z, length, settings.window)
    weight = (zbar / settings.temperature).masked_fill(~valid, -torch.inf).softmax(1)
    loss = functional.binary_cross_entropy_with_logits(zbar, label[:, None].expand_as(zbar), reduction="none")
    return (weight * loss).sum(1)


def fit(
    score: Callable[[Tensor], Tensor], parameters: list[Tensor], sample: Sample, settings: TrainingSettings
) -> None:
    """Minimise the loss of `score`, from padded inputs [n, L, ...] to logits [models, n, L], in place.

    The models are trained side by side, each as if alone, on the same batches.
    """
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=settings.weight_decay)
    total = settings.epochs * -(-len(sample.inputs) // settings.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / total)
    for _ in range(settings.epochs):
        for batch in torch.randperm(len(sample.inputs), generator=generator).split(settings.batch):
            optimiser.zero_grad()
            inputs = [sample.inputs[i] for i in batch.tolist()]
            length = torch.tensor([len(x) for x in inputs])
            losses = [
                streaming_loss(z, length, sample.label[batch], settings)
                for z in score(pad_sequence(inputs, batch_first=True))
            ]
            (torch.stack(losses) * sample.weight[batch]).mean(1).sum().backward()
            optimiser.step()
            schedule.step()


@dataclass(frozen=True)
class Linear:
    """score = x . weights + bias on features x [..., D]; weights float32 [D]."""

    weights: Tensor
    bias: float

    def score(self, x: Tensor) -> Tensor:
        """Return the scores [...], float64, of features x [..., D]."""
        return (x.float() @ self.weights).double() + self.bias


def fit_linear(sample: Sample, settings: TrainingSettings, seeds: int = 1) -> list[Linear]:
    """Fit linear probes on features [tokens, D] of each exchange, from the initial weights of each seed.

    Training reads features standardised by their mean and deviation over all tokens; the result reads them as they are.
    """
    mean, deviation = moments(sample.inputs)
    initial = [torch.randn(len(mean), generator=torch.Generator().manual_seed(seed)) for seed in range(seeds)]
    weights = (torch.stack(initial, 1) * 0.1 * len(mean) ** -0.5).requires_grad_()
    bias = torch.zeros(seeds, requires_grad=True)

    def raw() -> tuple[Tensor, Tensor]:
        w = weights / deviation[:, None]
        return w, bias - mean @ w

    def score(x: Tensor) -> Tensor:
        w, b = raw()
        return (x @ w + b).movedim(-1, 0)

    fit(score, [weights, bias], sample, settings)
    w, b = (each.detach() for each in raw())
    return [Linear(w[:, seed].clone(), float(b[seed])) for seed in range(seeds)]


def moments(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [D] of the tokens of all exchanges, each [tokens, D]."""
    tokens = sum(len(x) for x in inputs)
    mean = torch.stack([x.float().sum(0) for x in inputs]).sum(0) / tokens
    variance = torch.stack([(x.float() - mean).square().sum(0) for x in inputs]).sum(0) / tokens
    return mean, variance.sqrt().clamp_min(EPSILON)


def average(probes: Sequence[Linear]) -> Linear:
    """Return the ensemble of linear probes: its logit, the mean of theirs, is that of one probe."""
    weights = torch.stack([probe.weights for probe in probes]).mean(0)
    return Linear(weights, sum(probe.bias for probe in probes) / len(probes))
