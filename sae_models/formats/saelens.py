"""SAELens: a folder with cfg.json and sae_weights.safetensors, of versions 6.x and earlier.

W_enc (d, F), b_enc (F), W_dec (F, d_out), b_dec (d_out); jumprelu: threshold (F); gated: b_gate, b_mag, r_mag (F) in
place of b_enc; skip transcoders: W_skip (d_out, d). The input is normalised; then b_dec is subtracted if
`apply_b_dec_to_input` is set, but never for transcoders.

Before 6.0 the settings are flat and have other names: `hook_point` for `hook_name`, `activation_fn_str` for
`activation_fn`, and a topk SAE is a standard one with the activation function topk.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rudder.sae_models.formats import centring, folding, sites
from rudder.sae_models.formats.folder import CONFIG, folder_of, recognise_folder, write_folder
from rudder.sae_models.formats.settings import choice, count, flag, name_of, section
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assemble, orient, read_json, read_safetensors, refuse_unknown, take
from rudder.sae_models.sae import SAE, Normalisation, TopK

WEIGHTS, SPARSITY = "sae_weights.safetensors", "sparsity.safetensors"
# Statistics beside the checkpoints of a training run, which folds them into the weights at its end.
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
VERSION = "6.54.12"

MATRICES = frozenset({"W_enc", "W_dec", "b_dec"})
TENSORS = {
    "standard": MATRICES | {"b_enc"},
    "jumprelu": MATRICES | {"b_enc", "threshold", "log_threshold"},
    "topk": MATRICES | {"b_enc"},
    "abstopk": MATRICES | {"b_enc"},
    "gated": MATRICES | {"b_gate", "b_mag", "r_mag"},
    "transcoder": MATRICES | {"b_enc"},
    "skip_transcoder": MATRICES | {"b_enc", "W_skip"},
    "jumprelu_transcoder": MATRICES | {"b_enc", "threshold"},
    "jumprelu_skip_transcoder": MATRICES | {"b_enc", "threshold", "W_skip"},
    # Checkpoints during training; for inference SAELens saves these as jumprelu.
    "batchtopk": MATRICES | {"b_enc", "topk_threshold"},
    "matryoshka_batchtopk": MATRICES | {"b_enc", "topk_threshold"},
}
FINETUNING = ("scaling_factor", "finetuning_scaling_factor")
REFUSED = {
    "temporal": "its latents depend on earlier tokens through attention",
    "matching_pursuit": "it selects latents one after another, each from the residual of the last",
}
NORMALISATIONS = {
    "none": Normalisation.NONE,
    "constant_norm_rescale": Normalisation.CONSTANT_NORM,
    "layer_norm": Normalisation.LAYER_NORM,
    "expected_average_only_in": Normalisation.NONE,
    "covariance_whitening": Normalisation.NONE,
}
NOTED = (
    "hook_name", "hook_name_out", "hook_head_index", "hf_hook_name", "hf_hook_name_out", "prepend_bos", "context_size",
    "dataset_path", "exclude_special_tokens", "seqpos_slice", "model_class_name", "model_from_pretrained_kwargs",
    "neuronpedia_id", "sae_lens_version", "sae_lens_training_version", "training_architecture", "reshape_activations",
    "normalize_activations",
)  # fmt: skip


NO_OVERRIDES: Mapping[str, Any] = {}


class Checkpoint(NamedTuple):
    """The content of a folder: flat settings by their current_settings names, tensors as assemble_weights."""

    folder: Path
    architecture: str
    settings: dict[str, Any]
    tensors: dict[str, Tensor]


def recognise(path: Path) -> str | None:
    """Recognise the two files."""
    return recognise_folder(path, WEIGHTS)


def read(path: Path, overrides: Mapping[str, Any] = NO_OVERRIDES) -> tuple[SAE, Declaration]:
    """Read the SAE, and the declaration in cfg.json, in which `overrides` replace settings. FormatError: the file and
    the field.
    """
    folder = folder_of(path, WEIGHTS)
    settings = current_settings({**read_json(folder / CONFIG), **overrides})
    architecture = architecture_of(settings)
    file = Checkpoint(folder, architecture, settings, read_safetensors(folder / WEIGHTS))
    refuse_unknown(file.tensors, TENSORS[architecture].union(FINETUNING), WEIGHTS)
    notes = {key: settings[key] for key in NOTED if settings.get(key) is not None}
    sae, folded = fold_around(assemble_weights(file), file, notes)
    if (folder / SPARSITY).is_file():
        notes["log10_frequency"] = take(read_safetensors(folder / SPARSITY), "sparsity", SPARSITY, (sae.latents,))
    sae = with_selection(sae, file, notes)
    return centring.fold_declared_centring(sae, declaration(sae, file, folded, notes))


def current_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat settings by their current_settings names."""
    settings = section(config, "metadata", CONFIG) | dict(config)
    for old, new in (("hook_point", "hook_name"), ("hook_point_head_index", "hook_head_index")):
        if settings.get(new) is None:
            settings[new] = settings.get(old)
    if "activation_fn" not in settings:
        settings["activation_fn"] = settings.get("activation_fn_str", "relu")
    normalise = settings.get("normalize_activations")
    if normalise is None or isinstance(normalise, bool):
        settings["normalize_activations"] = "expected_average_only_in" if normalise else "none"
    return settings


def architecture_of(settings: Mapping[str, Any]) -> str:
    """Return the architecture by its current_settings name. FormatError: it cannot be served."""
    architecture = choice(settings, "architecture", CONFIG, (*TENSORS, *REFUSED))
    if architecture in REFUSED:
        raise FormatError(f"{CONFIG} architecture: {architecture} cannot be served per token: {REFUSED[architecture]}")
    activation = choice(settings, "activation_fn", CONFIG, ("relu", "topk"))
    if architecture == "standard" and activation == "topk":
        return "topk"
    return architecture


def assemble_weights(file: Checkpoint) -> SAE:
    """Return the weights without folding and without a selection."""
    _, architecture, settings, tensors = file
    d, latents = count(settings, "d_in", CONFIG), count(settings, "d_sae", CONFIG)
    d_out = count(settings, "d_out", CONFIG) if "transcoder" in architecture else d
    encoder = orient(take(tensors, "W_enc", WEIGHTS), latents, d, f"{WEIGHTS} W_enc")
    decoder = orient(take(tensors, "W_dec", WEIGHTS), latents, d_out, f"{WEIGHTS} W_dec")
    bias = take(tensors, "b_mag" if architecture == "gated" else "b_enc", WEIGHTS, (latents,))
    skip = take(tensors, "W_skip", WEIGHTS, (d_out, d)).T if "skip" in architecture else None
    normalisation = NORMALISATIONS[choice(settings, "normalize_activations", CONFIG, tuple(NORMALISATIONS))]
    if normalisation is not Normalisation.NONE and "transcoder" in architecture:
        raise FormatError(
            f"{CONFIG} normalize_activations: {normalisation} of a transcoder, whose output is not denormalised"
        )
    decoder_bias, threshold = take(tensors, "b_dec", WEIGHTS, (d_out,)), threshold_of(file, decoder)
    return assemble(encoder, bias, decoder, decoder_bias, threshold, skip=skip, normalisation=normalisation)


def threshold_of(file: Checkpoint, decoder: Tensor) -> Tensor | float:
    """Return the thresholds of z: [F], or one for all latents."""
    if "jumprelu" in file.architecture:
        if "log_threshold" in file.tensors:
            return take(file.tensors, "log_threshold", WEIGHTS, (len(decoder),)).float().exp()
        return take(file.tensors, "threshold", WEIGHTS, (len(decoder),))
    if "batchtopk" not in file.architecture:
        return 0.0
    threshold = take(file.tensors, "topk_threshold", WEIGHTS, ()).float()
    # The assemble_weights threshold applies to z times the decoder's norm if `rescale_acts_by_decoder_norm` is set.
    norm = torch.linalg.vector_norm(decoder, dim=1, dtype=torch.float32).clamp(min=1e-8)
    return threshold / norm if rescales_by_decoder_norm(file) else threshold


def rescales_by_decoder_norm(file: Checkpoint) -> bool:
    """Return whether z is multiplied by the norm of the latent's decoder row before the selection."""
    return "topk" in file.architecture and flag(file.settings, "rescale_acts_by_decoder_norm", CONFIG, default=False)


def fold_around(sae: SAE, file: Checkpoint, notes: dict[str, Any]) -> tuple[SAE, tuple[str, ...]]:
    """Fold everything around the weights into them; return the SAE and the names of what was folded."""
    normalised, folded = file.settings["normalize_activations"], []
    if file.architecture == "gated":
        sae = folding.fold_gate(sae, *(take(file.tensors, key, WEIGHTS, (sae.latents,)) for key in ("b_gate", "r_mag")))
        folded.append("gate")
    if "transcoder" not in file.architecture and flag(file.settings, "apply_b_dec_to_input", CONFIG, default=True):
        sae = folding.fold_pre_bias(sae, sae.decoder_bias)
        folded.append("pre_bias")
    if normalised == "expected_average_only_in" and (scale := input_scale(file, notes)):
        sae = folding.fold_input_scale(sae, scale)
        folded.append("input_scale")
    if rescales_by_decoder_norm(file):
        sae = folding.fold_decoder_norm(sae)
        folded.append("decoder_norm")
    if normalised == "covariance_whitening":
        sae = folding.fold_whitening(sae, *whitening(file, sae.width))
        folded.append("input_scale")
    if (factor := finetuning_factor(file)) is not None:
        sae = replace(sae, decoder=folding.scaled(sae.decoder, factor[:, None]))
        notes["finetuning_scaling_factor"] = "folded into the decoder"
    return sae, tuple(folded)


def input_scale(file: Checkpoint, notes: dict[str, Any]) -> float | None:
    """Return the factor that multiplies inputs if it is beside the weights; else None, with a note.

    SAELens stores it in its table of releases and assumes 1 if it is not there.
    """
    if not (file.folder / SCALER).is_file():
        notes["input_scale"] = f"not in the files, taken as 1: {SCALER} with its `scaling_factor` is missing"
        return None
    scale = read_json(file.folder / SCALER).get("scaling_factor")
    if not isinstance(scale, float | int) or not 0 < scale < float("inf"):
        raise FormatError(f"{SCALER} scaling_factor: {scale!r}, not a positive number")
    return float(scale)


def whitening(file: Checkpoint, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Read mean [d], matrix and inverse [d, d] of the whitening of inputs."""
    if not (file.folder / WHITENING).is_file():
        raise FormatError(f"{CONFIG} normalize_activations: covariance_whitening without {WHITENING}")
    tensors = read_safetensors(file.folder / WHITENING)
    mean = take(tensors, "mean", WHITENING, (d,)).float()
    matrix, inverse = (take(tensors, key, WHITENING, (d, d)).float() for key in ("matrix", "inverse_matrix"))
    return mean, matrix, inverse


def finetuning_factor(file: Checkpoint) -> Tensor | None:
    """Return the factors [F] that multiply activations before the decoder, or None if all are 1."""
    key = next((key for key in FINETUNING if key in file.tensors), None)
    factor = None if key is None else take(file.tensors, key, WEIGHTS).float()
    if factor is None or torch.allclose(factor, torch.ones(())):
        return None
    if factor.shape != (file.settings["d_sae"],):
        raise FormatError(f"{WEIGHTS} scaling_factor: shape {tuple(factor.shape)} instead of one for each latent")
    return factor


def with_selection(sae: SAE, file: Checkpoint, notes: dict[str, Any]) -> SAE:
    """Return the SAE with its top-k selection, if it has one."""
    if file.architecture not in ("topk", "abstopk"):
        return sae
    where = file.settings if "k" in file.settings else section(file.settings, "activation_fn_kwargs", CONFIG)
    k = count(where, "k", CONFIG, maximum=sae.latents)
    if file.architecture == "abstopk":
        notes["signs"] = f"latent {sae.latents} + i is the negative part of latent i"
        sae = folding.fold_signs(sae)
    return replace(sae, selection=TopK(k))


def declaration(sae: SAE, file: Checkpoint, folded: tuple[str, ...], notes: dict[str, Any]) -> Declaration:
    """Return the declaration in the settings."""
    settings, model, output_site = file.settings, name_of(file.settings, "model_name"), ""
    site, why = sites.canonical(name_of(settings, "hook_name"), model)
    if settings.get("hook_head_index") is not None:
        site, why = "", f"head {settings['hook_head_index']} of {name_of(settings, 'hook_name')}, no site here"
    if "transcoder" in file.architecture:
        output_site, other = sites.canonical(name_of(settings, "hook_name_out"), model)
        why = why or other
    if why:
        notes["site"] = why
    l0 = float(sae.selection.k) if isinstance(sae.selection, TopK) else None
    return Declaration(file.architecture, (site,) if site else (), output_site, model, folded, l0, notes)


def write(path: Path, sae: SAE, declared: Declaration) -> None:
    """Write a folder that SAELens 6 loads. FormatError: the part that SAELens cannot represent.

    Matrices keep their dtype; SAELens computes in float32. A pre-bias remains folded into the bias.
    """
    centred = folding.is_centred(sae)
    # SAELens centres the model instead, and reads x - mean(x): an encoder whose rows have mean 0 does not tell the two.
    sae = replace(sae, skip=None) if centred else sae
    architecture = architecture_for(sae, declared)
    tensors = {"W_enc": sae.encoder.T, "b_enc": sae.bias, "W_dec": sae.decoder, "b_dec": sae.decoder_bias}
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.width,
        "d_sae": sae.latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": next(name for name, value in NORMALISATIONS.items() if value is sae.normalisation),
        "reshape_activations": "none",
        "metadata": metadata(declared) | ({centring.OPTIONS: {centring.CENTRING: True}} if centred else {}),
    }
    if "transcoder" in architecture:
        config["d_out"] = sae.decoder.shape[1]
    if isinstance(sae.selection, TopK):
        config |= {"k": sae.selection.k, "rescale_acts_by_decoder_norm": False}
    if "jumprelu" in architecture:
        tensors["threshold"] = sae.threshold
    if sae.skip is not None:
        tensors["W_skip"] = sae.skip.T
    write_folder(path, config, WEIGHTS, tensors)


def architecture_for(sae: SAE, declared: Declaration) -> str:
    """Return SAELens' architecture for an SAE. FormatError: it has none."""
    if sae.router is not None:
        raise FormatError("router: SAELens has no SAE that chooses among sites")
    if sae.partial:
        raise FormatError("partial: SAELens takes the decoder for a whole one")
    if sae.selection is not None and not isinstance(sae.selection, TopK):
        raise FormatError(f"selection: SAELens has no {type(sae.selection).__name__}")
    jumps = bool((sae.threshold > 0).any())
    transcodes = sae.skip is not None or sae.decoder.shape[1] != sae.width or bool(declared.output_site)
    if transcodes and sae.normalisation is not Normalisation.NONE:
        raise FormatError(f"normalisation: SAELens does not denormalise a transcoder's output ({sae.normalisation})")
    if sae.selection is not None:
        if jumps or transcodes:
            raise FormatError("selection: SAELens has no topk with thresholds, nor of a transcoder")
        return "topk"
    if not transcodes:
        return "jumprelu" if jumps else "standard"
    return "jumprelu_" * jumps + "skip_" * (sae.skip is not None) + "transcoder"


def metadata(declared: Declaration) -> dict[str, Any]:
    """Return a declaration as SAELens' metadata."""
    named = {
        "sae_lens_version": VERSION,
        "model_name": declared.model,
        "hook_name": sites.transformer_lens(declared.sites[0]) if declared.sites else "",
        "hook_name_out": sites.transformer_lens(declared.output_site),
    }
    return {key: value for key, value in named.items() if value}


FORMAT = Format("saelens", recognise, read)
