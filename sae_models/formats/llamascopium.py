"""OpenMOSS Llamascopium (Language-Model-SAEs) 1.x and 2.x, and Llama Scope R1: `config.json`, `sae_weights.*`, and
`lm_config.json`, which names the model.

    h = x * scale_in      z = h . W_E + b_E      f = z where z * ||W_D row|| passes      y = (f . W_D + b_D) / scale_out

`passes` is a ReLU, a JumpReLU or a TopK; without `sparsity_include_decoder_norm` it compares z. `norm_activation`
determines the scale: sqrt(d) / mean norm of the dataset, sqrt(d) / ||x||, or 1. Where a TopK compares z * ||W_D row||,
activations here are in those units: the library's f is f / ||W_D row||.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from rudder.sae_models.formats.folding import fold_decoder_norm, fold_pre_bias, fold_scales
from rudder.sae_models.formats.layouts import (
    Weights,
    check_finite,
    checkpoint_folder,
    declaration,
    fold_norm_gate,
    linear_layers,
    read_tensors,
    zero_bias,
)
from rudder.sae_models.formats.settings import count, flag, name_of
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assemble, read_json, refuse_unknown, state_dict, take
from rudder.sae_models.sae import SAE, Normalisation, TopK

SETTINGS, MODEL = "config.json", "lm_config.json"
# In the order in which the library searches.
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
    """Recognise settings with `norm_activation` beside a checkpoint."""
    home = checkpoint_folder(path)
    checkpoint = find_checkpoint(home)
    if checkpoint is None or not (home / SETTINGS).is_file():
        return None
    settings = settings_or_none(home)
    wanted = {"norm_activation", "expansion_factor"}
    return f"{SETTINGS} with norm_activation, and {checkpoint.name}" if settings and wanted <= settings.keys() else None


def find_checkpoint(home: Path) -> Path | None:
    """Return the file of weights that the library would load."""
    return next((home / name for name in CHECKPOINTS if (home / name).exists()), None)


def settings_or_none(home: Path) -> dict[str, Any] | None:
    """Return the settings if they can be read."""
    try:
        return read_json(home / SETTINGS)
    except FormatError:
        return None


def read(path: Path) -> tuple[SAE, Declaration]:
    """Read the SAE or transcoder in a folder."""
    home = checkpoint_folder(path)
    settings = read_json(home / SETTINGS)
    check(settings)
    checkpoint = find_checkpoint(home)
    if checkpoint is None or checkpoint.suffix == ".dcp":
        raise FormatError(f"{home.name}: no sae_weights.safetensors; a .dcp folder is to be saved again as safetensors")
    tensors = read_tensors(checkpoint)
    tensors = state_dict(tensors["sae"], checkpoint.name) if "sae" in tensors else tensors
    hooks = name_of(settings, "hook_point_in"), name_of(settings, "hook_point_out")
    refuse_unknown(tensors, NEWER | OLDER | {*THRESHOLDS} | {AVERAGE + hook for hook in hooks}, checkpoint.name)
    sae = assemble(*parameters(tensors, settings, checkpoint.name))
    folded = []
    if flag(settings, "apply_decoder_bias_to_pre_encoder", SETTINGS, False):
        sae = fold_pre_bias(sae, sae.decoder_bias)
        folded.append("pre_bias")
    sae = with_activation(sae, tensors, settings, checkpoint.name)
    if flag(settings, "sparsity_include_decoder_norm", SETTINGS, True) and settings["act_fn"] != "relu":
        sae = fold_norm_gate(sae) if settings["act_fn"] == "jumprelu" else fold_decoder_norm(sae)
        folded.append("decoder_norm")
    if settings["norm_activation"] == "dataset-wise":
        sae = fold_scales(sae, *(scale(tensors, hook, sae.width, checkpoint.name) for hook in hooks))
        folded.append("input_scale")
    model = name_of(read_json(home / MODEL), "model_name") if (home / MODEL).is_file() else ""
    notes = {"normalize_activations": settings["norm_activation"]}
    declared = declaration(str(settings["act_fn"]), *hooks, model, folded=tuple(folded), notes=notes)
    return check_finite(sae, checkpoint.name), declared


def check(settings: Mapping[str, Any]) -> None:
    """Raise FormatError, by the setting, for what is not an SAE of single tokens."""
    if settings.get("sae_type", "sae") != "sae":
        refuse("sae_type", f"{settings['sae_type']!r} reads or writes more than one site")
    if settings.get("use_glu_encoder"):
        refuse("use_glu_encoder", "a gated encoder is not linear, it cannot be served")
    if settings.get("act_fn") not in ("relu", "jumprelu", "topk"):
        refuse("act_fn", f"{settings.get('act_fn')!r}: a latent depends on the other tokens; convert it to a JumpReLU")
    if settings.get("norm_activation") not in ("inference", "dataset-wise", "token-wise"):
        refuse("norm_activation", f"{settings.get('norm_activation')!r}: the scale depends on the other tokens")
    if settings["norm_activation"] == "token-wise" and settings.get("hook_point_in") != settings.get("hook_point_out"):
        refuse("norm_activation", "token-wise: the scale of a transcoder's output is that of the output it predicts")


def refuse(field: str, why: str) -> NoReturn:
    """Raise FormatError for a setting."""
    raise FormatError(f"{SETTINGS} {field}: {why}")


def parameters(tensors: Mapping[str, Any], settings: Mapping[str, Any], file: str) -> Weights:
    """Return the weights by the names of 2.x, W_E [d, F] and W_D [F, d], or of 1.x, two linear layers."""
    older = "encoder.weight" in tensors
    width = count(settings, "d_model", SETTINGS)
    if not flag(settings, "use_decoder_bias", SETTINGS, True):
        missing, decoder_key, dim = ("decoder.bias", "decoder.weight", 0) if older else ("b_D", "W_D", 1)
        tensors = {**tensors, missing: zero_bias(tensors, decoder_key, dim, file)}
    if older:
        weights = linear_layers(tensors, file)
    else:
        bias, out = take(tensors, "b_E", file, (-1,)), take(tensors, "b_D", file, (-1,))
        encoder, decoder = (
            take(tensors, "W_E", file, (-1, len(bias))),
            take(tensors, "W_D", file, (len(bias), len(out))),
        )
        weights = Weights(encoder.T, bias, decoder, out)
    if weights.encoder.shape[1] != width:
        raise FormatError(f"{SETTINGS} d_model: {width}, the encoder reads {weights.encoder.shape[1]}")
    return weights


def with_activation(sae: SAE, tensors: Mapping[str, Any], settings: Mapping[str, Any], file: str) -> SAE:
    """Return the SAE with the activation and the normalisation of the settings."""
    by_token = settings["norm_activation"] == "token-wise"
    sae = replace(sae, normalisation=Normalisation.CONSTANT_NORM if by_token else Normalisation.NONE)
    if settings["act_fn"] == "topk":
        return replace(sae, selection=TopK(count(settings, "top_k", SETTINGS, sae.latents)))
    if settings["act_fn"] == "relu":
        return sae
    named = next((key for key in THRESHOLDS if key in tensors), THRESHOLDS[0])
    return replace(sae, threshold=take(tensors, named, file, (sae.latents,)).float().exp())


def scale(tensors: Mapping[str, Any], hook: str, width: int, file: str) -> float:
    """Return sqrt(d) over the dataset's mean norm at a hook point."""
    norm = float(take(tensors, AVERAGE + hook, file, ()))
    if norm <= 0:
        raise FormatError(f"{file} {AVERAGE}{hook}: {norm} is not a norm")
    return math.sqrt(width) / norm


FORMAT = Format("llamascopium", recognise, read)
