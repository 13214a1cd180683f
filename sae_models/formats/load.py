"""Load a checkpoint of any supported format."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rudder.sae_models.formats import (
    adaptive_k,
    centring,
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
from rudder.sae_models.formats.layouts import check_finite
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
MAX_NAMES = 20


def load(path: Path, overrides: Mapping[str, Any] = saelens.NO_OVERRIDES) -> Loaded:
    """Load the checkpoint in a file or folder by the one format that recognises it. `overrides` replace settings of the
    checkpoint, by their names in SAELens (hub.Release).

    FormatError: no format or several recognise it, with the names in the folder; or it is invalid, with the field.
    """
    if not path.exists():
        raise FormatError(f"{path}: is not there")
    candidates = [(candidate, why) for candidate in FORMATS if (why := candidate.recognise(path))]
    if len(candidates) != 1:
        known = "; ".join(f"{candidate.name}: {why}" for candidate, why in candidates) or "none that is known"
        raise FormatError(f"{path}: the format must be one, it is {known}; seen: {list_names(path)}")
    (reader, why), *_ = candidates
    if reader is saelens.FORMAT:
        sae, declared = saelens.read(path, overrides)
    else:
        sae, declared = reader.read(path)
        declared = replace(declared, notes={**declared.notes, **overrides})
        sae, declared = centring.fold_declared_centring(sae, declared)
    # Folding a pre-bias changes only the bias, so checking the matrices again would only cost time.
    check_finite(sae, path.name, matrices=bool(set(declared.folded) - {"pre_bias"}))
    return Loaded(reader.name, why, sae, declared)


def list_names(path: Path) -> str:
    """List the first names in a folder, or the name and size of a file."""
    if path.is_file():
        return f"the file {path.name}, {path.stat().st_size} bytes"
    names = sorted(child.name + "/" * child.is_dir() for child in path.iterdir())
    return ", ".join(names[:MAX_NAMES]) + f" and {len(names) - MAX_NAMES} more" * (len(names) > MAX_NAMES) or "nothing"
