"""OpenAI's sparse_autoencoder (arXiv 2406.04093): a torch file for each layer and location of GPT-2 small.

    h = (x - mean) / (std + 1e-5)      z = (h - pre_bias) . encoder + latent_bias
    f = the k largest z, where above 0      y = (f . decoder + pre_bias) * std + mean

Only TopK SAEs normalise their input; ReLU SAEs read x itself.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rudder.sae_models.formats.folding import fold_pre_bias
from rudder.sae_models.formats.layouts import check_finite, declaration, matching_files, single_file, tensor_names
from rudder.sae_models.formats.settings import count
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assemble, read_pickle, refuse_unknown, state_dict, take
from rudder.sae_models.sae import SAE, Normalisation, TopK

WEIGHTS = frozenset({"pre_bias", "latent_bias", "encoder.weight", "decoder.weight"})
STATISTICS = frozenset({"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"})
# By the names of TransformerLens.
LOCATIONS = {
    "resid_post_mlp": "hook_resid_post",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_delta_attn": "hook_attn_out",
}


def recognise(path: Path) -> str | None:
    """Recognise a torch file with `pre_bias` and `latent_bias`."""
    files = matching_files(path, "*.pt")
    return f"{files[0].name} with pre_bias and latent_bias" if files and tensor_names(files[0]) >= WEIGHTS else None


def read(path: Path) -> tuple[SAE, Declaration]:
    """Read the autoencoder in a torch file."""
    file = single_file(path, "*.pt")
    tensors = state_dict(read_pickle(file), file.name)
    refuse_unknown(tensors, WEIGHTS | STATISTICS, file.name)
    latent_bias, pre_bias = take(tensors, "latent_bias", file.name, (-1,)), take(tensors, "pre_bias", file.name, (-1,))
    shape = (len(latent_bias), len(pre_bias))
    encoder = take(tensors, "encoder.weight", file.name, shape)
    decoder = take(tensors, "decoder.weight", file.name, shape[::-1]).T
    selection = selection_of(tensors, len(latent_bias), file.name)
    normalisation = Normalisation.LAYER_NORM if selection else Normalisation.NONE
    sae = assemble(encoder, latent_bias, decoder, pre_bias, selection=selection, normalisation=normalisation)
    hook, architecture = hook_of(file), "topk" if selection else "relu"
    declared = declaration(architecture, hook, hook, "gpt2" if hook else "", folded=("pre_bias",))
    return check_finite(fold_pre_bias(sae, pre_bias), file.name), declared


def selection_of(tensors: Mapping[str, Any], latents: int, file: str) -> TopK | None:
    """Return the selection: TopK, followed by a ReLU, or None for a ReLU."""
    name = tensors.get("activation", "ReLU")
    if name == "ReLU":
        return None
    settings = tensors.get("activation_state_dict")
    if name != "TopK" or not isinstance(settings, dict) or settings.get("postact_fn") != "ReLU":
        raise FormatError(f"{file} activation: {name!r} with {settings!r}, neither ReLU nor TopK followed by ReLU")
    return TopK(count(settings, "k", file, latents))


def hook_of(file: Path) -> str:
    """Return the hook point of a path like `gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt`, or empty."""
    location = re.search(r"/(resid_\w+?_(?:mlp|attn))(?:_v5_\w+)?/autoencoders/(\d+)\.pt$", file.absolute().as_posix())
    return f"blocks.{location[2]}.{LOCATIONS[location[1]]}" if location and location[1] in LOCATIONS else ""


FORMAT = Format("openai", recognise, read)
