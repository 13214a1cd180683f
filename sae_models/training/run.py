"""A run from its configuration to its bundles: it can be killed at any moment and goes on from its last checkpoint.

config.yaml        what was asked for
metrics.jsonl      how it went, events/ the same for TensorBoard
checkpoints/       the last one
report.html        the same for a person to read
NAME/              the bundle of each SAE, written once it is whole
"""

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from rudder.sae_models.activations import stream
from rudder.sae_models.activations.stream import Source, Vectors
from rudder.sae_models.architectures import ARCHITECTURES, shards
from rudder.sae_models.architectures.architecture import Architecture
from rudder.sae_models.errors import UserError
from rudder.sae_models.files import locked, write_whole
from rudder.sae_models.optional import MissingPackage
from rudder.sae_models.sae import SAE
from rudder.sae_models.sparse import collectives as distributed
from rudder.sae_models.sparse.collectives import Mesh
from rudder.sae_models.training import checkpoint, config, data, report, trainer
from rudder.sae_models.training import export as evaluation
from rudder.sae_models.training.config import Config, ConfigError, Trained
from rudder.sae_models.training.data import Given
from rudder.sae_models.training.record import Record
from rudder.sae_models.training.trainer import Metrics, Trainer

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
SAMPLE_TOKENS = 100_000
# Figures of a step that a line of the record averages.
MEANS = ("loss", "fvu", "l0")
# A twentieth of a run without firing: arXiv 2406.04093 takes 10 million tokens, in runs of billions.
DEAD_SHARE = 1 / 20


@dataclass(frozen=True)
class Learner:
    """One SAE in training."""

    spec: Trained
    trainer: Trainer


def run(asked: Config) -> list[Path]:
    """Trains what is asked for and returns its bundles. In a process group, each rank calls this.

    ConfigError, CorpusError, StoreError, CheckpointError, ValueError or OSError: the one thing that is wrong.
    """
    mesh = distributed.join(asked.latent_ranks, asked.batch)
    folder = Path(asked.out)
    bundles = [folder / spec.name for spec in config.trained(asked)]
    try:
        with locked(folder) if mesh.leads else nullcontext():
            if mesh.leads:
                keep(folder, asked)
            if all(path.exists() for path in bundles):
                if mesh.leads and not (folder / report.REPORT).exists():
                    tell(folder)
                return bundles
            made = data.gather(asked)
            source = data.source_of(asked, made, mesh)
            sample = data.sample_of(source, SAMPLE_TOKENS)
            learners = [begin(spec, asked, sample, data.device_of(asked), mesh) for spec in config.trained(asked)]
            train(asked, learners, source, mesh, folder)
            saes = [canonical(learner, sample) for learner in learners]
            if mesh.leads:
                finish(asked, learners, saes, made, folder)
            return bundles
    finally:
        distributed.leave()


def keep(folder: Path, asked: Config) -> None:
    """Writes the configuration into the run's folder. ConfigError: the folder is of a run with another one."""
    path = folder / CONFIG
    if path.exists():
        field = config.difference(config.load(path), asked)
        if field is not None:
            raise ConfigError(field, f"differs from {path}; set another out, or use the configuration of that run")
    else:
        write_whole(path, config.dump(asked).encode())


def begin(spec: Trained, asked: Config, sample: Vectors, device: torch.device, mesh: Mesh) -> Learner:
    """An SAE at its beginning, this rank's part of it."""
    x, target = data.inputs(spec, sample), data.target(spec, sample)
    architecture = shards.sharded(fresh(spec, x.shape[-1]), mesh).to(device)
    schedule = trainer.Config(
        asked.tokens, asked.warm_up, asked.decay, asked.dead_after or int(asked.tokens * DEAD_SHARE)
    )
    learner = Learner(spec, Trainer(architecture, schedule))
    learner.trainer.initialise(x, target)
    return learner


def fresh(spec: Trained, d: int) -> Architecture:
    """An architecture as its seed makes it."""
    generator = torch.Generator().manual_seed(spec.seed)
    return ARCHITECTURES[spec.architecture](d, spec.settings, generator)


def train(asked: Config, learners: Sequence[Learner], source: Source, mesh: Mesh, folder: Path) -> None:
    """All steps that are still to be made."""
    steps, done = asked.tokens // asked.batch, resume(learners, folder / CHECKPOINTS, mesh)
    order = stream.Order(asked.batch, asked.data.block, asked.seed)
    batches = stream.prefetched(islice(stream.batches(source, order, done), steps - done))
    intervals = [Interval() for _ in learners]
    size = asked.batch
    with (
        Record(folder, done, mesh.leads) as record,
        closing(batches),
        bar(steps * size, done * size, mesh) as progress,
    ):
        for step, vectors in enumerate(batches, done + 1):
            for learner, interval in zip(learners, intervals, strict=True):
                interval.add(advance(learner, vectors, mesh))
            progress.update(size)
            saves = step % asked.checkpoint_every == 0 or step == steps
            if saves or step % asked.log_every == 0:
                figures = {one.spec.name: held.take(mesh) for one, held in zip(learners, intervals, strict=True)}
                require_finite(figures, step)
                record.add("train", step, step * size, figures)
                progress.set_postfix(fvu=in_short([found["fvu"] for found in figures.values()]), refresh=False)
            if saves:
                checkpoint.save(folder / CHECKPOINTS, step, state_of(learners), mesh)


def bar(total: int, initial: int, mesh: Mesh) -> "tqdm[NoReturn]":
    """The progress bar, of one process alone."""
    return tqdm(total=total, initial=initial, unit="tok", unit_scale=True, desc="train", disable=not mesh.leads)


def in_short(values: Sequence[float]) -> str:
    """A few figures one by one, of many the range: a line of a terminal has no room for more."""
    if len(values) <= 3:
        return " ".join(f"{value:.4f}" for value in values)
    return f"{min(values):.4f}..{max(values):.4f}"


def require_finite(figures: Mapping[str, Mapping[str, float]], step: int) -> None:
    """ValueError for an SAE that has diverged: nothing of it is saved."""
    for name, found in figures.items():
        if not math.isfinite(found["loss"]):
            raise UserError(f"{name}: the loss is {found['loss']} at step {step}: try a lower learning_rate")


def advance(learner: Learner, vectors: Vectors, mesh: Mesh) -> Metrics:
    """One step of one SAE on this rank's part of a batch."""
    device = learner.trainer.silent.device
    part = {site: mesh.part(x).to(device) for site, x in vectors.items()}
    return learner.trainer.step(data.inputs(learner.spec, part), data.target(learner.spec, part))


class Interval:
    """Means over the steps since the last line of the record. Figures stay on the device until they are asked for."""

    def __init__(self) -> None:
        self._steps: list[Metrics] = []

    def add(self, metrics: Metrics) -> None:
        """One more step."""
        self._steps.append(metrics)

    def take(self, mesh: Mesh) -> dict[str, float]:
        """The means, over the parts of the batch too, and the state at the last step; begins anew."""
        last, steps = self._steps[-1], self._steps
        self._steps = []
        means = torch.stack([torch.stack([getattr(step, name) for step in steps]).mean() for name in MEANS])
        names = [name for name in last.parts if name not in MEANS]
        figures = torch.cat([means, *(last.parts[name].reshape(1).to(means) for name in names)])
        mesh.average([figures])
        found = dict(zip([*MEANS, *names], figures.tolist(), strict=True))
        return found | {"dead_share": float(last.dead), "learning_rate": last.learning_rate}


def state_of(learners: Sequence[Learner]) -> dict[str, Any]:
    """What a checkpoint holds: the position in the stream is the step, so this and the random state are all."""
    return {
        "trainers": {learner.spec.name: learner.trainer.state_dict() for learner in learners},
        "random": torch.get_rng_state(),
    }


def resume(learners: Sequence[Learner], folder: Path, mesh: Mesh) -> int:
    """Brings SAEs to where the last checkpoint has them; the steps made."""
    found = checkpoint.load(folder, mesh)
    if found is None:
        return 0
    step, state = found
    for learner in learners:
        learner.trainer.load_state_dict(state["trainers"][learner.spec.name])
    torch.set_rng_state(state["random"])
    return step


def canonical(learner: Learner, sample: Vectors) -> SAE:
    """The inference form, put together from all ranks."""
    x, scale = data.inputs(learner.spec, sample), learner.trainer.scale
    template = fresh(learner.spec, x.shape[-1]).to(x.device)
    joined = shards.whole(learner.trainer.architecture, template)
    return joined.canonical(scale, x * scale)


def finish(asked: Config, learners: Sequence[Learner], saes: Sequence[SAE], made: Given, folder: Path) -> None:
    """Measures, describes and writes each SAE that has no bundle yet, then the report."""
    for learner, sae in zip(learners, saes, strict=True):
        if not (folder / learner.spec.name).exists():
            evaluation.conclude(asked, learner.spec, sae, made, folder)
    tell(folder)


def tell(folder: Path) -> None:
    """Writes the report, or says what it needs: a run does not fail for want of pictures."""
    try:
        report.write(folder)
    except MissingPackage as error:
        print(f"{error}; then: rudder report {folder}", file=sys.stderr)
