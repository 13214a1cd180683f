"""Transcoders as circuit-tracer reads them (mwhanna and mntss publish so): `layer_{L}.safetensors`, `config.yaml`.

    z = x . W_enc + b_enc      f = z where z > threshold, or > 0      y = f . W_dec + b_dec + x . W_skip

W_enc and W_dec are [F, d], W_skip is [d_out, d]. A cross-layer transcoder, in `W_enc_{L}.safetensors` and
`W_dec_{L}.safetensors`, is refused: each latent writes to all later layers, so no site has its reconstruction, and to
read its encoder alone would make edits of its latents do nothing.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_models.formats.layouts import declaration, keys, matching, one
from sae_models.formats.settings import word
from sae_models.formats.source import Declaration, Format, FormatError
from sae_models.formats.tensors import assembled, only, read_safetensors, read_yaml, take
from sae_models.sae import SAE

KEYS = frozenset({"W_enc", "b_enc", "W_dec", "b_dec"})
THRESHOLDS = ("activation_function.threshold", "threshold")
SKIP = "W_skip"


def recognise(path: Path) -> str | None:
    """`layer_{L}.safetensors` with these names, or the two files of a cross-layer transcoder."""
    files = matching(path, "layer_*.safetensors")
    if files and keys(files[0]) >= KEYS:
        return f"{files[0].name} with W_enc and W_dec"
    across = matching(path, "W_enc_*.safetensors") or matching(path, "W_dec_*.safetensors")
    return f"{across[0].name} of a cross-layer transcoder" if across else None


def read(path: Path) -> tuple[SAE, Declaration]:
    """The transcoder of one layer: its file, or a folder with one."""
    across = matching(path, "W_enc_*.safetensors") or matching(path, "W_dec_*.safetensors")
    if across:
        raise FormatError(f"{across[0].name}: a cross-layer transcoder, its latents write to many layers")
    file = one(path, "layer_*.safetensors")
    found = read_safetensors(file)
    only(found, KEYS | {SKIP, *THRESHOLDS}, file.name)
    bias, decoder_bias = take(found, "b_enc", file.name, (-1,)), take(found, "b_dec", file.name, (-1,))
    encoder = take(found, "W_enc", file.name, (len(bias), -1))
    decoder = take(found, "W_dec", file.name, (len(bias), len(decoder_bias)))
    shape = (len(decoder_bias), encoder.shape[1])
    skip = take(found, SKIP, file.name, shape).T if SKIP in found else None
    sae = assembled(encoder, bias, decoder, decoder_bias, threshold(found, bias, file.name), skip=skip)
    return sae, declared(file)


def threshold(found: dict[str, Tensor], bias: Tensor, file: str) -> Tensor | float:
    """The JumpReLU's threshold [F], or 0 where there is none."""
    named = [key for key in THRESHOLDS if key in found]
    if not named:
        return 0.0
    values = take(found, named[0], file).flatten()
    if len(values) not in (1, len(bias)):
        raise FormatError(f"{file} {named[0]}: {len(values)} thresholds for {len(bias)} latents")
    return values.expand(len(bias))


def declared(file: Path) -> Declaration:
    """What `config.yaml` beside the file says; the Qwen3 14B repository has none, so its name must do."""
    layer = re.match(r"layer_(\d+)", file.stem)
    qwen = re.search(r"qwen3-([\d.]+)b-transcoders", file.absolute().as_posix())
    said: dict[str, Any] = {}
    if file.with_name("config.yaml").is_file():
        said = read_yaml(file.with_name("config.yaml"))
    elif qwen:
        said = {"model_name": f"Qwen/Qwen3-{qwen[1]}B", "feature_input_hook": "mlp.hook_in"}
        said["feature_output_hook"] = "hook_mlp_out"
    names = word(said, "feature_input_hook"), word(said, "feature_output_hook")
    hook, out = (f"blocks.{layer[1]}.{name}" if layer and name else "" for name in names)
    return declaration("transcoder", hook, out, word(said, "model_name"))


FORMAT = Format("transcoders", recognise, read)
