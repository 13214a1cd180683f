"""Goodfire's SAEs of Llama 3: a torch file of two linear layers, `{model}-SAE-l{L}.pt` or `.pth`.

f = ReLU(x . encoder + bias)      y = f . decoder + decoder_bias
"""

import re
from pathlib import Path

from rudder.sae_models.formats.layouts import declaration, linear_layers, matching_files, single_file, tensor_names
from rudder.sae_models.formats.source import Declaration, Format
from rudder.sae_models.formats.tensors import assemble, read_pickle, refuse_unknown, state_dict
from rudder.sae_models.sae import SAE

KEYS = frozenset(f"{layer}_linear.{part}" for layer in ("encoder", "decoder") for part in ("weight", "bias"))


def recognise(path: Path) -> str | None:
    """Recognise a torch file with `encoder_linear` and `decoder_linear`."""
    files = matching_files(path, "*.pt*")
    return (
        f"{files[0].name} with encoder_linear and decoder_linear" if files and tensor_names(files[0]) >= KEYS else None
    )


def read(path: Path) -> tuple[SAE, Declaration]:
    """Read the SAE in a torch file, or in a folder with one."""
    file = single_file(path, "*.pt*")
    tensors = state_dict(read_pickle(file), file.name)
    refuse_unknown(tensors, KEYS, file.name)
    named = re.fullmatch(r"(.+)-SAE-l(\d+)", file.stem)
    hook = f"blocks.{named[2]}.hook_resid_post" if named else ""
    model = f"meta-llama/{named[1]}" if named else ""
    sae = assemble(*linear_layers(tensors, file.name, "encoder_linear", "decoder_linear"))
    return sae, declaration("relu", hook, hook, model)


FORMAT = Format("goodfire", recognise, read)
