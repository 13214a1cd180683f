"""OpenSAE (THU-KEG): a transformers-style folder, `config.json` with architectures [OpenSae] and `model.safetensors`.

    h = (x - mean) / (std + 1e-5)      z = (h - b_dec) . encoder + bias      f = the k largest z, where above 0
    y = (f . W_dec + b_dec) * (std + 1e-5) + mean

Without `input_normalize`, h is x and y stays. With it but without `normalize_shift_back`, the input is normalised and
the output is not, which the canonical form does not have: refused. The canonical form scales y back by std alone: a
relative difference of 1e-5 / std.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rudder.sae_models.formats.folding import fold_pre_bias
from rudder.sae_models.formats.layouts import declaration, folder, matching, whole
from rudder.sae_models.formats.settings import count, flag, word
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assembled, only, read_json, read_safetensors, take
from rudder.sae_models.sae import LAYER_NORM_EPSILON, SAE, Normalisation, TopK

SETTINGS = "config.json"
KEYS = frozenset({"encoder.weight", "encoder.bias", "W_dec", "b_dec"})


def recognise(path: Path) -> str | None:
    """Settings with this architecture."""
    settings = folder(path) / SETTINGS
    if not settings.is_file() or not matching(path, "model*.safetensors"):
        return None
    try:
        return "config.json of an OpenSae" if read_json(settings).get("architectures") == ["OpenSae"] else None
    except FormatError:
        return None


def read(path: Path) -> tuple[SAE, Declaration]:
    """The SAE in a folder, its weights in one file or in shards."""
    said = read_json(folder(path) / SETTINGS)
    check(said)
    file, shards = "model.safetensors", matching(folder(path), "model*.safetensors")
    found = {key: tensor for shard in shards for key, tensor in read_safetensors(shard).items()}
    only(found, KEYS, file)
    bias, decoder_bias = take(found, "encoder.bias", file, (-1,)), take(found, "b_dec", file, (-1,))
    shape = (len(bias), len(decoder_bias))
    encoder, decoder = take(found, "encoder.weight", file, shape), take(found, "W_dec", file, shape)
    selection = TopK(count(said, "k", SETTINGS, len(bias)))
    normalised = flag(said, "input_normalize", SETTINGS, True)
    normalisation = Normalisation.LAYER_NORM if normalised else Normalisation.NONE
    sae = assembled(encoder, bias, decoder, decoder_bias, selection=selection, normalisation=normalisation)
    hooks = word(said, "input_hookpoint"), word(said, "output_hookpoint")
    said_of = declaration("topk", *hooks, word(said, "model_name"), folded=("pre_bias",))
    return whole(fold_pre_bias(sae, decoder_bias), file), said_of


def check(said: Mapping[str, Any]) -> None:
    """FormatError of settings that the canonical form does not have."""
    if said.get("activation", "topk") != "topk" or said.get("num_experts", 1) != 1:
        kind = (said.get("activation"), said.get("num_experts"))
        raise FormatError(f"{SETTINGS} activation, num_experts: {kind}, not a TopK without experts")
    if flag(said, "input_normalize", SETTINGS, True):
        if not flag(said, "normalize_shift_back", SETTINGS, False):
            raise FormatError(f"{SETTINGS} normalize_shift_back: false, the input is normalised and the output is not")
        epsilon = said.get("input_normalize_eps", LAYER_NORM_EPSILON)
        if epsilon != LAYER_NORM_EPSILON:
            raise FormatError(f"{SETTINGS} input_normalize_eps: {epsilon}, not {LAYER_NORM_EPSILON}")


FORMAT = Format("opensae", recognise, read)
