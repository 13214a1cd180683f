"""Rows in closed form and trained rows."""

from pathlib import Path

import pytest
import torch

from rudder.sae_models.analysis.unlearning import learned
from rudder.sae_models.analysis.unlearning.learned import LearnedBlend, LearnedRows, null_space_rows
from rudder.sae_models.analysis.unlearning.material import Material, gather
from rudder.sae_models.sae import activations
from tests.unit.sae_models.analysis.unlearning.rigs import SMALL, TOPIC, rig, save_corpus


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    path: Path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    return gather(rig(), save_corpus(path), TOPIC, SMALL)


def test_closed_form_leaves_benign_residuals_where_they_are() -> None:
    """On a toy whose topic has directions of its own: benign displacement is 0, the topic's reaches its target."""
    generator = torch.Generator().manual_seed(0)
    benign = torch.cat([torch.randn(400, 4, generator=generator), torch.zeros(400, 4)], 1)
    topic = torch.randn(300, 8, generator=generator)
    target = -torch.cat([torch.zeros(300, 4), topic[:, 4:]], 1)
    rows = null_space_rows(benign, topic, target, rank=4)
    moved = activations(benign, rows) @ rows.decoder
    assert moved.norm(dim=1).max() < 1e-5
    reached = activations(topic, rows) @ rows.decoder
    assert (reached - target).norm() < 0.02 * target.norm()


def test_rows_as_a_bank_holds_them_displace_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    module = LearnedRows(torch.randn(3, 8, generator=generator), torch.randn(8, generator=generator), 2.0)
    module.decoder.data = torch.randn(3, 8, generator=generator)
    module.bias.data = torch.randn(3, generator=generator)
    x = 5 * torch.randn(20, 8, generator=generator)
    rows = module.rows()
    torch.testing.assert_close(activations(x, rows) @ rows.decoder, module(x).detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rows.decoder.norm(dim=1), torch.ones(3))


def test_training_lowers_the_divergence_and_leaves_the_models_alone(material: Material) -> None:
    before = {name: value.clone() for name, value in rig().model.state_dict().items()}
    start = torch.nn.functional.normalize(torch.randn(8, 192, generator=torch.Generator().manual_seed(0)), dim=1)
    module = LearnedRows(start, torch.zeros(192), 1.0)
    losses = learned.fit(material, [0, 1, 2], module, 8)
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])
    assert all(torch.equal(value, before[name]) for name, value in rig().model.state_dict().items())


def test_a_trained_blend_keeps_its_weight_between_0_and_1(material: Material) -> None:
    module = LearnedBlend(torch.ones(192))
    learned.fit(material, [0, 1, 2], module, 2)
    assert 0 < float(module.logit.detach().sigmoid()) < 1
    assert not torch.equal(module.vector().detach(), torch.ones(192))
