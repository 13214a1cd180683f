"""Transcoders in circuit-tracer's format (published by mwhanna and mntss): `layer_{L}.safetensors`, `config.yaml`.

    z = x . W_enc + b_enc      f = z where z > threshold, or > 0      y = f . W_dec + b_dec + x . W_skip

W_enc and W_dec are [F, d], W_skip is [d_out, d].
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rudder.sae_models.formats.layouts import declaration, matching_files, single_file, tensor_names
from rudder.sae_models.formats.settings import name_of
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assemble, read_safetensors, read_yaml, refuse_unknown, take
from rudder.sae_models.sae import SAE

KEYS = frozenset({"W_enc", "b_enc", "W_dec", "b_dec"})
THRESHOLDS = ("activation_function.threshold", "threshold")
SKIP = "W_skip"


def recognise(path: Path) -> str | None:
    """Recognise `layer_{L}.safetensors` with these tensors."""
    files = matching_files(path, "layer_*.safetensors")
    return f"{files[0].name} with W_enc and W_dec" if files and tensor_names(files[0]) >= KEYS else None


def read(path: Path) -> tuple[SAE, Declaration]:
    """Read the transcoder of one layer from its file, or from a folder with one."""
    file = single_file(path, "layer_*.safetensors")
    tensors = read_safetensors(file)
    refuse_unknown(tensors, KEYS | {SKIP, *THRESHOLDS}, file.name)
    bias, decoder_bias = take(tensors, "b_enc", file.name, (-1,)), take(tensors, "b_dec", file.name, (-1,))
    encoder = take(tensors, "W_enc", file.name, (len(bias), -1))
    decoder = take(tensors, "W_dec", file.name, (len(bias), len(decoder_bias)))
    shape = (len(decoder_bias), encoder.shape[1])
    skip = take(tensors, SKIP, file.name, shape).T if SKIP in tensors else None
    limits = threshold(tensors, THRESHOLDS, bias, file.name)
    layer = re.match(r"layer_(\d+)", file.stem)
    return assemble(encoder, bias, decoder, decoder_bias, limits, skip=skip), declared(
        file, "transcoder", layer[1] if layer else ""
    )


def threshold(tensors: dict[str, Tensor], names: Sequence[str], bias: Tensor, file: str) -> Tensor | float:
    """Return the JumpReLU thresholds [F] by the first of these names that exists, or 0."""
    named = [key for key in names if key in tensors]
    if not named:
        return 0.0
    values = take(tensors, named[0], file).flatten()
    if len(values) not in (1, len(bias)):
        raise FormatError(f"{file} {named[0]}: {len(values)} thresholds for {len(bias)} latents")
    return values.expand(len(bias))


def declared(file: Path, architecture: str, layer: str) -> Declaration:
    """Return the declaration in `config.yaml`; the Qwen3 14B repository has none, so infer it from its name."""
    qwen = re.search(r"qwen3-([\d.]+)b-transcoders", file.absolute().as_posix())
    settings: dict[str, Any] = {}
    if file.with_name("config.yaml").is_file():
        settings = read_yaml(file.with_name("config.yaml"))
    elif qwen:
        settings = {"model_name": f"Qwen/Qwen3-{qwen[1]}B", "feature_input_hook": "mlp.hook_in"}
        settings["feature_output_hook"] = "hook_mlp_out"
    names = name_of(settings, "feature_input_hook"), name_of(settings, "feature_output_hook")
    hook, out = (f"blocks.{layer}.{name}" if layer and name else "" for name in names)
    return declaration(architecture, hook, out, name_of(settings, "model_name"))


FORMAT = Format("transcoders", recognise, read)
