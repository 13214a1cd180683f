"""Gemma Scope 2, JumpReLU SAEs and transcoders of Gemma 3: `config.json` and `params.safetensors`.

    z = x . w_enc + b_enc      f = z where z > threshold      y = f . w_dec + b_dec + x . affine_skip_connection

Without a `config.json`, the folder's name declares the site: `{site}[_all]/layer_{L}_width_{W}_l0_{size}[_affine]`.
A file of a cross-layer transcoder, `clt/.../layer_{L}....safetensors` with w_dec [F, layers, d], is read as a partial
SAE (sae_models.sae) of that layer. Libraries disagree whether it reads the MLP's input or the residual before the norm,
so without settings it has no site. A crosscoder, which reads many layers, is refused.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rudder.sae_models.formats import layouts
from rudder.sae_models.formats.layouts import Weights, decoder_at_layer, matching_files, single_file, tensor_names
from rudder.sae_models.formats.settings import flag, name_of
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assemble, read_json, read_safetensors, refuse_unknown, take
from rudder.sae_models.sae import SAE

KEYS = frozenset({"w_enc", "b_enc", "w_dec", "b_dec", "threshold"})
SKIP = "affine_skip_connection"
# Folder -> (module read, module written).
FOLDERS = {
    "resid_post": ("output", "output"),
    "mlp_out": ("post_feedforward_layernorm.output",) * 2,
    "attn_out": ("self_attn.o_proj.input",) * 2,
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
}


def recognise(path: Path) -> str | None:
    """Recognise a safetensors file by the lower-case names of its weights."""
    files = matching_files(path, "params.safetensors") or matching_files(path, "*layer_*.safetensors")
    return f"{files[0].name} with w_enc and threshold" if files and tensor_names(files[0]) >= KEYS else None


def read(path: Path) -> tuple[SAE, Declaration]:
    """Read the SAE or transcoder in a folder with `params.safetensors`, or in that file."""
    file = single_file(path, "*.safetensors")
    tensors = read_safetensors(file)
    refuse_unknown(tensors, KEYS | {SKIP}, file.name)
    cross_layer = tensors["w_dec"].dim() == 3 if "w_dec" in tensors else False
    weights, threshold = parameters(tensors, file, cross_layer)
    shape = (weights.encoder.shape[1], len(weights.decoder_bias))
    skip = take(tensors, SKIP, file.name, shape) if SKIP in tensors else None
    declaration = declared(file)
    if declaration.notes.get("affine") and skip is None:
        raise FormatError(f"{file.name} {SKIP}: missing, the settings say that there is one")
    return assemble(*weights, threshold, skip=skip, partial=cross_layer), declaration


def parameters(tensors: Mapping[str, Tensor], path: Path, cross_layer: bool) -> tuple[Weights, Tensor]:
    """Return weights and thresholds [F]; w_enc is stored as [d, F]. `cross_layer`: w_dec is [F, layers, d]."""
    file, layer = path.name, re.search(r"layer_(\d+)", path.stem)
    if "w_enc" in tensors and tensors["w_enc"].dim() > 2:
        raise FormatError(f"{file} w_enc: a crosscoder, its latents read many layers")
    if cross_layer and layer is None:
        raise FormatError(f"{file} w_dec: of a cross-layer transcoder, and the file's name has no layer_{{L}}")
    bias, decoder_bias = take(tensors, "b_enc", file, (-1,)), take(tensors, "b_dec", file, (-1,))
    encoder, shape = take(tensors, "w_enc", file, (-1, len(bias))), (len(bias), len(decoder_bias))
    if cross_layer and layer:
        decoder = decoder_at_layer(tensors, "w_dec", file, int(layer[1]), shape)
    else:
        decoder = take(tensors, "w_dec", file, shape)
    return Weights(encoder.T, bias, decoder, decoder_bias), take(tensors, "threshold", file, (len(bias),))


def declared(file: Path) -> Declaration:
    """Return the declaration in `config.json`, or without one in the path."""
    config = file.with_name("config.json")
    settings = read_json(config) if config.is_file() else infer_settings(file.absolute().as_posix())
    if settings.get("architecture") != "jump_relu":
        raise FormatError(f"config.json architecture: {settings.get('architecture')!r}, not jump_relu")
    hook, l0 = name_of(settings, "hf_hook_point_in"), settings.get("l0")
    return layouts.declaration(
        "jump_relu",
        hook,
        name_of(settings, "hf_hook_point_out") or hook,
        name_of(settings, "model_name"),
        l0=float(l0) if isinstance(l0, int | float) else None,
        notes={"affine": flag(settings, "affine_connection", "config.json", False)},
    )


def infer_settings(where: str) -> dict[str, Any]:
    """Return the settings that the repository's and folder's names imply."""
    model = re.search(r"gemma-scope-2-(\w+-(?:pt|it))", where)
    folder = re.search(r"/(resid_post|mlp_out|attn_out|transcoder)(?:_all)?/layer_(\d+)_\w+/", where)
    name = f"google/gemma-3-{model[1]}" if model else ""
    affine = bool(re.search(r"/clt/[^/]*_affine/", where))
    settings: dict[str, Any] = {"architecture": "jump_relu", "model_name": name, "affine_connection": affine}
    if folder:
        read_at, written_at = (f"model.layers.{int(folder[2])}.{module}" for module in FOLDERS[folder[1]])
        settings |= {"hf_hook_point_in": read_at, "hf_hook_point_out": written_at}
        settings["affine_connection"] = folder[0].endswith("_affine/")
    return settings


FORMAT = Format("gemma_scope_2", recognise, read)
