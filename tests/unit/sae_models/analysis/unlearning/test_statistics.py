"""Bootstrap over sections."""

import torch

from rudder.sae_models.analysis.unlearning.statistics import Sums, estimate, resamples, totals


def test_coverage_on_clustered_data() -> None:
    """The interval of a mean holds the truth in 93 to 97 % of simulated corpora whose sections differ."""
    generator = torch.Generator().manual_seed(1)
    sections, corpora, items = 150, 2000, 6
    effect = torch.randn(sections, corpora, generator=generator, dtype=torch.float64)
    noise = torch.randn(sections, corpora, generator=generator, dtype=torch.float64) / items**0.5
    means = resamples(["book"] * sections).weights @ (effect + noise) / sections
    low, high = means[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    covered = ((low <= 0) & (high >= 0)).double().mean()
    assert 0.93 <= covered <= 0.97
    naive = 1.96 * (1 + 1 / items) ** 0.5 / (sections * items) ** 0.5
    assert (means[0].abs() <= naive).double().mean() < 0.7, "items taken for independent would cover far less"


def test_resamples_keep_the_size_of_each_book() -> None:
    drawn = resamples(["a", "b", "a", "b", "b"], 50)
    assert (drawn.weights[:, [0, 2]].sum(1) == 2).all()
    assert (drawn.weights[:, [1, 3, 4]].sum(1) == 3).all()
    assert torch.equal(drawn.weights, resamples(["a", "b", "a", "b", "b"], 50).weights)


def test_sections_that_were_not_measured_are_not_drawn() -> None:
    drawn = resamples(["a", "a", "a", "b"], 50, used=torch.tensor([True, False, True, False]))
    assert not drawn.weights[:, [1, 3]].any()
    assert (drawn.weights.sum(1) == 2).all()
    assert {*drawn.members} == {"a"}


def test_ratio_is_of_sums_not_a_mean_of_ratios() -> None:
    sums = Sums(2)
    sums.add(torch.tensor([0, 1, 1]), right=torch.tensor([1, 0, 0]), items=torch.tensor([1, 1, 2]))
    ratio = estimate(totals(resamples(["a", "a"]), sums).ratio("right", "items", ["a"]))
    assert ratio.value == 0.25
    assert ratio.low == 0
    assert ratio.high == 1


def test_a_figure_that_was_not_measured_is_nan() -> None:
    result = estimate(totals(resamples(["a"]), Sums(1)).ratio("right", "items", ["a"]))
    assert result.value != result.value
