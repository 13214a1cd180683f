"""Goodfire's SAEs of Llama 3: one torch file, `{model}-SAE-l{L}.pt` or `.pth`, of two linear layers.

f = ReLU(x . encoder + bias)      y = f . decoder + decoder_bias
"""

import re
from pathlib import Path

from rudder.sae_models.formats.layouts import declaration, keys, linear, matching, one
from rudder.sae_models.formats.source import Declaration, Format
from rudder.sae_models.formats.tensors import assembled, only, read_pickle, state
from rudder.sae_models.sae import SAE

KEYS = frozenset(f"{layer}_linear.{part}" for layer in ("encoder", "decoder") for part in ("weight", "bias"))


def recognise(path: Path) -> str | None:
    """A torch file with `encoder_linear` and `decoder_linear`."""
    files = matching(path, "*.pt*")
    return f"{files[0].name} with encoder_linear and decoder_linear" if files and keys(files[0]) >= KEYS else None


def read(path: Path) -> tuple[SAE, Declaration]:
    """The SAE in a torch file, or in a folder with one."""
    file = one(path, "*.pt*")
    found = state(read_pickle(file), file.name)
    only(found, KEYS, file.name)
    named = re.fullmatch(r"(.+)-SAE-l(\d+)", file.stem)
    hook = f"blocks.{named[2]}.hook_resid_post" if named else ""
    model = f"meta-llama/{named[1]}" if named else ""
    sae = assembled(*linear(found, file.name, "encoder_linear", "decoder_linear"))
    return sae, declaration("relu", hook, hook, model)


FORMAT = Format("goodfire", recognise, read)
