"""Transcoders as circuit-tracer reads them (mwhanna and mntss publish so): `layer_{L}.safetensors`, `config.yaml`.

    z = x . W_enc + b_enc      f = z where z > threshold, or > 0      y = f . W_dec + b_dec + x . W_skip

W_enc and W_dec are [F, d], W_skip is [d_out, d].
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rudder.sae_models.formats.layouts import declaration, keys, matching, one
from rudder.sae_models.formats.settings import word
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assembled, only, read_safetensors, read_yaml, take
from rudder.sae_models.sae import SAE

KEYS = frozenset({"W_enc", "b_enc", "W_dec", "b_dec"})
THRESHOLDS = ("activation_function.threshold", "threshold")
SKIP = "W_skip"


def recognise(path: Path) -> str | None:
    """`layer_{L}.safetensors` with these names."""
    files = matching(path, "layer_*.safetensors")
    return f"{files[0].name} with W_enc and W_dec" if files and keys(files[0]) >= KEYS else None


def read(path: Path) -> tuple[SAE, Declaration]:
    """The transcoder of one layer: its file, or a folder with one."""
    file = one(path, "layer_*.safetensors")
    found = read_safetensors(file)
    only(found, KEYS | {SKIP, *THRESHOLDS}, file.name)
    bias, decoder_bias = take(found, "b_enc", file.name, (-1,)), take(found, "b_dec", file.name, (-1,))
    encoder = take(found, "W_enc", file.name, (len(bias), -1))
    decoder = take(found, "W_dec", file.name, (len(bias), len(decoder_bias)))
    shape = (len(decoder_bias), encoder.shape[1])
    skip = take(found, SKIP, file.name, shape).T if SKIP in found else None
    limits = threshold(found, THRESHOLDS, bias, file.name)
    layer = re.match(r"layer_(\d+)", file.stem)
    return assembled(encoder, bias, decoder, decoder_bias, limits, skip=skip), declared(
        file, "transcoder", layer[1] if layer else ""
    )


def threshold(found: dict[str, Tensor], names: Sequence[str], bias: Tensor, file: str) -> Tensor | float:
    """The JumpReLU's threshold [F] by the first of these names, or 0 where there is none."""
    named = [key for key in names if key in found]
    if not named:
        return 0.0
    values = take(found, named[0], file).flatten()
    if len(values) not in (1, len(bias)):
        raise FormatError(f"{file} {named[0]}: {len(values)} thresholds for {len(bias)} latents")
    return values.expand(len(bias))


def declared(file: Path, architecture: str, layer: str) -> Declaration:
    """What `config.yaml` beside the file says; the Qwen3 14B repository has none, so its name must do."""
    qwen = re.search(r"qwen3-([\d.]+)b-transcoders", file.absolute().as_posix())
    said: dict[str, Any] = {}
    if file.with_name("config.yaml").is_file():
        said = read_yaml(file.with_name("config.yaml"))
    elif qwen:
        said = {"model_name": f"Qwen/Qwen3-{qwen[1]}B", "feature_input_hook": "mlp.hook_in"}
        said["feature_output_hook"] = "hook_mlp_out"
    names = word(said, "feature_input_hook"), word(said, "feature_output_hook")
    hook, out = (f"blocks.{layer}.{name}" if layer and name else "" for name in names)
    return declaration(architecture, hook, out, word(said, "model_name"))


FORMAT = Format("transcoders", recognise, read)
