"""Qwen-Scope (arXiv 2605.11887): TopK SAEs of the residual stream, one torch file `layer{L}.sae.pt` for each layer.

    z = x . W_enc + b_enc      f = the k largest z, where above 0      y = f . W_dec + b_dec

The names are those of SAELens, the matrices are transposed: W_enc [F, d], W_dec [d, F]. k, model and width are in the
repository's name alone: `SAE-Res-{model}-W{F / 1024}K-L0_{k}`.
"""

import re
from pathlib import Path

from rudder.sae_models.formats.layouts import declaration, keys, matching, one
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assembled, only, oriented, read_pickle, state, take
from rudder.sae_models.sae import SAE, TopK

KEYS = frozenset({"W_enc", "b_enc", "W_dec", "b_dec"})
REPOSITORY = re.compile(r"SAE-Res-([^/]+)-W(\d+)K-L0_(\d+)")


def recognise(path: Path) -> str | None:
    """`layer{L}.sae.pt` with these names alone."""
    files = matching(path, "layer*.sae.pt")
    return f"{files[0].name} with W_enc and W_dec" if files and keys(files[0]) == KEYS else None


def read(path: Path) -> tuple[SAE, Declaration]:
    """The SAE in a torch file; its path must hold the repository's name."""
    file = one(path, "layer*.sae.pt")
    repository = REPOSITORY.search(file.absolute().as_posix())
    if repository is None:
        raise FormatError(f"{file.name}: k is in the repository's name, SAE-Res-...-L0_k, which the path does not hold")
    found = state(read_pickle(file), file.name)
    only(found, KEYS, file.name)
    bias, decoder_bias = take(found, "b_enc", file.name, (-1,)), take(found, "b_dec", file.name, (-1,))
    latents, width, k = len(bias), len(decoder_bias), int(repository[3])
    encoder = oriented(take(found, "W_enc", file.name), latents, width, f"{file.name} W_enc")
    decoder = oriented(take(found, "W_dec", file.name), latents, width, f"{file.name} W_dec")
    if not 1 <= k <= latents:
        raise FormatError(f"{file.name}: {latents} latents, the repository's name says L0_{k}")
    layer = re.match(r"layer(\d+)\.", file.name)
    hook = f"blocks.{layer[1]}.hook_resid_post" if layer else ""
    sae = assembled(encoder, bias, decoder, decoder_bias, selection=TopK(k))
    return sae, declaration("topk", hook, hook, f"Qwen/{repository[1]}", l0=float(k))


FORMAT = Format("qwen_scope", recognise, read)
