"""What several published layouts have in common: where their files lie, pairs of linear layers, two more folds."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rudder.sae_models.formats import sites
from rudder.sae_models.formats.folding import scaled
from rudder.sae_models.formats.source import Declaration, FormatError
from rudder.sae_models.formats.tensors import finite, read_pickle, read_safetensors, safetensors_header, state, take
from rudder.sae_models.sae import SAE


class Weights(NamedTuple):
    """encoder [F, d], bias [F], decoder [F, d_out], decoder_bias [d_out], as they are stored."""

    encoder: Tensor
    bias: Tensor
    decoder: Tensor
    decoder_bias: Tensor


def matching(path: Path, pattern: str) -> list[Path]:
    """The path itself, or the files in that folder, with names like a pattern."""
    if path.is_file():
        return [path] if path.match(pattern) else []
    return sorted(path.glob(pattern))


def folder(path: Path) -> Path:
    """A checkpoint's folder: the path, or that in which a file lies; `checkpoints` is within it."""
    home = path.parent if path.is_file() else path
    return home.parent if home.name == "checkpoints" else home


def one(path: Path, pattern: str) -> Path:
    """The one file that `matching` finds. FormatError: none, or several."""
    files = matching(path, pattern)
    if len(files) != 1:
        names = ", ".join(file.name for file in files[:5])
        raise FormatError(f"{path.name}: {len(files)} files like {pattern}, name one{': ' + names if names else ''}")
    return files[0]


def keys(file: Path) -> frozenset[str]:
    """The names in a safetensors or torch file, none where it cannot be read: what is wrong, the reader will say."""
    try:
        if file.suffix == ".safetensors":
            return frozenset(safetensors_header(file)[0])
        return frozenset(state(read_pickle(file, verify=False), file.name))
    except FormatError:
        return frozenset()


def stored(file: Path) -> dict[str, Any]:
    """What a safetensors or torch file holds by name."""
    return read_safetensors(file) if file.suffix == ".safetensors" else state(read_pickle(file), file.name)


def linear(tensors: Mapping[str, Any], file: str, encoder: str = "encoder", decoder: str = "decoder") -> Weights:
    """The weights of two `torch.nn.Linear` of these names: encoder.weight [F, d], decoder.weight [d_out, F]."""
    bias = take(tensors, f"{encoder}.bias", file, (-1,))
    decoder_bias = take(tensors, f"{decoder}.bias", file, (-1,))
    into = take(tensors, f"{encoder}.weight", file, (len(bias), -1))
    out = take(tensors, f"{decoder}.weight", file, (len(decoder_bias), len(bias)))
    return Weights(into, bias, out.T, decoder_bias)


def own_part(found: Mapping[str, Any], key: str, file: str, layer: int, shape: tuple[int, int]) -> Tensor:
    """What latents write to one layer, `shape` [F, d], of their decoder [F, layers, d]; the others are not read."""
    decoder = found.get(key)
    if not isinstance(decoder, Tensor):
        return take(found, key, file)
    if decoder.dim() != 3 or not layer < decoder.shape[1]:
        raise FormatError(f"{file} {key}: shape {tuple(decoder.shape)}, which has no layer {layer}")
    return take({key: decoder[:, layer]}, key, file, shape)


def without_bias(found: Mapping[str, Any], decoder: str, dim: int, file: str) -> Tensor:
    """The decoder's bias [d_out], 0, of a checkpoint that has none; `dim` of the decoder is d_out."""
    return torch.zeros(take(found, decoder, file, (-1, -1)).shape[dim])


def declaration(architecture: str, hook: str, hook_out: str, model: str = "", **rest: Any) -> Declaration:
    """A declaration of an SAE that reads and writes at these hook points; a note says where one has no site."""
    (site, why), (output, why_out) = sites.canonical(hook, model), sites.canonical(hook_out, model)
    notes = {"hook": hook, "hook_out": hook_out, "site": why, "output_site": why_out} | rest.pop("notes", {})
    said = {key: note for key, note in notes.items() if note}
    return Declaration(architecture, (site,) if site else (), output, model, notes=said, **rest)


def positive(settings: Mapping[str, Any], key: str, file: str) -> float:
    """A setting that is a finite number above 0."""
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise FormatError(f"{file} {key}: {value!r} is not a positive number")
    return float(value)


def whole(sae: SAE, file: str, *, matrices: bool = True) -> SAE:
    """The same; FormatError where folding took a value beyond what float32 holds. `matrices`: whether they changed."""
    parts = {"bias": sae.bias, "threshold": sae.threshold, "decoder_bias": sae.decoder_bias}
    for name, part in (parts | ({"encoder": sae.encoder, "decoder": sae.decoder} if matrices else {})).items():
        if not finite(part):
            raise FormatError(f"{file}: the {name} has values that are not finite once the settings are folded in")
    return sae


def fold_scales(sae: SAE, into: float, out: float) -> SAE:
    """Of an SAE that reads into * x and whose output is to be divided by `out`: one of x. Activations stay."""
    decoder, decoder_bias = scaled(sae.decoder, 1 / out), sae.decoder_bias / out
    return replace(sae, encoder=scaled(sae.encoder, into), decoder=decoder, decoder_bias=decoder_bias)


def fold_norm_gate(sae: SAE) -> SAE:
    """Of an SAE whose thresholds are for z * ||decoder row||: one with thresholds for z.

    A latent without a decoder never passes.
    """
    norm, never = torch.linalg.vector_norm(sae.decoder, dim=1, dtype=torch.float32), torch.finfo(torch.float32).max
    return replace(sae, threshold=torch.where(norm > 0, sae.threshold / norm, never).clamp(max=never))
