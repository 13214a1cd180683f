"""What a run needs to go on exactly: one file for each part of the latents, and a note of the last whole step."""

import json
from pathlib import Path
from typing import Any

import torch

from sae_models.training.distributed import Mesh
from sae_models.training.files import PARTIAL, write_whole

LATEST = "latest.json"


class CheckpointError(Exception):
    """A checkpoint that cannot be read or written; the message names the file."""


def save(folder: Path, step: int, state: dict[str, Any], mesh: Mesh) -> None:
    """Writes a step's state beside the one before, makes it the latest, then removes the older.

    CheckpointError: it could not be written; the one before is whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if mesh.batch_part == 0:
            path = folder / _name(step, mesh.latent_part)
            with write_stream(path) as file:
                torch.save(state, file)
        mesh.barrier()
        if mesh.leads:
            note = {"step": step, "latent_parts": mesh.latent_parts}
            write_whole(folder / LATEST, json.dumps(note).encode())
            for old in folder.glob("*.pt*"):
                if not old.name.startswith(f"{step:09}."):
                    old.unlink()
    # torch tells of a disk that is full by a RuntimeError of its own writer.
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint: {folder}: {error}; the one before it is whole") from error


def _name(step: int, latent_part: int) -> str:
    return f"{step:09}.{latent_part}.pt"
