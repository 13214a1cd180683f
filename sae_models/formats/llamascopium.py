"""OpenMOSS Llamascopium (Language-Model-SAEs) 1.x and 2.x, and Llama Scope R1: `config.json`, `sae_weights.*`, and
`lm_config.json`, which names the model.

    h = x * scale_in      z = h . W_E + b_E      f = z where z * ||W_D row|| passes      y = (f . W_D + b_D) / scale_out

`passes` is a ReLU, a JumpReLU or a TopK; without `sparsity_include_decoder_norm` it looks at z. `norm_activation` says
what the scale is: sqrt(d) / mean norm of the dataset, sqrt(d) / ||x||, or 1. Where a TopK looks at z * ||W_D row||,
latents are read in those units: the library's f is f / ||W_D row||.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from rudder.sae_models.formats.folding import fold_decoder_norm, fold_pre_bias
from rudder.sae_models.formats.layouts import (
    Weights,
    declaration,
    fold_norm_gate,
    fold_scales,
    folder,
    linear,
    stored,
    whole,
    without_bias,
)
from rudder.sae_models.formats.settings import count, flag, word
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assembled, only, read_json, state, take
from rudder.sae_models.sae import SAE, Normalisation, TopK

SETTINGS, MODEL = "config.json", "lm_config.json"
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
    home = folder(path)
    checkpoint = found_checkpoint(home)
    if checkpoint is None or not (home / SETTINGS).is_file():
        return None
    said = settings_or_none(home)
    wanted = {"norm_activation", "expansion_factor"}
    return f"{SETTINGS} with norm_activation, and {checkpoint.name}" if said and wanted <= said.keys() else None


def found_checkpoint(home: Path) -> Path | None:
    """The weights that the library would take."""
    return next((home / name for name in CHECKPOINTS if (home / name).exists()), None)


def settings_or_none(home: Path) -> dict[str, Any] | None:
    """The settings, where they can be read."""
    try:
        return read_json(home / SETTINGS)
    except FormatError:
        return None


def read(path: Path) -> tuple[SAE, Declaration]:
    """The SAE or transcoder in a folder."""
    home = folder(path)
    said = read_json(home / SETTINGS)
    check(said)
    checkpoint = found_checkpoint(home)
    if checkpoint is None or checkpoint.suffix == ".dcp":
        raise FormatError(f"{home.name}: no sae_weights.safetensors; a .dcp folder is to be saved again as safetensors")
    found = stored(checkpoint)
    found = state(found["sae"], checkpoint.name) if "sae" in found else found
    hooks = word(said, "hook_point_in"), word(said, "hook_point_out")
    only(found, NEWER | OLDER | {*THRESHOLDS} | {AVERAGE + hook for hook in hooks}, checkpoint.name)
    sae = assembled(*parameters(found, said, checkpoint.name))
    folded = []
    if flag(said, "apply_decoder_bias_to_pre_encoder", SETTINGS, False):
        sae = fold_pre_bias(sae, sae.decoder_bias)
        folded.append("pre_bias")
    sae = activated(sae, found, said, checkpoint.name)
    if flag(said, "sparsity_include_decoder_norm", SETTINGS, True) and said["act_fn"] != "relu":
        sae = fold_norm_gate(sae) if said["act_fn"] == "jumprelu" else fold_decoder_norm(sae)
        folded.append("decoder_norm")
    if said["norm_activation"] == "dataset-wise":
        sae = fold_scales(sae, *(scale(found, hook, sae.width, checkpoint.name) for hook in hooks))
        folded.append("input_scale")
    model = word(read_json(home / MODEL), "model_name") if (home / MODEL).is_file() else ""
    notes = {"normalize_activations": said["norm_activation"]}
    said_of = declaration(str(said["act_fn"]), *hooks, model, folded=tuple(folded), notes=notes)
    return whole(sae, checkpoint.name), said_of


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
    width = count(said, "d_model", SETTINGS)
    if not flag(said, "use_decoder_bias", SETTINGS, True):
        absent, beside, dim = ("decoder.bias", "decoder.weight", 0) if older else ("b_D", "W_D", 1)
        found = {**found, absent: without_bias(found, beside, dim, file)}
    if older:
        weights = linear(found, file)
    else:
        bias, out = take(found, "b_E", file, (-1,)), take(found, "b_D", file, (-1,))
        encoder, decoder = take(found, "W_E", file, (-1, len(bias))), take(found, "W_D", file, (len(bias), len(out)))
        weights = Weights(encoder.T, bias, decoder, out)
    if weights.encoder.shape[1] != width:
        raise FormatError(f"{SETTINGS} d_model: {width}, the encoder reads {weights.encoder.shape[1]}")
    return weights


def activated(sae: SAE, found: Mapping[str, Any], said: Mapping[str, Any], file: str) -> SAE:
    """With the activation and the normalisation that the settings name."""
    by_token = said["norm_activation"] == "token-wise"
    sae = replace(sae, normalisation=Normalisation.CONSTANT_NORM if by_token else Normalisation.NONE)
    if said["act_fn"] == "topk":
        return replace(sae, selection=TopK(count(said, "top_k", SETTINGS, sae.latents)))
    if said["act_fn"] == "relu":
        return sae
    named = next((key for key in THRESHOLDS if key in found), THRESHOLDS[0])
    return replace(sae, threshold=take(found, named, file, (sae.latents,)).float().exp())


def scale(found: Mapping[str, Any], hook: str, width: int, file: str) -> float:
    """sqrt(d) over the dataset's mean norm at a hook point."""
    norm = float(take(found, AVERAGE + hook, file, ()))
    if norm <= 0:
        raise FormatError(f"{file} {AVERAGE}{hook}: {norm} is not a norm")
    return math.sqrt(width) / norm


FORMAT = Format("llamascopium", recognise, read)
