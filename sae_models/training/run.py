"""A run, from its configuration to its bundles. It can be killed at any time and resumes from its last checkpoint.

config.yaml        the configuration
metrics.jsonl      the record; events/ holds the same for TensorBoard
checkpoints/       the last checkpoint
report.html        the record as a page with plots
NAME/              the bundle of each SAE, present only when complete
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
from torch import Tensor
from tqdm import tqdm

from rudder.sae_models import fidelity
from rudder.sae_models.activations import stream
from rudder.sae_models.activations.stream import Vectors, VectorSource
from rudder.sae_models.architectures import ARCHITECTURES, shards
from rudder.sae_models.architectures.architecture import Architecture
from rudder.sae_models.errors import UserError
from rudder.sae_models.files import lock_folder, write_atomically
from rudder.sae_models.optional import MissingPackage
from rudder.sae_models.sae import SAE
from rudder.sae_models.sparse import collectives
from rudder.sae_models.sparse.collectives import Mesh
from rudder.sae_models.training import checkpoint, config, data, export, report, trainer
from rudder.sae_models.training.config import Config, ConfigError, SAESpec
from rudder.sae_models.training.data import TrainingInputs
from rudder.sae_models.training.record import Record
from rudder.sae_models.training.trainer import Metrics, Trainer

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
SAMPLE_TOKENS = 100_000
# Metrics that a line of the record averages over steps.
MEANS = ("loss", "fvu", "l0")
# Share of the run after which a latent that has not fired is dead. arXiv 2406.04093 uses 10 million tokens, in runs of
# billions.
DEAD_SHARE = 1 / 20


@dataclass(frozen=True)
class Learner:
    """One SAE in training."""

    spec: SAESpec
    trainer: Trainer


def run(run_config: Config) -> list[Path]:
    """Train the configured SAEs and return their bundles. In a process group, every rank must call this.

    Raise ConfigError, CorpusError, StoreError, CheckpointError, ValueError or OSError with the cause.
    """
    mesh = collectives.init_mesh(run_config.latent_ranks, run_config.batch)
    folder = Path(run_config.out)
    specs = config.sae_specs(run_config)
    bundles = [folder / spec.name for spec in specs]
    try:
        with lock_folder(folder) if mesh.is_leader else nullcontext():
            if mesh.is_leader:
                write_config(folder, run_config)
            if all(path.exists() for path in bundles):
                if mesh.is_leader and not (folder / report.REPORT).exists():
                    write_report(folder)
                return bundles
            inputs = data.load_inputs(run_config)
            inputs = data.with_store(run_config, inputs, mesh)
            sample, outlier_share = data.sample(inputs.train, SAMPLE_TOKENS)
            learners = [init_learner(spec, run_config, sample, data.device_of(run_config), mesh) for spec in specs]
            train(run_config, learners, inputs.train, mesh, folder, outlier_share)
            saes = [canonical(learner, sample) for learner in learners]
            if mesh.is_leader:
                export_bundles(run_config, learners, saes, inputs, folder)
            return bundles
    finally:
        collectives.destroy_mesh()


def write_config(folder: Path, run_config: Config) -> None:
    """Write the configuration into the run's folder. Raise ConfigError if the folder belongs to a run with
    another one.
    """
    path = folder / CONFIG
    if path.exists():
        field = config.difference(config.load(path), run_config)
        if field is not None:
            raise ConfigError(field, f"differs from {path}; set another out, or use the configuration of that run")
    else:
        write_atomically(path, config.dump(run_config).encode())


def init_learner(spec: SAESpec, run_config: Config, sample: Vectors, device: torch.device, mesh: Mesh) -> Learner:
    """Initialise an SAE, this rank's shard of it."""
    x, target = data.sae_inputs(spec, sample), data.target(spec, sample)
    architecture = shards.shard(init_architecture(spec, x.shape[-1]), mesh).to(device)
    schedule = trainer.Config(
        run_config.tokens,
        run_config.warm_up,
        run_config.decay,
        run_config.dead_after or int(run_config.tokens * DEAD_SHARE),
    )
    learner = Learner(spec, Trainer(architecture, schedule))
    learner.trainer.initialise(x, target)
    return learner


def init_architecture(spec: SAESpec, d: int) -> Architecture:
    """Create an architecture from its seed."""
    generator = torch.Generator().manual_seed(spec.seed)
    return ARCHITECTURES[spec.architecture](d, spec.settings, generator)


def train(
    run_config: Config,
    learners: Sequence[Learner],
    source: VectorSource,
    mesh: Mesh,
    folder: Path,
    outlier_share: float = 0.0,
) -> None:
    """Take all remaining steps. `outlier_share`: of the source's tokens, for the record."""
    steps, done = run_config.tokens // run_config.batch, resume(learners, folder / CHECKPOINTS, mesh)
    order = stream.BatchOrder(run_config.batch, run_config.data.block, run_config.seed)
    batches = stream.prefetch(islice(stream.batches(source, order, done), steps - done))
    means = [MeanMetrics() for _ in learners]
    batch_size = run_config.batch
    with (
        Record(folder, done, mesh.is_leader) as record,
        closing(batches),
        progress_bar(steps * batch_size, done * batch_size, mesh) as progress,
    ):
        for step, vectors in enumerate(batches, done + 1):
            for learner, mean in zip(learners, means, strict=True):
                mean.add(step_learner(learner, vectors, mesh))
            progress.update(batch_size)
            is_checkpoint = step % run_config.checkpoint_every == 0 or step == steps
            if is_checkpoint or step % run_config.log_every == 0:
                figures = {learner.spec.name: mean.pop(mesh) for learner, mean in zip(learners, means, strict=True)}
                require_finite(figures, step)
                figures = {name: values | {"outlier_share": outlier_share} for name, values in figures.items()}
                record.add("train", step, step * batch_size, figures)
                progress.set_postfix(fvu=format_figures([values["fvu"] for values in figures.values()]), refresh=False)
            if is_checkpoint:
                checkpoint.save(folder / CHECKPOINTS, step, state_dict_of(learners), mesh)


def progress_bar(total: int, initial: int, mesh: Mesh) -> "tqdm[NoReturn]":
    """Return the progress bar, visible in the leader only."""
    return tqdm(total=total, initial=initial, unit="tok", unit_scale=True, desc="train", disable=not mesh.is_leader)


def format_figures(values: Sequence[float]) -> str:
    """Format up to three figures individually, more as a range, so that they fit into a terminal line."""
    if len(values) <= 3:
        return " ".join(f"{value:.4f}" for value in values)
    return f"{min(values):.4f}..{max(values):.4f}"


def require_finite(figures: Mapping[str, Mapping[str, float]], step: int) -> None:
    """Raise UserError if an SAE has diverged; it is called before the checkpoint, so that none holds such a state."""
    for name, values in figures.items():
        if not math.isfinite(values["loss"]):
            raise UserError(f"{name}: the loss is {values['loss']} at step {step}: try a lower learning_rate")


def step_learner(learner: Learner, vectors: Vectors, mesh: Mesh) -> Metrics:
    """Take one step of one SAE on this rank's part of a batch."""
    device = learner.trainer.tokens_since_fired.device
    part = {site: mesh.local_batch(x).to(device) for site, x in vectors.items()}
    return learner.trainer.step(data.sae_inputs(learner.spec, part), data.target(learner.spec, part))


class MeanMetrics:
    """Mean metrics over the steps since the last line of the record. Values stay on the device until `pop`, which
    synchronises.
    """

    def __init__(self) -> None:
        self._steps: list[Metrics] = []

    def add(self, metrics: Metrics) -> None:
        """Add the metrics of a step."""
        self._steps.append(metrics)

    def pop(self, mesh: Mesh) -> dict[str, float]:
        """Return the means over steps and batch parts, and the state at the last step; start over."""
        last, steps = self._steps[-1], self._steps
        self._steps = []
        density = density_figures(torch.stack([step.frequency for step in steps]).mean(0), mesh)
        means = torch.stack([torch.stack([getattr(step, name) for step in steps]).mean() for name in MEANS])
        names = [name for name in last.parts if name not in MEANS]
        values = torch.cat([means, *(last.parts[name].reshape(1).to(means) for name in names)])
        mesh.batch_all_reduce_mean_([values])
        figures = dict(zip([*MEANS, *names], values.tolist(), strict=True))
        return figures | density | {"dead_share": float(last.dead), "learning_rate": last.learning_rate}


def density_figures(frequency: Tensor, mesh: Mesh) -> dict[str, float]:
    """Return the number of dense and of frequent latents, and the shares of all activations that they carry, from the
    share of tokens on which each latent of this rank is active [F].
    """
    above = [frequency > fidelity.DENSE, frequency > fidelity.FREQUENT]
    sums = [frequency, *above, *(frequency.where(mask, 0.0) for mask in above)]
    total, dense, frequent, *carried = mesh.latent_all_reduce_sum(torch.stack([x.float().sum() for x in sums])).tolist()
    shares = [share / total if total else 0.0 for share in carried]
    return {
        "dense_latents": int(dense),
        "dense_share": shares[0],
        "frequent_latents": int(frequent),
        "frequent_share": shares[1],
    }


def state_dict_of(learners: Sequence[Learner]) -> dict[str, Any]:
    """Return the content of a checkpoint. The position in the stream is the step number, so trainers and random state
    are all.
    """
    return {
        "trainers": {learner.spec.name: learner.trainer.state_dict() for learner in learners},
        "random": torch.get_rng_state(),
    }


def resume(learners: Sequence[Learner], folder: Path, mesh: Mesh) -> int:
    """Restore SAEs from the last checkpoint; return the number of steps taken."""
    loaded = checkpoint.load(folder, mesh)
    if loaded is None:
        return 0
    step, state = loaded
    for learner in learners:
        learner.trainer.load_state_dict(state["trainers"][learner.spec.name])
    torch.set_rng_state(state["random"])
    return step


def canonical(learner: Learner, sample: Vectors) -> SAE:
    """Return the inference form, assembled from the shards of all ranks."""
    x, scale = data.sae_inputs(learner.spec, sample), learner.trainer.scale
    template = init_architecture(learner.spec, x.shape[-1]).to(x.device)
    architecture = shards.unshard(learner.trainer.architecture, template)
    return architecture.canonical(scale, x * scale)


def export_bundles(
    run_config: Config, learners: Sequence[Learner], saes: Sequence[SAE], inputs: TrainingInputs, folder: Path
) -> None:
    """Evaluate and export each SAE that has no bundle yet, then write the report."""
    for learner, sae in zip(learners, saes, strict=True):
        if not (folder / learner.spec.name).exists():
            export.evaluate_and_export(run_config, learner.spec, sae, inputs, folder)
    write_report(folder)


def write_report(folder: Path) -> None:
    """Write the report, or print which package it needs: a run does not fail for want of plots."""
    try:
        report.write(folder)
    except MissingPackage as error:
        print(f"{error}; then: rudder report {folder}", file=sys.stderr)
