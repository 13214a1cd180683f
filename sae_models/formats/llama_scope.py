"""Llama Scope of 2024 (arXiv 2410.20526), SAEs and transcoders of Llama 3.1 8B: `hyperparams.json` and
`checkpoints/final.safetensors`.

    h = x * sqrt(d) / norm_in      z = h . encoder + bias
    f = z where z * ||decoder row|| > threshold * sqrt(d) / norm_out
    y = (f . decoder + decoder_bias) * norm_out / sqrt(d)

The one threshold is in units of the output and scales with it: over the published layers it varies sevenfold with
norm_out, while threshold * sqrt(d) / norm_out stays near 2, also for the transcoders, whose norm_in and norm_out
differ. The decoder norm in the comparison is the library's `sparsity_include_decoder_norm`.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rudder.sae_models.formats.folding import fold_pre_bias, fold_scales
from rudder.sae_models.formats.layouts import (
    check_finite,
    checkpoint_folder,
    declaration,
    fold_norm_gate,
    linear_layers,
    positive_number,
    zero_bias,
)
from rudder.sae_models.formats.settings import flag, name_of, section
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assemble, read_json, read_safetensors, refuse_unknown
from rudder.sae_models.sae import SAE

SETTINGS = "hyperparams.json"
CHECKPOINT = "checkpoints/final.safetensors"
KEYS = frozenset({"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"})


def recognise(path: Path) -> str | None:
    """Recognise the two files."""
    home = checkpoint_folder(path)
    both = (home / SETTINGS).is_file() and (home / CHECKPOINT).is_file()
    return f"{SETTINGS} and {CHECKPOINT}" if both else None


def read(path: Path) -> tuple[SAE, Declaration]:
    """Read the SAE or transcoder in a folder."""
    home = checkpoint_folder(path)
    settings = read_json(home / SETTINGS)
    check(settings)
    tensors = read_safetensors(home / CHECKPOINT)
    refuse_unknown(tensors, KEYS, CHECKPOINT)
    if not flag(settings, "use_decoder_bias", SETTINGS, True):
        tensors["decoder.bias"] = zero_bias(tensors, "decoder.weight", 0, CHECKPOINT)
    sae = assemble(*linear_layers(tensors, CHECKPOINT))
    folded = ["input_scale"]
    if flag(settings, "apply_decoder_bias_to_pre_encoder", SETTINGS, False):
        sae = fold_pre_bias(sae, sae.decoder_bias)
        folded.append("pre_bias")
    into, out = scales(settings, sae.width)
    sae = replace(
        sae, threshold=torch.full_like(sae.bias, positive_number(settings, "jump_relu_threshold", SETTINGS) * out)
    )
    if flag(settings, "sparsity_include_decoder_norm", SETTINGS, True):
        sae = fold_norm_gate(sae)
        folded.append("decoder_norm")
    return check_finite(fold_scales(sae, into, out), CHECKPOINT), declared(settings, tuple(folded))


def check(settings: Mapping[str, Any]) -> None:
    """Raise FormatError for settings that would change the arithmetic."""
    if (
        settings.get("act_fn", "jumprelu") != "jumprelu"
        or settings.get("norm_activation", "dataset-wise") != "dataset-wise"
    ):
        kind = (settings.get("act_fn"), settings.get("norm_activation"))
        raise FormatError(f"{SETTINGS} act_fn, norm_activation: {kind}, not jumprelu and dataset-wise")
    if settings.get("use_glu_encoder"):
        raise FormatError(f"{SETTINGS} use_glu_encoder: a gated encoder is not linear, it cannot be served")


def scales(settings: Mapping[str, Any], width: int) -> tuple[float, float]:
    """Return sqrt(d) over the dataset's mean norm, at the input and at the output."""
    average = section(settings, "dataset_average_activation_norm", SETTINGS)
    root = math.sqrt(width)
    return root / positive_number(average, "in", SETTINGS), root / positive_number(average, "out", SETTINGS)


def declared(settings: Mapping[str, Any], folded: tuple[str, ...]) -> Declaration:
    """Return the declaration in the settings."""
    hook = name_of(settings, "hook_point_in")
    out = name_of(settings, "hook_point_out") or hook
    architecture = "jumprelu" if hook == out else "jumprelu_transcoder"
    notes = {"normalize_activations": "dataset-wise"}
    return declaration(architecture, hook, out, "meta-llama/Llama-3.1-8B", folded=folded, notes=notes)


FORMAT = Format("llama_scope", recognise, read)
