"""Checkpoints that are folders with settings in cfg.json and weights in a safetensors file (SAELens, sparsify)."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from rudder.sae_models.formats.source import FormatError

CONFIG = "cfg.json"


def folder_of(path: Path, weights: str) -> Path:
    """Return the checkpoint's folder from its own path or the path of its weights."""
    return path.parent if path.name == weights else path


def recognise_folder(path: Path, weights: str) -> str | None:
    """Return the reason why a path holds such a checkpoint, or None."""
    folder = folder_of(path, weights)
    return f"{CONFIG} beside {weights}" if (folder / CONFIG).is_file() and (folder / weights).is_file() else None


def write_folder(path: Path, config: Mapping[str, Any], weights: str, tensors: Mapping[str, Tensor]) -> None:
    """Write a folder with settings and weights, atomically. FormatError: `path` exists."""
    if path.exists():
        raise FormatError(f"{path.name}: is there already")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        folder = Path(scratch) / path.name
        folder.mkdir()
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / weights)
        folder.rename(path)
