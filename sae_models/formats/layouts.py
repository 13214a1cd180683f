"""What several published layouts have in common: where their files lie, pairs of linear layers, settings, folds."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_models.formats.source import FormatError
from sae_models.formats.tensors import read_pickle, read_safetensors, safetensors_header, state, take
from sae_models.sae import BLOCK

# Hook points as TransformerLens names them. The input of the MLP before its norm's weight (`ln2.hook_normalized`) and
# the heads before the output projection (`attn.hook_z`) are no sites here, so they have no name.
HOOKS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "mlp.hook_in": "mlp_in",
}


class Weights(NamedTuple):
    """encoder [F, d], bias [F], decoder [F, d_out], decoder_bias [d_out], as they are stored."""

    encoder: Tensor
    bias: Tensor
    decoder: Tensor
    decoder_bias: Tensor


def matching(path: Path, pattern: str) -> list[Path]:
    """The path itself, or the files in that folder, with names like a pattern."""
    if path.is_file():
        return [path] if path.match(pattern) else []
    return sorted(path.glob(pattern))


def one(path: Path, pattern: str) -> Path:
    """The one file that `matching` finds. FormatError: none, or several."""
    files = matching(path, pattern)
    if len(files) != 1:
        names = ", ".join(file.name for file in files[:5])
        raise FormatError(f"{path.name}: {len(files)} files like {pattern}, name one{': ' + names if names else ''}")
    return files[0]


def keys(file: Path) -> frozenset[str]:
    """The names in a safetensors or torch file, none where it cannot be read: what is wrong, the reader will say."""
    try:
        return frozenset(
            safetensors_header(file) if file.suffix == ".safetensors" else state(read_pickle(file, verify=False), "")
        )
    except Exception:
        return frozenset()


def stored(file: Path) -> dict[str, Any]:
    """What a safetensors or torch file holds by name."""
    return read_safetensors(file) if file.suffix == ".safetensors" else state(read_pickle(file), file.name)


def linear(tensors: Mapping[str, Any], file: str, encoder: str = "encoder", decoder: str = "decoder") -> Weights:
    """The weights of two `torch.nn.Linear` of these names: encoder.weight [F, d], decoder.weight [d_out, F]."""
    bias = take(tensors, f"{encoder}.bias", file, (-1,))
    decoder_bias = take(tensors, f"{decoder}.bias", file, (-1,))
    into = take(tensors, f"{encoder}.weight", file, (len(bias), -1))
    out = take(tensors, f"{decoder}.weight", file, (len(decoder_bias), len(bias)))
    return Weights(into, bias, out.T, decoder_bias)


def site(hook: str) -> str:
    """The canonical name of TransformerLens' `blocks.L.NAME`, empty where there is none."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    return f"layers.{int(found[1])}.{HOOKS[found[2]]}" if found and found[2] in HOOKS else ""


def sites(hook: str) -> tuple[str, ...]:
    """The site of a hook point as `Declaration.sites` has it."""
    return (site(hook),) if site(hook) else ()


def setting(settings: Mapping[str, Any], key: str, kind: type, file: str, default: Any = None) -> Any:
    """A setting of a kind, or its default where it is absent. FormatError: absent without a default, another kind."""
    value = settings.get(key, default)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise FormatError(f"{file} {key}: {value!r} is not a {kind.__name__}")
    return value


def positive(settings: Mapping[str, Any], key: str, file: str) -> float:
    """A setting that is a finite number above 0."""
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise FormatError(f"{file} {key}: {value!r} is not a positive number")
    return float(value)


def count(settings: Mapping[str, Any], key: str, most: int, file: str) -> int:
    """A setting that is a whole number from 1 to `most`, such as the k of a TopK."""
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise FormatError(f"{file} {key}: {value!r} is not a number from 1 to {most}")
    return value


def pre_biased(bias: Tensor, encoder: Tensor, taken_off: Tensor) -> Tensor:
    """The encoder's bias [F] once what is taken off its input [d] is folded in; float32."""
    blocks = [rows.float() @ taken_off.float() for rows in encoder.split(BLOCK)]
    return bias.float() - torch.cat(blocks)


def norms(decoder: Tensor) -> Tensor:
    """||decoder row|| [F], float32."""
    return torch.cat([rows.float().norm(dim=1) for rows in decoder.split(BLOCK)])


def gated(threshold: Tensor, norm: Tensor) -> Tensor:
    """The threshold [F] on z that says what `threshold` says on z * norm; a latent without a norm never passes."""
    never = torch.finfo(torch.float32).max
    return torch.where(norm > 0, threshold / norm, never).clamp(max=never)


def rescaled(weights: Weights, norm: Tensor) -> Weights:
    """Latents in units of their decoder norm: what a choice among z * norm needs."""
    rows = norm[:, None]
    decoder = weights.decoder.float() / torch.where(rows > 0, rows, 1.0)
    return Weights(weights.encoder.float() * rows, weights.bias.float() * norm, decoder, weights.decoder_bias)


def input_scaled(weights: Weights, into: float, out: float) -> Weights:
    """Input scale and output scale of a dataset folded in: the encoder reads x * into and the output is y / out."""
    decoder, decoder_bias = weights.decoder.float() / out, weights.decoder_bias.float() / out
    return Weights(weights.encoder.float() * into, weights.bias, decoder, decoder_bias)
