"""What a run needs to go on exactly: a file for each part of the latents, and a note of the last whole step."""

from pathlib import Path
from typing import Any

import msgspec
import torch

from rudder.sae_models.errors import UserError
from rudder.sae_models.files import PARTIAL, write_whole
from rudder.sae_models.sparse.collectives import Mesh

LATEST = "latest.json"


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written; the message names the file."""


class Note(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of latest.json."""

    step: int
    latent_parts: int


def save(folder: Path, step: int, state: dict[str, Any], mesh: Mesh) -> None:
    """Writes a step's state, makes it the latest, then removes the older.

    CheckpointError: it could not be written; the one before is whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if mesh.batch_part == 0:
        _write(folder / _name(step, mesh.latent_part), state)
    mesh.barrier()
    if mesh.leads:
        write_whole(folder / LATEST, msgspec.json.encode(Note(step, mesh.latent_parts)))
        for old in folder.iterdir():
            if old.name != LATEST and not old.name.startswith(f"{step:09}."):
                old.unlink()


def load(folder: Path, mesh: Mesh) -> tuple[int, dict[str, Any]] | None:
    """The last whole step and its state; None: there is none. CheckpointError: it is damaged or does not fit."""
    if not (folder / LATEST).exists():
        return None
    try:
        note = msgspec.json.decode((folder / LATEST).read_bytes(), type=Note)
        path = folder / _name(note.step, mesh.latent_part)
        state = torch.load(path, map_location="cpu", weights_only=True)
    # torch raises whatever its reader meets in a damaged file.
    except Exception as error:
        raise CheckpointError(f"checkpoint: {folder}: {error}") from error
    if note.latent_parts != mesh.latent_parts:
        raise CheckpointError(f"checkpoint: {folder}: of {note.latent_parts} latent_ranks, not {mesh.latent_parts}")
    return note.step, state


def _name(step: int, latent_part: int) -> str:
    return f"{step:09}.{latent_part}.pt"


def _write(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        # torch hides what the operating system said behind an error of its own.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise CheckpointError(f"checkpoint: {path}: {cause}; the one before it is whole") from error
