"""Reading a checkpoint of whatever format it is."""

from pathlib import Path

from rudder.sae_models.formats import (
    adaptive_k,
    cross_layer,
    deepseek_r1,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    goodfire,
    llama_scope,
    llamascopium,
    openai,
    opensae,
    qwen_scope,
    route_sae,
    saelens,
    sparsify,
    transcoders,
)
from rudder.sae_models.formats.layouts import whole
from rudder.sae_models.formats.source import Format, FormatError, Loaded

FORMATS: tuple[Format, ...] = (
    saelens.FORMAT,
    sparsify.FORMAT,
    dictionary_learning.FORMAT,
    gemma_scope.FORMAT,
    gemma_scope_2.FORMAT,
    openai.FORMAT,
    llama_scope.FORMAT,
    llamascopium.FORMAT,
    goodfire.FORMAT,
    qwen_scope.FORMAT,
    deepseek_r1.FORMAT,
    transcoders.FORMAT,
    cross_layer.FORMAT,
    opensae.FORMAT,
    route_sae.FORMAT,
    adaptive_k.FORMAT,
)
SEEN = 20


def load(path: Path) -> Loaded:
    """Reads the checkpoint in a file or folder, in the one format that fits it. FormatError: what was seen, where none
    or more than one does, or what is wrong in it.
    """
    if not path.exists():
        raise FormatError(f"{path}: is not there")
    fitting = [(found, why) for found in FORMATS if (why := found.recognise(path))]
    if len(fitting) != 1:
        known = "; ".join(f"{found.name}: {why}" for found, why in fitting) or "none that is known"
        raise FormatError(f"{path}: the format must be one, it is {known}; seen: {seen(path)}")
    (found, why), *_ = fitting
    sae, declared = found.read(path)
    # A pre-bias changes the bias alone.
    whole(sae, path.name, matrices=bool(set(declared.folded) - {"pre_bias"}))
    return Loaded(found.name, why, sae, declared)


def seen(path: Path) -> str:
    """The names in a folder, or that of a file, as many as help."""
    if path.is_file():
        return f"the file {path.name}, {path.stat().st_size} bytes"
    names = sorted(child.name + "/" * child.is_dir() for child in path.iterdir())
    return ", ".join(names[:SEEN]) + f" and {len(names) - SEEN} more" * (len(names) > SEEN) or "nothing"
