"""EleutherAI sparsify: a folder named by its hookpoint, with cfg.json and sae.safetensors.

encoder.weight (F, d), encoder.bias (F), W_dec (F, d), b_dec (d), W_skip (d, d) with `skip_connection`. b_dec is
subtracted from the input unless `transcode`. The selection is the k largest of relu(z) (`topk`) or the largest of each
of k groups (`groupmax`). Very old files may be `signed`: the k of largest magnitude, with their signs.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rudder.sae_models.formats import folding, sites
from rudder.sae_models.formats.folder import CONFIG, folder_of, recognise_folder, write_folder
from rudder.sae_models.formats.settings import choice, count, flag, name_of
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assemble, orient, read_json, read_safetensors, refuse_unknown, take
from rudder.sae_models.sae import SAE, GroupMax, Normalisation, TopK

WEIGHTS = "sae.safetensors"
# Settings of the training run, beside the folders of its hookpoints.
RUN = "config.json"
TENSORS = ("encoder.weight", "encoder.bias", "W_dec", "b_dec", "W_skip")
# Tolerance within which decoder rows count as unit norm.
UNIT_TOLERANCE = 1e-3


def recognise(path: Path) -> str | None:
    """Recognise the two files."""
    return recognise_folder(path, WEIGHTS)


def read(path: Path) -> tuple[SAE, Declaration]:
    """Read the SAE or transcoder, and the declaration in its settings. FormatError: the file and the field."""
    folder = folder_of(path, WEIGHTS)
    settings = read_json(folder / CONFIG)
    sae = assemble_weights(folder, settings)
    transcodes = flag(settings, "transcode", CONFIG, default=False)
    if not transcodes:
        sae = folding.fold_pre_bias(sae, sae.decoder_bias)
    k, notes = count(settings, "k", CONFIG, maximum=sae.latents), {}
    if flag(settings, "signed", CONFIG, default=False):
        notes["signs"] = f"latent {sae.latents} + i is the negative part of latent i"
        sae = folding.fold_signs(sae)
    activation = choice(settings, "activation", CONFIG, ("topk", "groupmax"))
    if activation == "groupmax" and sae.latents % k:
        raise FormatError(f"{CONFIG} k: {k} groups of {sae.latents} latents are not of one size")
    sae = replace(sae, selection=GroupMax(k) if activation == "groupmax" else TopK(k))
    return sae, declaration(folder, activation, transcodes, k, notes)


def assemble_weights(folder: Path, settings: Mapping[str, Any]) -> SAE:
    """Return the weights without folding and without a selection."""
    d = count(settings, "d_in", CONFIG)
    latents = settings.get("num_latents") or d * count(settings, "expansion_factor", CONFIG)
    tensors = read_safetensors(folder / WEIGHTS)
    refuse_unknown(tensors, TENSORS, WEIGHTS)
    bias = take(tensors, "encoder.bias", WEIGHTS, (latents,))
    encoder = orient(take(tensors, "encoder.weight", WEIGHTS), latents, d, f"{WEIGHTS} encoder.weight")
    decoder = orient(take(tensors, "W_dec", WEIGHTS), latents, d, f"{WEIGHTS} W_dec")
    skips = flag(settings, "skip_connection", CONFIG, default="W_skip" in tensors)
    skip = take(tensors, "W_skip", WEIGHTS, (d, d)).T if skips else None
    return assemble(encoder, bias, decoder, take(tensors, "b_dec", WEIGHTS, (d,)), skip=skip)


def declaration(folder: Path, activation: str, transcodes: bool, k: int, notes: dict[str, Any]) -> Declaration:
    """Return the declaration in the folder's name and the run's settings beside it.

    A transcoder's folder is named after the module that it replaces.
    """
    seeded = re.fullmatch(r"seed\d+", folder.name)
    hookpoint = folder.parent if seeded else folder
    run = read_json(hookpoint.parent / RUN) if (hookpoint.parent / RUN).is_file() else {}
    model, name = name_of(run, "model"), hookpoint.name
    notes |= {key: run[key] for key in ("dataset", "ctx_len", "revision") if run.get(key) is not None}
    site, why = sites.canonical(f"{name}.input" if transcodes else name, model)
    output_site, other = sites.canonical(name, model) if transcodes else ("", "")
    if why or other:
        notes["site"] = why or other
    architecture = f"{activation} transcoder" if transcodes else activation
    folded = () if transcodes else ("pre_bias",)
    return Declaration(architecture, (site,) if site else (), output_site, model, folded, float(k), notes)


def write(path: Path, sae: SAE, declared: Declaration) -> None:
    """Write a folder that sparsify loads, in float32, because it loads all tensors with one dtype.

    The folder's name should be sparsify's hookpoint. FormatError: the part that sparsify cannot represent.
    """
    check(sae, declared)
    transcodes = bool(declared.output_site) or sae.skip is not None
    bias = sae.bias if transcodes else folding.fold_pre_bias(sae, -sae.decoder_bias).bias
    tensors = {"encoder.weight": sae.encoder, "encoder.bias": bias, "W_dec": sae.decoder, "b_dec": sae.decoder_bias}
    if sae.skip is not None:
        tensors["W_skip"] = sae.skip.T
    norm = torch.linalg.vector_norm(sae.decoder, dim=1, dtype=torch.float32)
    grouped = isinstance(sae.selection, GroupMax)
    config = {
        "activation": "groupmax" if grouped else "topk",
        "expansion_factor": max(1, sae.latents // sae.width),
        "normalize_decoder": bool((norm - 1).abs().max() < UNIT_TOLERANCE),
        "num_latents": sae.latents,
        "k": sae.selection.k if isinstance(sae.selection, TopK | GroupMax) else None,
        "multi_topk": False,
        "skip_connection": sae.skip is not None,
        "transcode": transcodes,
        "d_in": sae.width,
    }
    write_folder(path, config, WEIGHTS, {key: tensor.float() for key, tensor in tensors.items()})


def check(sae: SAE, declared: Declaration) -> None:
    """Raise FormatError for the part of an SAE that sparsify cannot represent."""
    if not isinstance(sae.selection, TopK | GroupMax):
        raise FormatError(f"selection: sparsify keeps k latents, the {declared.architecture} SAE has no such k")
    if bool((sae.threshold > 0).any()):
        raise FormatError("threshold: sparsify holds none")
    if sae.normalisation is not Normalisation.NONE:
        raise FormatError(f"normalisation: sparsify has none, the SAE has {sae.normalisation}")
    if sae.decoder.shape[1] != sae.width:
        raise FormatError(f"decoder: sparsify writes as many dimensions as it reads, not {sae.decoder.shape[1]}")
    if sae.router is not None:
        raise FormatError("router: sparsify has no SAE that chooses among sites")
    if sae.partial:
        raise FormatError("partial: sparsify takes the decoder for a whole one")


FORMAT = Format("sparsify", recognise, read)
