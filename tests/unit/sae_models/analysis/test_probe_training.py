"""Probes: the loss by hand, and that it finds a marked span behind a harmless prefix where plain BCE does not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from rudder.sae_models.analysis.probe_training import (
    Linear,
    Sample,
    TrainingSettings,
    average,
    class_weights,
    fit_linear,
    smoothed,
    streaming_loss,
)
from rudder.sae_models.statistics import Statistic

SETTINGS = TrainingSettings(learning_rate=3e-2)
# Every token counts alike, and has the label of its exchange.
PLAIN = replace(SETTINGS, window=1, temperature=1e9)
WIDTH, SPAN = 8, 24


def test_smoothed_logits_by_hand() -> None:
    z = torch.tensor([[1.0, 3.0, 5.0, 9.0], [2.0, 4.0, 100.0, 100.0], [6.0, 0.0, 3.0, 100.0]])
    zbar, valid = smoothed(z, torch.tensor([4, 2, 3]), 3)
    assert valid.tolist() == [[True, True], [True, False], [True, False]]
    assert zbar[valid].tolist() == pytest.approx([3.0, 17 / 3, 3.0, 3.0])


def test_loss_by_hand() -> None:
    z, label = torch.tensor([[0.0, 2.0, 100.0]]), torch.tensor([1.0])
    loss = streaming_loss(z, torch.tensor([2]), label, replace(SETTINGS, window=1, temperature=2.0))
    weight = np.exp([0.0, 1.0]) / np.exp([0.0, 1.0]).sum()
    assert float(loss) == pytest.approx(weight @ np.log1p(np.exp([0.0, -2.0])), rel=1e-6)


def test_class_weights_balance_classes_and_neighbours() -> None:
    positive = torch.tensor([True, False, False, False, False])
    weight = class_weights(positive, torch.tensor([False, True, False, False, False]))
    assert weight.tolist() == pytest.approx([2.5, 1.25, 1.25 / 3, 1.25 / 3, 1.25 / 3])
    assert class_weights(positive, ~positive).tolist() == pytest.approx([2.5, 0.625, 0.625, 0.625, 0.625])


def exchanges(seed: int, count: int) -> tuple[list[Tensor], Tensor]:
    """Streams of which every second has a marked span behind a prefix of random length.

    The span moves the first coordinate. The second is the style of a text: it differs from text to text more than
    between the classes, and is in the prefix of either.
    """
    rng, streams = np.random.default_rng(seed), []
    label = np.arange(count) % 2
    for positive in label:
        x = rng.normal(size=(int(rng.integers(20, 100)) + SPAN, WIDTH))
        x[:-SPAN, 1] += rng.normal(0.6 * positive)
        x[-SPAN:, 0] += 1.2 * positive
        streams.append(torch.tensor(x, dtype=torch.float32))
    return streams, torch.tensor(label, dtype=torch.float32)


def recall(probe: Linear, streams: list[Tensor], label: Tensor) -> float:
    """Share of the positives whose highest served statistic is above that of 99 % of the negatives."""
    highest = [Statistic("moving_average", 0.12).update(probe.score(x).numpy()).max() for x in streams]
    benign, noticed = (np.sort(np.array(highest)[label.numpy() == value]) for value in (0, 1))
    return float((noticed > benign[-1 - len(benign) // 100]).mean())


@pytest.mark.parametrize("seed", range(3))
def test_weighting_and_smoothing_find_what_plain_cross_entropy_misses(seed: int) -> None:
    streams, label = exchanges(seed, 200)
    sample, test = Sample(streams, label, torch.ones(len(label))), exchanges(100 + seed, 400)
    (streaming,), (plain,) = fit_linear(sample, SETTINGS), fit_linear(sample, PLAIN)
    assert recall(streaming, *test) >= recall(plain, *test) + 0.1


def test_seeds_train_side_by_side_as_if_alone() -> None:
    streams, label = exchanges(0, 100)
    sample = Sample(streams, label, torch.ones(len(label)))
    (alone,), (first, second) = fit_linear(sample, SETTINGS, 1), fit_linear(sample, SETTINGS, 2)
    assert first.weights.numpy() == pytest.approx(alone.weights.numpy(), abs=1e-4)
    assert not torch.equal(first.weights, second.weights)
    assert torch.cosine_similarity(first.weights, second.weights, dim=0) > 0.9


def test_normalisation_is_folded_into_the_probe() -> None:
    """Shifted and scaled features give the same scores."""
    streams, label = exchanges(0, 60)
    plain, moved = Sample(streams, label, torch.ones(60)), [50 + 1000 * x for x in streams]
    (first,), (second,) = fit_linear(plain, SETTINGS), fit_linear(replace(plain, inputs=moved), SETTINGS)
    assert second.score(moved[0]).numpy() == pytest.approx(first.score(streams[0]).numpy(), abs=5e-2)


def test_the_ensemble_is_the_mean_logit() -> None:
    probes = [Linear(torch.randn(WIDTH), float(i)) for i in range(3)]
    x = torch.randn(5, WIDTH)
    expected = torch.stack([probe.score(x) for probe in probes]).mean(0)
    assert average(probes).score(x).numpy() == pytest.approx(expected.numpy(), abs=1e-5)
