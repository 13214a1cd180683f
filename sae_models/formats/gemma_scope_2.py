"""Gemma Scope 2, the JumpReLU SAEs and transcoders of Gemma 3: `config.json` and `params.safetensors`.

    z = x . w_enc + b_enc      f = z where z > threshold      y = f . w_dec + b_dec + x . affine_skip_connection

Without a `config.json`, the folder's name tells the site: `{site}[_all]/layer_{L}_width_{W}_l0_{size}[_affine]`.
Of a cross-layer transcoder, `clt/.../layer_{L}....safetensors` with w_dec [F, layers, d], one layer is read, partial
(sae_models.sae). Whether it reads the MLP's input or the residual before the norm, libraries disagree: without settings
it has no site. A crosscoder, which reads many layers, is refused.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rudder.sae_models.formats.layouts import Weights, declaration, keys, matching, one, own_part
from rudder.sae_models.formats.settings import flag, word
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assembled, only, read_json, read_safetensors, take
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
    """Lower-case names of weights in a safetensors file."""
    files = matching(path, "params.safetensors") or matching(path, "*layer_*.safetensors")
    return f"{files[0].name} with w_enc and threshold" if files and keys(files[0]) >= KEYS else None


def read(path: Path) -> tuple[SAE, Declaration]:
    """The SAE or transcoder in a folder with `params.safetensors`, or that file."""
    file = one(path, "*.safetensors")
    found = read_safetensors(file)
    only(found, KEYS | {SKIP}, file.name)
    across = found["w_dec"].dim() == 3 if "w_dec" in found else False
    weights, threshold = parameters(found, file, across)
    shape = (weights.encoder.shape[1], len(weights.decoder_bias))
    skip = take(found, SKIP, file.name, shape) if SKIP in found else None
    said = declared(file)
    if said.notes.get("affine") and skip is None:
        raise FormatError(f"{file.name} {SKIP}: missing, the settings say that there is one")
    return assembled(*weights, threshold, skip=skip, partial=across), said


def parameters(found: Mapping[str, Tensor], path: Path, across: bool) -> tuple[Weights, Tensor]:
    """Weights and threshold [F]; w_enc is stored as [d, F]. `across`: w_dec is [F, layers, d]."""
    file, layer = path.name, re.search(r"layer_(\d+)", path.stem)
    if "w_enc" in found and found["w_enc"].dim() > 2:
        raise FormatError(f"{file} w_enc: a crosscoder, its latents read many layers")
    if across and layer is None:
        raise FormatError(f"{file} w_dec: of a cross-layer transcoder, and the file's name has no layer_{{L}}")
    bias, decoder_bias = take(found, "b_enc", file, (-1,)), take(found, "b_dec", file, (-1,))
    encoder, shape = take(found, "w_enc", file, (-1, len(bias))), (len(bias), len(decoder_bias))
    if across and layer:
        decoder = own_part(found, "w_dec", file, int(layer[1]), shape)
    else:
        decoder = take(found, "w_dec", file, shape)
    return Weights(encoder.T, bias, decoder, decoder_bias), take(found, "threshold", file, (len(bias),))


def declared(file: Path) -> Declaration:
    """What `config.json` says, or else the folder."""
    settings = file.with_name("config.json")
    said = read_json(settings) if settings.is_file() else inferred(file.absolute().as_posix())
    if said.get("architecture") != "jump_relu":
        raise FormatError(f"config.json architecture: {said.get('architecture')!r}, not jump_relu")
    hook, l0 = word(said, "hf_hook_point_in"), said.get("l0")
    return declaration(
        "jump_relu",
        hook,
        word(said, "hf_hook_point_out") or hook,
        word(said, "model_name"),
        l0=float(l0) if isinstance(l0, int | float) else None,
        notes={"affine": flag(said, "affine_connection", "config.json", False)},
    )


def inferred(where: str) -> dict[str, Any]:
    """The settings that repository and folder imply."""
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
