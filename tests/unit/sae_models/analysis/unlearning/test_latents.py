"""Rankers of latents, on a hand-made table."""

import pytest
import torch
from torch import Tensor

from rudder.sae_models.analysis.unlearning.latents import RANKERS, Activities, Activity, activity, best
from rudder.sae_models.sae import SAE

# Latent 0: of the topic. 1: of the topic and a neighbour. 2: everywhere. 3: rare and weak, of the topic. 4: elsewhere.
FORGET = torch.tensor([0.20, 0.30, 0.60, 0.01, 0.001])
NEAR = torch.tensor([0.01, 0.25, 0.60, 0.001, 0.1])
RETAIN = torch.tensor([0.005, 0.05, 0.60, 0.001, 0.2])


def of(frequency: Tensor) -> Activity:
    return Activity(1000, frequency, 2 * frequency, 5 * frequency)


def table() -> Activities:
    return Activities(of(FORGET), [of(NEAR)], of(RETAIN))


@pytest.mark.parametrize(
    ("ranker", "expected"),
    [("farrell", [0, 3]), ("crisp", [0, 3]), ("dsg", [0]), ("dsg-mean-square", [0]), ("chi-square", [1, 0])],
)
def test_selection(ranker: str, expected: list[int]) -> None:
    assert best(RANKERS[ranker](table()), 2) == expected


def test_saeuron_takes_shares_of_all_activation() -> None:
    shares = FORGET / FORGET.sum() - RETAIN / RETAIN.sum()
    torch.testing.assert_close(RANKERS["saeuron"](table()), shares)


def test_a_planted_formatting_latent_is_rejected() -> None:
    """Retained text of the same form has it too, so that no ranker takes it for the topic's."""
    frequency = torch.tensor([0.2, 0.5])
    retained = torch.tensor([0.001, 0.5])
    seen = Activities(of(frequency), [of(retained)], of(retained))
    for name, ranker in RANKERS.items():
        assert 1 not in best(ranker(seen), 2), name
    unseen = Activities(of(frequency), [of(torch.tensor([0.001, 0.0]))], of(torch.tensor([0.001, 0.0])))
    assert 1 in best(RANKERS["farrell"](unseen), 2), "it passes where retained text lacks the form"


def test_activity_is_over_tokens() -> None:
    sae = SAE(torch.eye(2), torch.zeros(2), torch.ones(2), torch.eye(2), torch.zeros(2))
    figures = activity(sae, torch.tensor([[3.0, 1.0], [0.0, 5.0]]))
    assert figures.frequency.tolist() == [0.5, 0.5]
    assert figures.mean.tolist() == [1.5, 2.5]
    assert figures.square.tolist() == [4.5, 12.5]
