"""OpenMOSS Llamascopium (Language-Model-SAEs) 1.x and 2.x, and Llama Scope R1: `config.json`, `sae_weights.*`.

    h = x * scale_in      z = h . W_E + b_E      f = z where z * ||W_D row|| passes      y = (f . W_D + b_D) / scale_out

`passes` is a ReLU, a JumpReLU or a TopK; without `sparsity_include_decoder_norm` it looks at z. `norm_activation` says
what the scale is: sqrt(d) / mean norm of the dataset, sqrt(d) / ||x||, or 1. Where a TopK looks at z * ||W_D row||,
latents are read in those units: the library's f is f / ||W_D row||.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from sae_models.formats.layouts import (
    Weights,
    count,
    gated,
    input_scaled,
    linear,
    norms,
    pre_biased,
    rescaled,
    setting,
    site,
    sites,
    stored,
)
from sae_models.formats.source import Declaration, Format, FormatError
from sae_models.formats.tensors import assembled, only, read_json, state, take
from sae_models.sae import SAE, Normalisation, TopK

SETTINGS = "config.json"
# In the order in which the library looks.
CHECKPOINTS = tuple(
    f"{name}.{suffix}"
    for name in ("sae_weights", "checkpoints/pruned", "checkpoints/final")
    for suffix in ("safetensors", "pt", "dcp")
)
AVERAGE = "dataset_average_activation_norm."
THRESHOLDS = ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold")
NEWER = frozenset({"W_E", "b_E", "W_D", "b_D"})
OLDER = frozenset({"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"})


def recognise(path: Path) -> str | None:
    """Settings with `norm_activation` beside a checkpoint."""
    checkpoint = found_checkpoint(path)
    if checkpoint is None or not (path / SETTINGS).is_file():
        return None
    said = settings_or_none(path)
    wanted = {"norm_activation", "expansion_factor"}
    return f"{SETTINGS} with norm_activation, and {checkpoint.name}" if said and wanted <= said.keys() else None


def found_checkpoint(path: Path) -> Path | None:
    """The weights that the library would take."""
    return next((path / name for name in CHECKPOINTS if (path / name).exists()), None)


def settings_or_none(path: Path) -> dict[str, Any] | None:
    """The settings, where they can be read."""
    try:
        return read_json(path / SETTINGS)
    except FormatError:
        return None


def read(path: Path) -> tuple[SAE, Declaration]:
    """The SAE or transcoder in a folder."""
    said = read_json(path / SETTINGS)
    check(said)
    checkpoint = found_checkpoint(path)
    if checkpoint is None or checkpoint.suffix == ".dcp":
        raise FormatError(f"{path.name}: no sae_weights.safetensors; a .dcp folder is to be saved again as safetensors")
    found = stored(checkpoint)
    found = state(found["sae"], checkpoint.name) if "sae" in found else found
    hooks = setting(said, "hook_point_in", str, SETTINGS), setting(said, "hook_point_out", str, SETTINGS)
    only(found, NEWER | OLDER | {*THRESHOLDS} | {AVERAGE + hook for hook in hooks}, checkpoint.name)
    weights = parameters(found, said, checkpoint.name)
    weights, threshold, folded = activated(weights, found, said, checkpoint.name)
    if said["norm_activation"] == "dataset-wise":
        into, out = (average(found, hook, weights, checkpoint.name) for hook in hooks)
        weights, folded = input_scaled(weights, into, out), (*folded, "input_scale")
    by_token = said["norm_activation"] == "token-wise"
    selection = TopK(count(said, "top_k", len(weights.bias), SETTINGS)) if said["act_fn"] == "topk" else None
    normalisation = Normalisation.CONSTANT_NORM if by_token else Normalisation.NONE
    sae = assembled(*weights, threshold, selection=selection, normalisation=normalisation)
    notes = {"hook": hooks[0], "hook_out": hooks[1]}
    return sae, Declaration(str(said["act_fn"]), sites(hooks[0]), site(hooks[1]), "", folded, None, notes)


def check(said: Mapping[str, Any]) -> None:
    """FormatError of what is not an SAE of tokens, by its name."""
    if said.get("sae_type", "sae") != "sae":
        refuse("sae_type", f"{said['sae_type']!r} reads or writes more than one site")
    if said.get("use_glu_encoder"):
        refuse("use_glu_encoder", "a gated encoder is not linear, it cannot be served")
    if said.get("act_fn") not in ("relu", "jumprelu", "topk"):
        refuse("act_fn", f"{said.get('act_fn')!r}: a latent depends on the other tokens; convert it to a JumpReLU")
    if said.get("norm_activation") not in ("inference", "dataset-wise", "token-wise"):
        refuse("norm_activation", f"{said.get('norm_activation')!r}: the scale depends on the other tokens")
    if said["norm_activation"] == "token-wise" and said.get("hook_point_in") != said.get("hook_point_out"):
        refuse("norm_activation", "token-wise: the scale of a transcoder's output is that of the output it predicts")


def refuse(field: str, why: str) -> NoReturn:
    """A FormatError of the settings."""
    raise FormatError(f"{SETTINGS} {field}: {why}")


def parameters(found: Mapping[str, Any], said: Mapping[str, Any], file: str) -> Weights:
    """Weights by the names of 2.x, W_E [d, F] and W_D [F, d], or of 1.x, two linear layers."""
    older = "encoder.weight" in found
    width = setting(said, "d_model", int, SETTINGS)
    decoder_bias = "decoder.bias" if older else "b_D"
    if said.get("use_decoder_bias") is False and decoder_bias not in found:
        found = {**found, decoder_bias: torch.zeros(width)}
    if older:
        weights = linear(found, file)
    else:
        bias, out = take(found, "b_E", file, (-1,)), take(found, "b_D", file, (-1,))
        encoder, decoder = take(found, "W_E", file, (-1, len(bias))), take(found, "W_D", file, (len(bias), len(out)))
        weights = Weights(encoder.T, bias, decoder, out)
    if weights.encoder.shape[1] != width:
        raise FormatError(f"{SETTINGS} d_model: {width}, the encoder reads {weights.encoder.shape[1]}")
    if said.get("apply_decoder_bias_to_pre_encoder"):
        weights = weights._replace(bias=pre_biased(weights.bias, weights.encoder, weights.decoder_bias))
    return weights


def activated(
    weights: Weights, found: Mapping[str, Any], said: Mapping[str, Any], file: str
) -> tuple[Weights, Tensor | float, tuple[str, ...]]:
    """(weights, threshold on z, what was folded) once the decoder norm is out of the activation's way."""
    folded: tuple[str, ...] = ("pre_bias",) if said.get("apply_decoder_bias_to_pre_encoder") else ()
    by_norm = setting(said, "sparsity_include_decoder_norm", bool, SETTINGS, True) and said["act_fn"] != "relu"
    folded += ("decoder_norm",) if by_norm else ()
    threshold: Tensor | float = 0.0
    if said["act_fn"] == "jumprelu":
        named = next((key for key in THRESHOLDS if key in found), THRESHOLDS[0])
        threshold = take(found, named, file, (len(weights.bias),)).float().exp()
    if not by_norm:
        return weights, threshold, folded
    norm = norms(weights.decoder)
    if isinstance(threshold, Tensor):
        return weights, gated(threshold, norm), folded
    return rescaled(weights, norm), 0.0, folded


def average(found: Mapping[str, Any], hook: str, weights: Weights, file: str) -> float:
    """sqrt(d) over the dataset's mean norm at a hook point."""
    norm = float(take(found, AVERAGE + hook, file, ()))
    if norm <= 0:
        raise FormatError(f"{file} {AVERAGE}{hook}: {norm} is not a norm")
    return math.sqrt(weights.encoder.shape[1]) / norm


FORMAT = Format("llamascopium", recognise, read)
