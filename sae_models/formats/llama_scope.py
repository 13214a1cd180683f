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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rudder.sae_models.formats.folding import fold_pre_bias
from rudder.sae_models.formats.layouts import (
    declaration,
    fold_norm_gate,
    fold_scales,
    folder,
    linear,
    positive,
    whole,
    without_bias,
)
from rudder.sae_models.formats.settings import flag, section, word
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assembled, only, read_json, read_safetensors
from rudder.sae_models.sae import SAE

SETTINGS = "hyperparams.json"
CHECKPOINT = "checkpoints/final.safetensors"
KEYS = frozenset({"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"})


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
    only(found, KEYS, CHECKPOINT)
    if not flag(said, "use_decoder_bias", SETTINGS, True):
        found["decoder.bias"] = without_bias(found, "decoder.weight", 0, CHECKPOINT)
    sae = assembled(*linear(found, CHECKPOINT))
    folded = ["input_scale"]
    if flag(said, "apply_decoder_bias_to_pre_encoder", SETTINGS, False):
        sae = fold_pre_bias(sae, sae.decoder_bias)
        folded.append("pre_bias")
    into, out = scales(said, sae.width)
    sae = replace(sae, threshold=torch.full_like(sae.bias, positive(said, "jump_relu_threshold", SETTINGS) * out))
    if flag(said, "sparsity_include_decoder_norm", SETTINGS, True):
        sae = fold_norm_gate(sae)
        folded.append("decoder_norm")
    return whole(fold_scales(sae, into, out), CHECKPOINT), declared(said, tuple(folded))


def check(said: Mapping[str, Any]) -> None:
    """FormatError of settings that would change the arithmetic."""
    if said.get("act_fn", "jumprelu") != "jumprelu" or said.get("norm_activation", "dataset-wise") != "dataset-wise":
        kind = (said.get("act_fn"), said.get("norm_activation"))
        raise FormatError(f"{SETTINGS} act_fn, norm_activation: {kind}, not jumprelu and dataset-wise")
    if said.get("use_glu_encoder"):
        raise FormatError(f"{SETTINGS} use_glu_encoder: a gated encoder is not linear, it cannot be served")


def scales(said: Mapping[str, Any], width: int) -> tuple[float, float]:
    """sqrt(d) over the dataset's mean norm, at the input and at the output."""
    average = section(said, "dataset_average_activation_norm", SETTINGS)
    root = math.sqrt(width)
    return root / positive(average, "in", SETTINGS), root / positive(average, "out", SETTINGS)


def declared(said: Mapping[str, Any], folded: tuple[str, ...]) -> Declaration:
    """What the settings say."""
    hook = word(said, "hook_point_in")
    out = word(said, "hook_point_out") or hook
    architecture = "jumprelu" if hook == out else "jumprelu_transcoder"
    notes = {"normalize_activations": "dataset-wise"}
    return declaration(architecture, hook, out, "meta-llama/Llama-3.1-8B", folded=folded, notes=notes)


FORMAT = Format("llama_scope", recognise, read)
