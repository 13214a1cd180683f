"""A few steps of every architecture under torchrun: python -m tests.unit.ranks OUT LATENT_PARTS

The leader writes to OUT the metrics of each step, averaged over all processes, and the final weights.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rudder.sae_models.architectures import ARCHITECTURES, shards
from rudder.sae_models.sparse import collectives
from rudder.sae_models.sparse.collectives import SINGLE_PROCESS, Mesh
from rudder.sae_models.training import trainer
from rudder.sae_models.training.trainer import Trainer
from tests.unit.rigs import planted, unit

D, LATENTS, BATCH, STEPS = 16, 64, 64, 12
# The second half of a batch is larger, so that a statistic of one half differs from that of the whole.
STRONGER = 3.0
PENALISED = {"k": 2, "start": 1.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "adaptive_k": {"k_min": 2, "k_max": 6, "joint": 0.5},
    "gated": PENALISED | {"gradient_norm": 0.05},
    "jumprelu": PENALISED,
    "relu": PENALISED,
    "matryoshka": {"shares": (0.25, 0.25, 0.5)},
    "route": {"sites": 2, "gradient_norm": 0.05},
    "transcoder": {"skip": True},
}


def batch(name: str, g: torch.Generator, tokens: int) -> tuple[Tensor, Tensor | None]:
    """Return inputs and the architecture's `target`."""
    directions = unit(32, D, torch.Generator().manual_seed(7))
    x = planted(tokens, directions, g)
    x[tokens // 2 :] *= STRONGER
    if name == "route":
        return torch.stack([x, planted(tokens, directions, g)], 1), None
    if name == "transcoder":
        return x, x.roll(1, 1) + 1
    return x, 5 + x[:, 0] / 50 if name == "adaptive_k" else None


def initialised_trainer(name: str, mesh: Mesh) -> Trainer:
    """Return a trainer with dead latents: latents are dead after one batch without firing, and a third of them have
    small encoder vectors.
    """
    kind = ARCHITECTURES[name]
    settings: dict[str, Any] = {"latents": LATENTS, "k": 4, "learning_rate": 1e-3, "precision": "float32"}
    whole = kind(D, kind.config_type(**(settings | SETTINGS.get(name, {}))), torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole.encoder[::3] *= 0.3
    trained = Trainer(shards.shard(whole, mesh), trainer.Config(STEPS * BATCH, dead_after=BATCH // 2))
    trained.initialise(*batch(name, torch.Generator().manual_seed(4), 1024))
    return trained


def result(name: str, mesh: Mesh) -> dict[str, Any]:
    """Return the metrics of each step, averaged over batch parts, and the unsharded weights."""
    trained, g = initialised_trainer(name, mesh), torch.Generator().manual_seed(5)
    steps = []
    for _ in range(STEPS):
        x, target = batch(name, g, BATCH)
        metrics = trained.step(mesh.local_batch(x), None if target is None else mesh.local_batch(target))
        figures = {"loss": metrics.loss, "l0": metrics.l0, "fvu": metrics.fvu, "dead": metrics.dead, **metrics.parts}
        mesh.batch_all_reduce_mean_(values := [value.float().clone() for value in figures.values()])
        steps.append(dict(zip(figures, map(float, values), strict=True)))
    template = initialised_trainer(name, SINGLE_PROCESS).architecture
    return {"steps": steps, "weights": shards.unshard(trained.architecture, template).state_dict()}


def main() -> None:
    """Run all architectures."""
    mesh = collectives.init_mesh(int(sys.argv[2]), BATCH)
    results = {name: result(name, mesh) for name in ARCHITECTURES}
    if mesh.is_leader:
        torch.save(results, Path(sys.argv[1]))
    collectives.destroy_mesh()


if __name__ == "__main__":
    main()
