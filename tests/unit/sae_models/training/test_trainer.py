"""Trainers resume exactly, count tokens since a latent fired, and follow their schedules."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from rudder.sae_models.architectures import ARCHITECTURES, offsets
from rudder.sae_models.architectures.schedule import ramp, trapezoid
from rudder.sae_models.training import memory
from rudder.sae_models.training.trainer import Config, Trainer
from tests.unit.rigs import planted, unit

DIRECTIONS = unit(64, 32, torch.Generator().manual_seed(0))


def new_trainer(name: str = "batch_topk", dead_after: int = 500) -> Trainer:
    """Return a trainer before its first step."""
    kind = ARCHITECTURES[name]
    config = kind.config_type(latents=96, k=4, learning_rate=3e-3)
    architecture = kind(32, config, torch.Generator().manual_seed(1000))
    trained = Trainer(architecture, Config(40 * 64, dead_after=dead_after))
    trained.initialise(planted(2048, DIRECTIONS, torch.Generator().manual_seed(1)))
    return trained


def batches(count: int) -> Iterable[Tensor]:
    """Return the same batches on every call."""
    g = torch.Generator().manual_seed(2)
    return [planted(64, DIRECTIONS, g) for _ in range(count)]


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"route", "transcoder"}))
def test_resumed_run_equals_an_uninterrupted_run(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("run") / "state.pt"
    uninterrupted, interrupted = new_trainer(name), new_trainer(name)
    losses = [float(uninterrupted.step(x).loss) for x in batches(20)]
    for x in list(batches(20))[:11]:
        interrupted.step(x)
    torch.save(interrupted.state_dict(), path)
    resumed = new_trainer(name)
    resumed.load_state_dict(torch.load(path, weights_only=True))
    again = [float(resumed.step(x).loss) for x in list(batches(20))[11:]]
    assert again == losses[11:]
    assert torch.equal(resumed.tokens_since_fired, uninterrupted.tokens_since_fired)
    assert resumed.tokens == 20 * 64


def test_step_learns_and_does_not_modify_its_batch() -> None:
    trained = new_trainer()
    x = planted(64, DIRECTIONS, torch.Generator().manual_seed(3))
    before = x.clone()
    losses = [float(trained.step(x).fvu) for _ in range(20)]
    assert torch.equal(x, before)
    assert losses[-1] < 0.8 * losses[0]
    assert torch.allclose(trained.architecture.decoder.norm(dim=1), torch.ones(96), atol=1e-5)


def test_latent_is_dead_after_dead_after_tokens() -> None:
    trained = new_trainer(dead_after=200)
    with torch.no_grad():
        trained.architecture.bias[7] = -100.0
    dead = [float(trained.step(x).dead) for x in batches(6)]
    assert dead[:4] == [0, 0, 0, 0]
    assert dead[4] > 0
    assert float(trained.tokens_since_fired[7]) == 6 * 64
    assert float(trained.tokens_since_fired.min()) == 0


def test_metrics_count_active_latents() -> None:
    trained = new_trainer("topk")
    metrics = trained.step(next(iter(batches(1))))
    assert 3 < float(metrics.l0) <= 4
    assert set(metrics.parts) == {"fvu", "auxiliary", "density"}
    assert 0 < metrics.learning_rate < 3e-3


def test_saes_on_one_stream_train_independently() -> None:
    together = [new_trainer("topk"), new_trainer("relu")]
    for x in batches(5):
        for trainer in together:
            trainer.step(x)
    alone = new_trainer("relu")
    for x in batches(5):
        alone.step(x)
    assert torch.equal(together[1].architecture.encoder, alone.architecture.encoder)


def test_schedules() -> None:
    shares = [round(trapezoid(progress, 0.1, 0.5), 3) for progress in (0.0, 0.05, 0.1, 0.5, 0.75, 1.0)]
    assert shares == [0, 0.5, 1, 1, 0.5, 0]
    assert trapezoid(0.0, 0.0, 0.0) == 1
    assert [ramp(progress, 0.2) for progress in (0.0, 0.1, 0.2, 1.0)] == [0, 0.5, 1, 1]
    assert ramp(0.0, 0.0) == 1


def test_geometric_median_is_robust_to_outliers() -> None:
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([1.0, 2.0, 3.0])
    moved = torch.cat([x, torch.full((20, 3), 1000.0)])
    assert float((offsets.geometric_median(moved) - offsets.geometric_median(x)).norm()) < 0.3
    assert float((offsets.mean(moved) - offsets.mean(x)).norm()) > 100
    line = torch.tensor([[0.0], [1.0], [10.0]])
    assert float(offsets.geometric_median(line)) == pytest.approx(1, abs=1e-3)


def test_keep_freed_changes_no_result() -> None:
    memory.keep_freed()
    assert float(torch.ones(1 << 22).sum()) == 1 << 22
