"""Qwen-Scope (arXiv 2605.11887): TopK SAEs of the residual stream, a torch file `layer{L}.sae.pt` for each layer.

    z = x . W_enc + b_enc      f = the k largest z, where above 0      y = f . W_dec + b_dec

The names are those of SAELens, but the matrices are transposed: W_enc [F, d], W_dec [d, F]. Only the repository's name,
`SAE-Res-{model}-W{F / 1024}K-L0_{k}`, declares k, model and number of latents.
"""

import re
from pathlib import Path

from rudder.sae_models.formats.layouts import declaration, matching_files, single_file, tensor_names
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assemble, orient, read_pickle, refuse_unknown, state_dict, take
from rudder.sae_models.sae import SAE, TopK

KEYS = frozenset({"W_enc", "b_enc", "W_dec", "b_dec"})
REPOSITORY = re.compile(r"SAE-Res-([^/]+)-W(\d+)K-L0_(\d+)")


def recognise(path: Path) -> str | None:
    """Recognise `layer{L}.sae.pt` with exactly these tensors."""
    files = matching_files(path, "layer*.sae.pt")
    return f"{files[0].name} with W_enc and W_dec" if files and tensor_names(files[0]) == KEYS else None


def read(path: Path) -> tuple[SAE, Declaration]:
    """Read the SAE in a torch file whose path contains the repository's name."""
    file = single_file(path, "layer*.sae.pt")
    repository = REPOSITORY.search(file.absolute().as_posix())
    if repository is None:
        raise FormatError(f"{file.name}: k is in the repository's name, SAE-Res-...-L0_k, which the path does not hold")
    tensors = state_dict(read_pickle(file), file.name)
    refuse_unknown(tensors, KEYS, file.name)
    bias, decoder_bias = take(tensors, "b_enc", file.name, (-1,)), take(tensors, "b_dec", file.name, (-1,))
    latents, width, k = len(bias), len(decoder_bias), int(repository[3])
    encoder = orient(take(tensors, "W_enc", file.name), latents, width, f"{file.name} W_enc")
    decoder = orient(take(tensors, "W_dec", file.name), latents, width, f"{file.name} W_dec")
    if not 1 <= k <= latents:
        raise FormatError(f"{file.name}: {latents} latents, the repository's name says L0_{k}")
    layer = re.match(r"layer(\d+)\.", file.name)
    hook = f"blocks.{layer[1]}.hook_resid_post" if layer else ""
    sae = assemble(encoder, bias, decoder, decoder_bias, selection=TopK(k))
    return sae, declaration("topk", hook, hook, f"Qwen/{repository[1]}", l0=float(k))


FORMAT = Format("qwen_scope", recognise, read)
