"""Gemma Scope, JumpReLU SAEs and transcoders of Gemma 2 (arXiv 2408.05147): `params.npz` without settings.

    z = x . W_enc + b_enc      f = z where z > threshold      y = f . W_dec + b_dec

Only the repository and path declare the model and site:
`gemma-scope-{2b,9b,27b}-{pt,it}-{res,mlp,att,transcoders}/layer_{L}/width_{W}/average_l0_{N}/params.npz`, and
`embedding/...` in place of `layer_{L}`.
"""

import re
from pathlib import Path

from torch import Tensor

from rudder.sae_models.formats.folding import fold_scales
from rudder.sae_models.formats.layouts import Weights, check_finite, declaration, matching_files, single_file
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assemble, read_npz, refuse_unknown, take
from rudder.sae_models.sae import SAE

KEYS = frozenset({"W_enc", "b_enc", "W_dec", "b_dec", "threshold"})
REPOSITORY = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)")
# (hook point read, hook point written) by the names of TransformerLens.
HOOKS = {
    "res": ("hook_resid_post",) * 2,
    "mlp": ("hook_mlp_out",) * 2,
    "att": ("attn.hook_z",) * 2,
    "transcoders": ("ln2.hook_normalized", "hook_mlp_out"),
}


def recognise(path: Path) -> str | None:
    """Recognise a `params.npz`."""
    return "params.npz, as Gemma Scope publishes" if matching_files(path, "params.npz") else None


def read(path: Path) -> tuple[SAE, Declaration]:
    """Read the SAE or transcoder in a `params.npz`, or in a folder with one."""
    file = single_file(path, "params.npz")
    where = file.absolute().as_posix()
    weights, threshold = parameters(file)
    sae = assemble(*weights, threshold)
    if "/embedding/" not in where:
        return sae, declared(where, ())
    # Trained on vectors of the embedding matrix; the model multiplies them by sqrt(d).
    root = sae.width**0.5
    return check_finite(fold_scales(sae, 1 / root, 1 / root), file.name), declared(where, ("input_scale",))


def parameters(file: Path) -> tuple[Weights, Tensor]:
    """Read weights and thresholds [F]; W_enc is stored as [d, F], and some files have `w_` for `W_`."""
    tensors = {re.sub("^w_", "W_", key): tensor for key, tensor in read_npz(file).items()}
    refuse_unknown(tensors, KEYS, file.name)
    bias, decoder_bias = take(tensors, "b_enc", file.name, (-1,)), take(tensors, "b_dec", file.name, (-1,))
    encoder = take(tensors, "W_enc", file.name, (-1, len(bias)))
    decoder = take(tensors, "W_dec", file.name, (len(bias), len(decoder_bias)))
    if len(encoder) != len(decoder_bias) and "transcoders" not in file.absolute().as_posix():
        raise FormatError(f"{file.name} W_enc: width {len(encoder)}, b_dec has {len(decoder_bias)}")
    return Weights(encoder.T, bias, decoder, decoder_bias), take(tensors, "threshold", file.name, (len(bias),))


def declared(where: str, folded: tuple[str, ...]) -> Declaration:
    """Return the declaration in repository and path."""
    repository, layer = REPOSITORY.search(where), re.search(r"/layer_(\d+)/", where)
    width, l0 = re.search(r"/width_(\w+)/", where), re.search(r"/average_l0_(\d+)", where)
    size, tuned, kind = repository.groups() if repository else ("", "", "")
    hook, out = (f"blocks.{layer[1]}.{hook}" for hook in HOOKS[kind]) if kind and layer else ("", "")
    if "/embedding/" in where:
        hook = out = "hook_embed"
    return declaration(
        "jumprelu_transcoder" if kind == "transcoders" else "jumprelu",
        hook,
        out,
        f"google/gemma-2-{size}{'-it' * (tuned == 'it')}" if size else "",
        folded=folded,
        l0=float(l0[1]) if l0 else None,
        notes={"width": width[1]} if width else {},
    )


FORMAT = Format("gemma_scope", recognise, read)
