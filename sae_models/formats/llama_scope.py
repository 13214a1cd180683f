"""Llama Scope of 2024 (arXiv 2410.20526), SAEs and transcoders of Llama 3.1 8B: `hyperparams.json` and
`checkpoints/final.safetensors`.

    h = x * sqrt(d) / norm_in      z = h . encoder + bias
    f = z where z * ||decoder row|| > threshold * sqrt(d) / norm_out
    y = (f . decoder + decoder_bias) * norm_out / sqrt(d)

The one threshold is in units of the output, so it is scaled as the output is: over the published layers it varies
sevenfold with norm_out, and threshold * sqrt(d) / norm_out stays near 2, also for the transcoders, where norm_in and
norm_out differ. The decoder norm in it is the library's `sparsity_include_decoder_norm`.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sae_models.formats.layouts import (
    Weights,
    gated,
    input_scaled,
    linear,
    norms,
    positive,
    pre_biased,
    setting,
    site,
    sites,
)
from sae_models.formats.source import Declaration, Format, FormatError
from sae_models.formats.tensors import assembled, only, read_json, read_safetensors
from sae_models.sae import SAE

SETTINGS = "hyperparams.json"
CHECKPOINT = "checkpoints/final.safetensors"
KEYS = frozenset({"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"})


def folder(path: Path) -> Path:
    """The SAE's folder: the path, or what is two folders above the checkpoint."""
    return path.parent.parent if path.is_file() else path


def recognise(path: Path) -> str | None:
    """Both files."""
    home = folder(path)
    both = (home / SETTINGS).is_file() and (home / CHECKPOINT).is_file()
    return f"{SETTINGS} and {CHECKPOINT}" if both else None


def read(path: Path) -> tuple[SAE, Declaration]:
    """The SAE or transcoder in a folder."""
    home = folder(path)
    said = read_json(home / SETTINGS)
    check(said)
    found = read_safetensors(home / CHECKPOINT)
    if said.get("use_decoder_bias") is False and "decoder.weight" in found:
        found["decoder.bias"] = torch.zeros(len(found["decoder.weight"]))
    only(found, KEYS, CHECKPOINT)
    weights = linear(found, CHECKPOINT)
    folded = ["input_scale"]
    if setting(said, "apply_decoder_bias_to_pre_encoder", bool, SETTINGS, False):
        weights = weights._replace(bias=pre_biased(weights.bias, weights.encoder, weights.decoder_bias))
        folded.append("pre_bias")
    into, out = scales(said, weights)
    threshold = torch.full_like(weights.bias, positive(said, "jump_relu_threshold", SETTINGS) * out).float()
    if setting(said, "sparsity_include_decoder_norm", bool, SETTINGS, True):
        threshold = gated(threshold, norms(weights.decoder))
        folded.append("decoder_norm")
    return assembled(*input_scaled(weights, into, out), threshold), declared(said, tuple(folded))


def check(said: Mapping[str, Any]) -> None:
    """FormatError of settings that would change the arithmetic."""
    if said.get("act_fn", "jumprelu") != "jumprelu" or said.get("norm_activation", "dataset-wise") != "dataset-wise":
        kind = (said.get("act_fn"), said.get("norm_activation"))
        raise FormatError(f"{SETTINGS} act_fn, norm_activation: {kind}, not jumprelu and dataset-wise")
    if said.get("use_glu_encoder"):
        raise FormatError(f"{SETTINGS} use_glu_encoder: a gated encoder is not linear, it cannot be served")


def scales(said: Mapping[str, Any], weights: Weights) -> tuple[float, float]:
    """sqrt(d) over the dataset's mean norm, at the input and at the output."""
    average = said.get("dataset_average_activation_norm")
    if not isinstance(average, dict):
        raise FormatError(f"{SETTINGS} dataset_average_activation_norm: missing")
    root = math.sqrt(weights.encoder.shape[1])
    return root / positive(average, "in", SETTINGS), root / positive(average, "out", SETTINGS)


def declared(said: Mapping[str, Any], folded: tuple[str, ...]) -> Declaration:
    """What the settings say."""
    hook = setting(said, "hook_point_in", str, SETTINGS)
    out = setting(said, "hook_point_out", str, SETTINGS, hook)
    return Declaration(
        architecture="jumprelu" if hook == out else "jumprelu_transcoder",
        sites=sites(hook),
        output_site=site(out),
        model="meta-llama/Llama-3.1-8B",
        folded=folded,
        notes={"hook": hook, "hook_out": out},
    )


FORMAT = Format("llama_scope", recognise, read)
