"""Checkpoints of a run: one file per shard of the latents, and latest.json, which names the last complete step."""

from pathlib import Path
from typing import Any

import msgspec
import torch

from rudder.sae_models.errors import UserError
from rudder.sae_models.files import PARTIAL, write_atomically
from rudder.sae_models.sparse.collectives import Mesh

LATEST = "latest.json"


class CheckpointError(UserError):
    """A checkpoint cannot be read or written. The message names the file."""


class LatestCheckpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Content of latest.json."""

    step: int
    latent_parts: int


def save(folder: Path, step: int, state: dict[str, Any], mesh: Mesh) -> None:
    """Write the state of a step, record the step as latest, then remove older checkpoints.

    Raise CheckpointError if the state cannot be written; the previous checkpoint is then intact.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if mesh.batch_part == 0:
        _write(folder / _file_name(step, mesh.latent_part), state)
    # latest.json may name a step only once every shard of it is on disk.
    mesh.barrier()
    if mesh.is_leader:
        write_atomically(folder / LATEST, msgspec.json.encode(LatestCheckpoint(step, mesh.latent_parts)))
        for old in folder.iterdir():
            if old.name != LATEST and not old.name.startswith(f"{step:09}."):
                old.unlink()


def load(folder: Path, mesh: Mesh) -> tuple[int, dict[str, Any]] | None:
    """Return the last complete step and its state, or None if there is no checkpoint. Raise CheckpointError if it is
    damaged or has a different number of shards.
    """
    if not (folder / LATEST).exists():
        return None
    try:
        latest = msgspec.json.decode((folder / LATEST).read_bytes(), type=LatestCheckpoint)
        path = folder / _file_name(latest.step, mesh.latent_part)
        state = torch.load(path, map_location="cpu", weights_only=True)
    # torch.load documents no exception type for damaged files.
    except Exception as error:
        raise CheckpointError(f"checkpoint: {folder}: {error}") from error
    if latest.latent_parts != mesh.latent_parts:
        raise CheckpointError(f"checkpoint: {folder}: of {latest.latent_parts} latent_ranks, not {mesh.latent_parts}")
    return latest.step, state


def _file_name(step: int, latent_part: int) -> str:
    return f"{step:09}.{latent_part}.pt"


def _write(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        # torch.save raises a RuntimeError of its own; the OSError with the cause is its context.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise CheckpointError(f"checkpoint: {path}: {cause}; the one before it is whole") from error
