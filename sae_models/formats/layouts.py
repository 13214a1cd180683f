"""Shared parts of the readers: locating files, pairs of linear layers, declarations, thresholds on norms."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rudder.sae_models.formats import sites
from rudder.sae_models.formats.source import Declaration, FormatError
from rudder.sae_models.formats.tensors import (
    all_finite,
    read_pickle,
    read_safetensors,
    safetensors_header,
    state_dict,
    take,
)
from rudder.sae_models.sae import SAE


class Weights(NamedTuple):
    """encoder [F, d], bias [F], decoder [F, d_out], decoder_bias [d_out], in their stored dtypes."""

    encoder: Tensor
    bias: Tensor
    decoder: Tensor
    decoder_bias: Tensor


def matching_files(path: Path, pattern: str) -> list[Path]:
    """Return the files in a folder with names like a pattern, or the path itself if it is such a file."""
    if path.is_file():
        return [path] if path.match(pattern) else []
    return sorted(path.glob(pattern))


def checkpoint_folder(path: Path) -> Path:
    """Return the folder of a checkpoint from its own path or that of a file in it or in its `checkpoints`."""
    home = path.parent if path.is_file() else path
    return home.parent if home.name == "checkpoints" else home


def single_file(path: Path, pattern: str) -> Path:
    """Return the only file that matches a pattern. FormatError: none, or several."""
    files = matching_files(path, pattern)
    if len(files) != 1:
        names = ", ".join(file.name for file in files[:5])
        raise FormatError(f"{path.name}: {len(files)} files like {pattern}, name one{': ' + names if names else ''}")
    return files[0]


def tensor_names(file: Path) -> frozenset[str]:
    """Return the names in a safetensors or torch file; none if it cannot be read, which the reader then reports."""
    try:
        if file.suffix == ".safetensors":
            return frozenset(safetensors_header(file)[0])
        return frozenset(state_dict(read_pickle(file, verify=False), file.name))
    except FormatError:
        return frozenset()


def read_tensors(file: Path) -> dict[str, Any]:
    """Read the content of a safetensors or torch file by name."""
    return read_safetensors(file) if file.suffix == ".safetensors" else state_dict(read_pickle(file), file.name)


def linear_layers(tensors: Mapping[str, Any], file: str, encoder: str = "encoder", decoder: str = "decoder") -> Weights:
    """Return the weights of two `torch.nn.Linear`, encoder.weight [F, d] and decoder.weight [d_out, F], by name."""
    bias = take(tensors, f"{encoder}.bias", file, (-1,))
    decoder_bias = take(tensors, f"{decoder}.bias", file, (-1,))
    encoder_weight = take(tensors, f"{encoder}.weight", file, (len(bias), -1))
    decoder_weight = take(tensors, f"{decoder}.weight", file, (len(decoder_bias), len(bias)))
    return Weights(encoder_weight, bias, decoder_weight.T, decoder_bias)


def decoder_at_layer(tensors: Mapping[str, Any], key: str, file: str, layer: int, shape: tuple[int, int]) -> Tensor:
    """Return what latents write to one layer, `shape` [F, d], of a decoder [F, layers, d], without reading the rest."""
    decoder = tensors.get(key)
    if not isinstance(decoder, Tensor):
        return take(tensors, key, file)
    if decoder.dim() != 3 or not layer < decoder.shape[1]:
        raise FormatError(f"{file} {key}: shape {tuple(decoder.shape)}, which has no layer {layer}")
    return take({key: decoder[:, layer]}, key, file, shape)


def zero_bias(tensors: Mapping[str, Any], decoder: str, dim: int, file: str) -> Tensor:
    """Return a zero decoder bias [d_out] for a checkpoint without one; dimension `dim` of the decoder is d_out."""
    return torch.zeros(take(tensors, decoder, file, (-1, -1)).shape[dim])


def declaration(architecture: str, hook: str, hook_out: str, model: str = "", **rest: Any) -> Declaration:
    """Return the declaration of an SAE that reads and writes at these hook points; a note says why one has no site."""
    (site, why), (output, why_out) = sites.canonical(hook, model), sites.canonical(hook_out, model)
    notes = {"hook": hook, "hook_out": hook_out, "site": why, "output_site": why_out} | rest.pop("notes", {})
    notes = {key: note for key, note in notes.items() if note}
    return Declaration(architecture, (site,) if site else (), output, model, notes=notes, **rest)


def positive_number(settings: Mapping[str, Any], key: str, file: str) -> float:
    """Return a setting that must be a finite number above 0."""
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise FormatError(f"{file} {key}: {value!r} is not a positive number")
    return float(value)


def check_finite(sae: SAE, file: str, *, matrices: bool = True) -> SAE:
    """Return the SAE. FormatError: folding made a value overflow float32. `matrices`: whether to check them too."""
    parts = {"bias": sae.bias, "threshold": sae.threshold, "decoder_bias": sae.decoder_bias}
    for name, part in (parts | ({"encoder": sae.encoder, "decoder": sae.decoder} if matrices else {})).items():
        if not all_finite(part):
            raise FormatError(f"{file}: the {name} has values that are not finite once the settings are folded in")
    return sae


def fold_norm_gate(sae: SAE) -> SAE:
    """Convert an SAE whose thresholds apply to z * ||decoder row|| to one whose thresholds apply to z.

    A latent with a zero decoder row is never active.
    """
    norm, never = torch.linalg.vector_norm(sae.decoder, dim=1, dtype=torch.float32), torch.finfo(torch.float32).max
    return replace(sae, threshold=torch.where(norm > 0, sae.threshold / norm, never).clamp(max=never))
