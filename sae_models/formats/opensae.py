"""OpenSAE (THU-KEG): a folder in the style of transformers, `config.json` with architectures [OpenSae] and
`model.safetensors`.

    h = (x - mean) / (std + 1e-5)      z = (h - b_dec) . encoder + bias      f = the k largest z, where above 0
    y = (f . W_dec + b_dec) * (std + 1e-5) + mean

Without `input_normalize`, h = x and y = f . W_dec + b_dec. With it but without `normalize_shift_back`, the output is
not denormalised, which the canonical form does not support: refused. The canonical form multiplies y by std alone, a
relative difference of 1e-5 / std.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rudder.sae_models.formats.folding import fold_pre_bias
from rudder.sae_models.formats.layouts import check_finite, checkpoint_folder, declaration, matching_files
from rudder.sae_models.formats.settings import count, flag, name_of
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assemble, read_json, read_safetensors, refuse_unknown, take
from rudder.sae_models.sae import LAYER_NORM_EPSILON, SAE, Normalisation, TopK

SETTINGS = "config.json"
KEYS = frozenset({"encoder.weight", "encoder.bias", "W_dec", "b_dec"})


def recognise(path: Path) -> str | None:
    """Recognise settings with this architecture."""
    config = checkpoint_folder(path) / SETTINGS
    if not config.is_file() or not matching_files(path, "model*.safetensors"):
        return None
    try:
        return "config.json of an OpenSae" if read_json(config).get("architectures") == ["OpenSae"] else None
    except FormatError:
        return None


def read(path: Path) -> tuple[SAE, Declaration]:
    """Read the SAE in a folder with its weights in one file or in shards."""
    settings = read_json(checkpoint_folder(path) / SETTINGS)
    check(settings)
    file, shards = "model.safetensors", matching_files(checkpoint_folder(path), "model*.safetensors")
    tensors = {key: tensor for shard in shards for key, tensor in read_safetensors(shard).items()}
    refuse_unknown(tensors, KEYS, file)
    bias, decoder_bias = take(tensors, "encoder.bias", file, (-1,)), take(tensors, "b_dec", file, (-1,))
    shape = (len(bias), len(decoder_bias))
    encoder, decoder = take(tensors, "encoder.weight", file, shape), take(tensors, "W_dec", file, shape)
    selection = TopK(count(settings, "k", SETTINGS, len(bias)))
    normalised = flag(settings, "input_normalize", SETTINGS, True)
    normalisation = Normalisation.LAYER_NORM if normalised else Normalisation.NONE
    sae = assemble(encoder, bias, decoder, decoder_bias, selection=selection, normalisation=normalisation)
    hooks = name_of(settings, "input_hookpoint"), name_of(settings, "output_hookpoint")
    declared = declaration("topk", *hooks, name_of(settings, "model_name"), folded=("pre_bias",))
    return check_finite(fold_pre_bias(sae, decoder_bias), file), declared


def check(settings: Mapping[str, Any]) -> None:
    """Raise FormatError for settings that the canonical form does not support."""
    if settings.get("activation", "topk") != "topk" or settings.get("num_experts", 1) != 1:
        kind = (settings.get("activation"), settings.get("num_experts"))
        raise FormatError(f"{SETTINGS} activation, num_experts: {kind}, not a TopK without experts")
    if flag(settings, "input_normalize", SETTINGS, True):
        if not flag(settings, "normalize_shift_back", SETTINGS, False):
            raise FormatError(f"{SETTINGS} normalize_shift_back: false, the input is normalised and the output is not")
        epsilon = settings.get("input_normalize_eps", LAYER_NORM_EPSILON)
        if epsilon != LAYER_NORM_EPSILON:
            raise FormatError(f"{SETTINGS} input_normalize_eps: {epsilon}, not {LAYER_NORM_EPSILON}")


FORMAT = Format("opensae", recognise, read)
