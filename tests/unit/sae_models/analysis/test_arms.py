"""Comparison of arms: grades and their harmonic mean by hand, and intervals over concepts and prompts."""

from math import log
from typing import Any

import pytest
import torch

from rudder.sae_models import PRETRAINED
from rudder.sae_models.analysis import arms
from rudder.sae_models.analysis.arms import Chosen, Outcome, Rubric
from rudder.sae_models.analysis.candidates import group_of
from rudder.sae_models.analysis.steering import Trial
from rudder.sae_models.bundle import bundle as bundles
from rudder.server.cli.eval.steering import bars_of

RUBRIC = Rubric(nats=3.0, repeated=0.01, other_prompt=0.2, own_prompt=0.5)


def grades(response: float, dear: float, rise: float, kept: float) -> list[float]:
    trial = Trial([""], torch.tensor([3.0 + log(dear)]), torch.zeros(1), torch.tensor([0.01 + rise]), 1.0)
    return RUBRIC.grades(trial, torch.tensor([response]), torch.tensor([kept]))[0].tolist()


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ((0.6, 1.0, 0.0, 0.6), [2, 2, 2]),
        ((0.3, 2.0, 0.1, 0.3), [1, 1, 1]),
        ((0.1, 3.0, 0.0, 0.1), [0, 0, 0]),
        ((0.6, 1.0, 0.5, 0.6), [2, 0, 2]),
        ((0.6, 0.1, 0.1, 0.6), [2, 1, 2]),
    ],
)
def test_texts_are_graded_for_topic_fluency_and_prompt(figures: tuple[float, ...], expected: list[float]) -> None:
    assert grades(*figures) == expected


def test_the_score_is_the_harmonic_mean_and_0_if_one_grade_is() -> None:
    found = arms.harmonic(torch.tensor([[2.0, 2.0, 2.0], [1.0, 2.0, 2.0], [2.0, 0.0, 2.0], [0.0, 0.0, 0.0]]))
    assert found.tolist() == pytest.approx([2.0, 1.5, 0.0, 0.0])


def test_intervals_are_over_concepts_and_prompts() -> None:
    same = arms.estimate(arms.resampled([torch.full((8,), 0.5)] * 3))
    assert (same.low, same.value, same.high) == (0.5, 0.5, 0.5)
    differing = arms.estimate(arms.resampled([torch.zeros(8), torch.ones(8)]))
    assert (differing.low, differing.value, differing.high) == (0.0, 0.5, 1.0)


def test_differences_are_paired() -> None:
    noisy = [torch.rand(16, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    difference = arms.resampled([each + 0.1 for each in noisy]) - arms.resampled(noisy)
    assert torch.allclose(difference, torch.full_like(difference, 0.1))


def share(value: float) -> torch.Tensor:
    return torch.full((2001,), value)


@pytest.mark.parametrize(
    ("sae", "means", "random", "reached"),
    [(0.4, 0.5, 0.1, [True, True]), (0.39, 0.5, 0.1, [False, True]), (0.4, 0.5, 0.14, [True, False]),
     (0.0, 0.0, 0.0, [False, False])],
)  # fmt: skip
def test_the_bar_is_a_share_of_the_means_and_a_multiple_of_random(
    sae: float, means: float, random: float, reached: list[bool]
) -> None:
    bars = bars_of({"sae": share(sae), "difference-of-means": share(means), "random": share(random)})
    assert [bar["reached"] for bar in bars.values()] == reached
    assert [bar["certain"] for bar in bars.values()] == reached


def test_the_sae_arm_is_chosen_on_tuning_prompts() -> None:
    outcome: Any = Outcome(*(torch.zeros(1) for _ in range(7)))
    found = {
        name: Chosen(0.1, 0.1, tuned, outcome, outcome)
        for name, tuned in (("input", 0.1), ("group", 0.3), ("random", 0.9))
    }
    assert arms.best_of_sae(found) is found["group"]


def test_own_words_are_what_the_latents_promote() -> None:
    shipped = bundles.open_unverified(PRETRAINED / "textbook-lm-layers.2")
    found = arms.own_words(shipped, group_of("x", shipped, (11,), (1.0,)))
    shipped.catalogue.close()
    assert {"common", "famous", "opposite"} <= set(found)
    assert "\\xef" not in found


def test_prompts_are_beginnings_each_once() -> None:
    assert arms.prompts_of(["a b c d", "a b c e", "f g"], 3) == ["a b c", "f g"]
