"""The SAE of DeepSeek R1 Distill Llama 8B: one torch file of two linear layers, its layer `l{L}` in the file's name.

f = ReLU(x . encoder + bias)      y = f . decoder + decoder_bias
"""

import re
from pathlib import Path

from rudder.sae_models.formats.layouts import declaration, keys, linear, matching, one
from rudder.sae_models.formats.source import Declaration, Format
from rudder.sae_models.formats.tensors import assembled, only, read_pickle, state
from rudder.sae_models.sae import SAE

KEYS = frozenset({"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"})
LAYER = re.compile(r"(?:^|[^a-zA-Z])[lL](\d+)(?:[^a-zA-Z]|$)")


def recognise(path: Path) -> str | None:
    """A torch file with these names alone and a layer in its own name: `ae.pt` of dictionary_learning has none."""
    files = matching(path, "*.pt")
    named = len(files) == 1 and LAYER.search(files[0].stem)
    return f"{files[0].name} with two linear layers" if named and keys(files[0]) == KEYS else None


def read(path: Path) -> tuple[SAE, Declaration]:
    """The SAE in a torch file, or in a folder with one."""
    file = one(path, "*.pt")
    found = state(read_pickle(file), file.name)
    only(found, KEYS, file.name)
    layer = LAYER.search(file.stem)
    hook = f"blocks.{layer[1]}.hook_resid_post" if layer else ""
    model = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B" if "deepseek" in file.name.lower() else ""
    return assembled(*linear(found, file.name)), declaration("relu", hook, hook, model)


FORMAT = Format("deepseek_r1", recognise, read)
