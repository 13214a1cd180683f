"""Reading tensors and settings from files that are not trusted."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_models.formats.source import FormatError


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, memory-mapped."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path.name}: {error}") from error


def read_pickle(path: Path) -> Any:
    """What a torch file holds, by weights-only unpickling."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FormatError(f"{path.name}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{path.name}: {error}") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path.name}: is not an object")
    return found
