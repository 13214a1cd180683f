"""A few steps of every architecture, in the processes of torchrun: python -m tests.unit.ranks OUT LATENT_PARTS

The first process writes OUT: what all saw together at each step, and the weights they came to.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rudder.sae_models.architectures import ARCHITECTURES, shards
from rudder.sae_models.sparse import collectives as distributed
from rudder.sae_models.sparse.collectives import ALONE, Mesh
from rudder.sae_models.training import trainer
from rudder.sae_models.training.trainer import Trainer
from tests.unit.rigs import planted, unit

D, LATENTS, BATCH, STEPS = 16, 64, 64, 12
# The second half of a batch is stronger, so that what is right for a half is wrong for the whole.
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
    """Inputs, and what an architecture is given beside them."""
    directions = unit(32, D, torch.Generator().manual_seed(7))
    x = planted(tokens, directions, g)
    x[tokens // 2 :] *= STRONGER
    if name == "route":
        return torch.stack([x, planted(tokens, directions, g)], 1), None
    if name == "transcoder":
        return x, x.roll(1, 1) + 1
    return x, 5 + x[:, 0] / 50 if name == "adaptive_k" else None


def begun(name: str, mesh: Mesh) -> Trainer:
    """A trainer in which what was silent for a batch is dead; a third of the latents speak softly, so that some are."""
    kind = ARCHITECTURES[name]
    made: dict[str, Any] = {"latents": LATENTS, "k": 4, "learning_rate": 1e-3, "precision": "float32"}
    whole = kind(D, kind.config_type(**(made | SETTINGS.get(name, {}))), torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole.encoder[::3] *= 0.3
    trained = Trainer(shards.sharded(whole, mesh), trainer.Config(STEPS * BATCH, dead_after=BATCH // 2))
    trained.initialise(*batch(name, torch.Generator().manual_seed(4), 1024))
    return trained


def result(name: str, mesh: Mesh) -> dict[str, Any]:
    """Figures of each step, as the mean over the parts of the batch; then the whole weights."""
    trained, g = begun(name, mesh), torch.Generator().manual_seed(5)
    found = []
    for _ in range(STEPS):
        x, target = batch(name, g, BATCH)
        seen = trained.step(mesh.part(x), None if target is None else mesh.part(target))
        figures = {"loss": seen.loss, "l0": seen.l0, "fvu": seen.fvu, "dead": seen.dead, **seen.parts}
        mesh.average(held := [value.float().clone() for value in figures.values()])
        found.append(dict(zip(figures, map(float, held), strict=True)))
    template = begun(name, ALONE).architecture
    return {"steps": found, "weights": shards.whole(trained.architecture, template).state_dict()}


def main() -> None:
    """All architectures."""
    mesh = distributed.join(int(sys.argv[2]), BATCH)
    found = {name: result(name, mesh) for name in ARCHITECTURES}
    if mesh.leads:
        torch.save(found, Path(sys.argv[1]))
    distributed.leave()


if __name__ == "__main__":
    main()
