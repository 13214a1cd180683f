"""The SAE of DeepSeek R1 Distill Llama 8B: a torch file of two linear layers, with the layer `l{L}` in its name.

f = ReLU(x . encoder + bias)      y = f . decoder + decoder_bias
"""

import re
from pathlib import Path

from rudder.sae_models.formats.layouts import declaration, linear_layers, matching_files, single_file, tensor_names
from rudder.sae_models.formats.source import Declaration, Format
from rudder.sae_models.formats.tensors import assemble, read_pickle, refuse_unknown, state_dict
from rudder.sae_models.sae import SAE

KEYS = frozenset({"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"})
LAYER = re.compile(r"(?:^|[^a-zA-Z])[lL](\d+)(?:[^a-zA-Z]|$)")


def recognise(path: Path) -> str | None:
    """Recognise a torch file with exactly these tensors and a layer in its name, which dictionary_learning lacks."""
    files = matching_files(path, "*.pt")
    named = len(files) == 1 and LAYER.search(files[0].stem)
    return f"{files[0].name} with two linear layers" if named and tensor_names(files[0]) == KEYS else None


def read(path: Path) -> tuple[SAE, Declaration]:
    """Read the SAE in a torch file, or in a folder with one."""
    file = single_file(path, "*.pt")
    tensors = state_dict(read_pickle(file), file.name)
    refuse_unknown(tensors, KEYS, file.name)
    layer = LAYER.search(file.stem)
    hook = f"blocks.{layer[1]}.hook_resid_post" if layer else ""
    model = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B" if "deepseek" in file.name.lower() else ""
    return assemble(*linear_layers(tensors, file.name)), declaration("relu", hook, hook, model)


FORMAT = Format("deepseek_r1", recognise, read)
