"""OpenAI's sparse_autoencoder (arXiv 2406.04093): one torch file for each layer and location of GPT-2 small.

    h = (x - mean) / (std + 1e-5)      z = (h - pre_bias) . encoder + latent_bias
    f = the k largest z, where above 0      y = (f . decoder + pre_bias) * std + mean

Only a TopK is normalised; a ReLU reads x itself.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rudder.sae_models.formats.folding import fold_pre_bias
from rudder.sae_models.formats.layouts import declaration, keys, matching, one, whole
from rudder.sae_models.formats.settings import count
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assembled, only, read_pickle, state, take
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
    """A torch file with `pre_bias` and `latent_bias`."""
    files = matching(path, "*.pt")
    return f"{files[0].name} with pre_bias and latent_bias" if files and keys(files[0]) >= WEIGHTS else None


def read(path: Path) -> tuple[SAE, Declaration]:
    """The autoencoder in a torch file."""
    file = one(path, "*.pt")
    found = state(read_pickle(file), file.name)
    only(found, WEIGHTS | STATISTICS, file.name)
    latent_bias, pre_bias = take(found, "latent_bias", file.name, (-1,)), take(found, "pre_bias", file.name, (-1,))
    shape = (len(latent_bias), len(pre_bias))
    encoder = take(found, "encoder.weight", file.name, shape)
    decoder = take(found, "decoder.weight", file.name, shape[::-1]).T
    selection = chosen(found, len(latent_bias), file.name)
    normalisation = Normalisation.LAYER_NORM if selection else Normalisation.NONE
    sae = assembled(encoder, latent_bias, decoder, pre_bias, selection=selection, normalisation=normalisation)
    hook, architecture = located(file), "topk" if selection else "relu"
    said = declaration(architecture, hook, hook, "gpt2" if hook else "", folded=("pre_bias",))
    return whole(fold_pre_bias(sae, pre_bias), file.name), said


def chosen(found: Mapping[str, Any], latents: int, file: str) -> TopK | None:
    """The activation: a TopK with a ReLU behind it, or None for a ReLU."""
    name = found.get("activation", "ReLU")
    if name == "ReLU":
        return None
    settings = found.get("activation_state_dict")
    if name != "TopK" or not isinstance(settings, dict) or settings.get("postact_fn") != "ReLU":
        raise FormatError(f"{file} activation: {name!r} with {settings!r}, neither ReLU nor TopK followed by ReLU")
    return TopK(count(settings, "k", file, latents))


def located(file: Path) -> str:
    """The hook point in a path like `gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt`, or empty."""
    location = re.search(r"/(resid_\w+?_(?:mlp|attn))(?:_v5_\w+)?/autoencoders/(\d+)\.pt$", file.absolute().as_posix())
    return f"blocks.{location[2]}.{LOCATIONS[location[1]]}" if location and location[1] in LOCATIONS else ""


FORMAT = Format("openai", recognise, read)
