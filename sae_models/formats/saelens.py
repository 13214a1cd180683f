"""SAELens: a folder with cfg.json and sae_weights.safetensors, current (6.x) and earlier.

W_enc (d, F), b_enc (F), W_dec (F, d_out), b_dec (d_out); jumprelu: threshold (F); gated: b_gate, b_mag, r_mag (F) in
place of b_enc; skip transcoders: W_skip (d_out, d). The input is normalised, then b_dec is taken off where
`apply_b_dec_to_input` says so; for transcoders it never is.

Before 6.0 the settings are flat and have other names: `hook_point` for `hook_name`, `activation_fn_str` for
`activation_fn`, and a topk SAE is a standard one with the activation function topk.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rudder.sae_models.formats import folding, sites
from rudder.sae_models.formats.folder import CONFIG, home, recognised, write_folder
from rudder.sae_models.formats.settings import choice, count, flag, section, word
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assembled, only, oriented, read_json, read_safetensors, take
from rudder.sae_models.sae import SAE, Normalisation, TopK

WEIGHTS, SPARSITY = "sae_weights.safetensors", "sparsity.safetensors"
# Checkpoints of a training run have these beside them: statistics that it folds into the weights at its end.
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
    # Training checkpoints: for inference SAELens saves them as jumprelu.
    "batchtopk": MATRICES | {"b_enc", "topk_threshold"},
    "matryoshka_batchtopk": MATRICES | {"b_enc", "topk_threshold"},
}
FINETUNING = ("scaling_factor", "finetuning_scaling_factor")
REFUSED = {
    "temporal": "its latents depend on earlier tokens through attention",
    "matching_pursuit": "it takes latents one after another, each from what the last has left of the input",
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


class Checkpoint(NamedTuple):
    """A folder's content: settings flat and by their current names, tensors as they are stored."""

    folder: Path
    architecture: str
    settings: dict[str, Any]
    tensors: dict[str, Tensor]


def recognise(path: Path) -> str | None:
    """Why a path holds this format, or None."""
    return recognised(path, WEIGHTS)


def read(path: Path) -> tuple[SAE, Declaration]:
    """The SAE in canonical form, and what cfg.json says of it. FormatError: the file and the field."""
    folder = home(path, WEIGHTS)
    settings = current(read_json(folder / CONFIG))
    architecture = architecture_of(settings)
    file = Checkpoint(folder, architecture, settings, read_safetensors(folder / WEIGHTS))
    only(file.tensors, TENSORS[architecture].union(FINETUNING), WEIGHTS)
    notes = {key: settings[key] for key in NOTED if settings.get(key) is not None}
    sae, folded = folded_in(stored(file), file, notes)
    if (folder / SPARSITY).is_file():
        notes["log10_frequency"] = take(read_safetensors(folder / SPARSITY), "sparsity", SPARSITY, (sae.latents,))
    sae = selected(sae, file, notes)
    return sae, declaration(sae, file, folded, notes)


def current(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, flat, by their current names."""
    settings = section(config, "metadata", CONFIG) | dict(config)
    for old, new in (("hook_point", "hook_name"), ("hook_point_head_index", "hook_head_index")):
        if settings.get(new) is None:
            settings[new] = settings.get(old)
    if "activation_fn" not in settings:
        settings["activation_fn"] = settings.get("activation_fn_str", "relu")
    found = settings.get("normalize_activations")
    if found is None or isinstance(found, bool):
        settings["normalize_activations"] = "expected_average_only_in" if found else "none"
    return settings


def architecture_of(settings: Mapping[str, Any]) -> str:
    """The architecture by its current name; FormatError where it cannot be served."""
    architecture = choice(settings, "architecture", CONFIG, (*TENSORS, *REFUSED))
    if architecture in REFUSED:
        raise FormatError(f"{CONFIG} architecture: {architecture} cannot be served per token: {REFUSED[architecture]}")
    activation = choice(settings, "activation_fn", CONFIG, ("relu", "topk"))
    if architecture == "standard" and activation == "topk":
        return "topk"
    return architecture


def stored(file: Checkpoint) -> SAE:
    """The weights as they are, nothing folded in, and no selection."""
    _, architecture, settings, tensors = file
    d, latents = count(settings, "d_in", CONFIG), count(settings, "d_sae", CONFIG)
    d_out = count(settings, "d_out", CONFIG) if "transcoder" in architecture else d
    encoder = oriented(take(tensors, "W_enc", WEIGHTS), latents, d, f"{WEIGHTS} W_enc")
    decoder = oriented(take(tensors, "W_dec", WEIGHTS), latents, d_out, f"{WEIGHTS} W_dec")
    bias = take(tensors, "b_mag" if architecture == "gated" else "b_enc", WEIGHTS, (latents,))
    skip = take(tensors, "W_skip", WEIGHTS, (d_out, d)).T if "skip" in architecture else None
    normalisation = NORMALISATIONS[choice(settings, "normalize_activations", CONFIG, tuple(NORMALISATIONS))]
    if normalisation is not Normalisation.NONE and "transcoder" in architecture:
        raise FormatError(f"{CONFIG} normalize_activations: {normalisation} of a transcoder, whose output it leaves so")
    decoder_bias, threshold = take(tensors, "b_dec", WEIGHTS, (d_out,)), threshold_of(file, decoder)
    return assembled(encoder, bias, decoder, decoder_bias, threshold, skip=skip, normalisation=normalisation)


def threshold_of(file: Checkpoint, decoder: Tensor) -> Tensor | float:
    """Of z: [F], or one for all."""
    if "jumprelu" in file.architecture:
        if "log_threshold" in file.tensors:
            return take(file.tensors, "log_threshold", WEIGHTS, (len(decoder),)).float().exp()
        return take(file.tensors, "threshold", WEIGHTS, (len(decoder),))
    if "batchtopk" not in file.architecture:
        return 0.0
    threshold = take(file.tensors, "topk_threshold", WEIGHTS, ()).float()
    # In units of z times the decoder's norm, where z is rescaled by it.
    norm = torch.linalg.vector_norm(decoder, dim=1, dtype=torch.float32).clamp(min=1e-8)
    return threshold / norm if rescaled(file) else threshold


def rescaled(file: Checkpoint) -> bool:
    """Whether z is multiplied by the norm of the latent's decoder row before the largest are taken."""
    return "topk" in file.architecture and flag(file.settings, "rescale_acts_by_decoder_norm", CONFIG, default=False)


def folded_in(sae: SAE, file: Checkpoint, notes: dict[str, Any]) -> tuple[SAE, tuple[str, ...]]:
    """The SAE with everything around its weights folded into them, and what that was."""
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
    if rescaled(file):
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
    """What inputs are multiplied by, where it is beside the weights. SAELens keeps it in its directory of releases, and
    takes 1 where it does not know it.
    """
    if not (file.folder / SCALER).is_file():
        notes["input_scale"] = f"not in the files, taken as 1: {SCALER} with its `scaling_factor` would tell"
        return None
    scale = read_json(file.folder / SCALER).get("scaling_factor")
    if not isinstance(scale, float | int) or not 0 < scale < float("inf"):
        raise FormatError(f"{SCALER} scaling_factor: {scale!r}, not a positive number")
    return float(scale)


def whitening(file: Checkpoint, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """mean [d], matrix and inverse [d, d] of the whitening of inputs."""
    if not (file.folder / WHITENING).is_file():
        raise FormatError(f"{CONFIG} normalize_activations: covariance_whitening without {WHITENING}")
    tensors = read_safetensors(file.folder / WHITENING)
    mean = take(tensors, "mean", WHITENING, (d,)).float()
    matrix, inverse = (take(tensors, key, WHITENING, (d, d)).float() for key in ("matrix", "inverse_matrix"))
    return mean, matrix, inverse


def finetuning_factor(file: Checkpoint) -> Tensor | None:
    """What multiplies activations [F] on their way to the decoder, where that is not 1."""
    found = [take(file.tensors, key, WEIGHTS).float() for key in FINETUNING if key in file.tensors]
    if not found or torch.allclose(found[0], torch.ones(())):
        return None
    if found[0].shape != (file.settings["d_sae"],):
        raise FormatError(f"{WEIGHTS} scaling_factor: shape {tuple(found[0].shape)} instead of one for each latent")
    return found[0]


def selected(sae: SAE, file: Checkpoint, notes: dict[str, Any]) -> SAE:
    """The SAE with its choice of the k largest, where it has one."""
    if file.architecture not in ("topk", "abstopk"):
        return sae
    where = file.settings if "k" in file.settings else section(file.settings, "activation_fn_kwargs", CONFIG)
    k = count(where, "k", CONFIG, most=sae.latents)
    if file.architecture == "abstopk":
        notes["signs"] = f"latent {sae.latents} + i is the negative part of latent i"
        sae = folding.fold_signs(sae)
    return replace(sae, selection=TopK(k))


def declaration(sae: SAE, file: Checkpoint, folded: tuple[str, ...], notes: dict[str, Any]) -> Declaration:
    """What the settings say beside the weights."""
    settings, model, output_site = file.settings, word(file.settings, "model_name"), ""
    site, why = sites.canonical(word(settings, "hook_name"), model)
    if settings.get("hook_head_index") is not None:
        site, why = "", f"head {settings['hook_head_index']} of {word(settings, 'hook_name')}, no site here"
    if "transcoder" in file.architecture:
        output_site, other = sites.canonical(word(settings, "hook_name_out"), model)
        why = why or other
    if why:
        notes["site"] = why
    l0 = float(sae.selection.k) if isinstance(sae.selection, TopK) else None
    return Declaration(file.architecture, (site,) if site else (), output_site, model, folded, l0, notes)


def write(path: Path, sae: SAE, declared: Declaration) -> None:
    """Writes a folder that SAELens 6 loads. FormatError names the part that SAELens cannot hold.

    Matrices keep their dtype; SAELens computes in float32. A pre-bias stays folded into the bias.
    """
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
        "metadata": metadata(declared),
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
    """The architecture of SAELens that an SAE is; FormatError where none is."""
    if sae.router is not None:
        raise FormatError("router: SAELens has no SAE that chooses among sites")
    if sae.partial:
        raise FormatError("partial: SAELens takes the decoder for a whole one")
    if sae.selection is not None and not isinstance(sae.selection, TopK):
        raise FormatError(f"selection: SAELens has no {type(sae.selection).__name__}")
    jumps = bool((sae.threshold > 0).any())
    transcodes = sae.skip is not None or sae.decoder.shape[1] != sae.width or bool(declared.output_site)
    if transcodes and sae.normalisation is not Normalisation.NONE:
        raise FormatError(f"normalisation: SAELens leaves a transcoder's output as {sae.normalisation} made it")
    if sae.selection is not None:
        if jumps or transcodes:
            raise FormatError("selection: SAELens has no topk with thresholds, nor of a transcoder")
        return "topk"
    if not transcodes:
        return "jumprelu" if jumps else "standard"
    return "jumprelu_" * jumps + "skip_" * (sae.skip is not None) + "transcoder"


def metadata(declared: Declaration) -> dict[str, Any]:
    """SAELens' own words for what is declared."""
    named = {
        "sae_lens_version": VERSION,
        "model_name": declared.model,
        "hook_name": sites.transformer_lens(declared.sites[0]) if declared.sites else "",
        "hook_name_out": sites.transformer_lens(declared.output_site),
    }
    return {key: value for key, value in named.items() if value}


FORMAT = Format("saelens", recognise, read)
