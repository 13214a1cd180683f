"""dictionary_learning: a folder with ae.pt, a state dict, and config.json, whose `trainer` names the class.

The names of the weights depend on the class, see LAYOUTS. Matrices are either those of linear layers, (F, d) and
(d, F), or W_enc (d, F) and W_dec (F, d). Trainers that normalise their inputs rescale biases and thresholds before
saving, so the SAE reads unnormalised activations.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rudder.sae_models.formats import folding, sites
from rudder.sae_models.formats.folder import folder_of
from rudder.sae_models.formats.settings import count, name_of, section
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assemble, orient, read_json, read_pickle, refuse_unknown, state_dict, take
from rudder.sae_models.sae import SAE, TopK

CONFIG, WEIGHTS, ADAPTIVE = "config.json", "ae.pt", "dynamic_config.json"


class Layout(NamedTuple):
    """The names of a class's weights, and whether it subtracts its decoder bias from its input."""

    encoder: str
    bias: str
    decoder: str
    decoder_bias: str
    pre_bias: bool
    others: tuple[str, ...] = ()


LAYOUTS = {
    "AutoEncoder": Layout("encoder.weight", "encoder.bias", "decoder.weight", "bias", True),
    "AutoEncoderNew": Layout("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias", False),
    "GatedAutoEncoder": Layout(
        "encoder.weight", "mag_bias", "decoder.weight", "decoder_bias", True, ("gate_bias", "r_mag")
    ),
    "AutoEncoderTopK": Layout("encoder.weight", "encoder.bias", "decoder.weight", "b_dec", True, ("k", "threshold")),
    "BatchTopKSAE": Layout("encoder.weight", "encoder.bias", "decoder.weight", "b_dec", True, ("k", "threshold")),
    "MatryoshkaBatchTopKSAE": Layout("W_enc", "b_enc", "W_dec", "b_dec", True, ("k", "threshold", "group_sizes")),
    "JumpReluAutoEncoder": Layout("W_enc", "b_enc", "W_dec", "b_dec", False, ("threshold",)),
}
REFUSED = {
    "IdentityDict": "it is the identity, without weights",
    "CrossCoder": "it reads several models or layers at once",
    "BatchTopKCrossCoder": "it reads several models or layers at once",
}


def recognise(path: Path) -> str | None:
    """Recognise the two files."""
    folder = folder_of(path, WEIGHTS)
    # AdaptiveK writes files of these two names and a third.
    matches = all((folder / name).is_file() for name in (CONFIG, WEIGHTS)) and not (folder / ADAPTIVE).exists()
    return f"{WEIGHTS} beside {CONFIG}" if matches else None


def read(path: Path) -> tuple[SAE, Declaration]:
    """Read the SAE as the library itself loads it, and the declaration in config.json. FormatError: file and field."""
    folder = folder_of(path, WEIGHTS)
    config = read_json(folder / CONFIG)
    trainer = section(config, "trainer", CONFIG)
    kind = class_of(trainer)
    layout, tensors = LAYOUTS[kind], state_dict(read_pickle(folder / WEIGHTS), WEIGHTS)
    refuse_unknown(tensors, (*layout[:4], *layout.others), WEIGHTS)
    sae, notes = assemble_weights(layout, tensors, trainer), dict[str, Any]()
    sae, folded = fold_around(sae, kind, tensors)
    if "TopK" in kind:
        sae = with_selection(sae, kind, tensors, trainer, notes)
    return sae, declaration(kind, config, folded, notes)


def class_of(trainer: Mapping[str, Any]) -> str:
    """Return the name of the class. FormatError: the class is unknown or cannot be served."""
    kind = name_of(trainer, "dict_class")
    if kind in LAYOUTS:
        return kind
    why = REFUSED.get(kind, f"known are {', '.join(LAYOUTS)}")
    raise FormatError(f"{CONFIG} trainer.dict_class: {kind or 'missing'}: {why}")


def assemble_weights(layout: Layout, tensors: Mapping[str, Any], trainer: Mapping[str, Any]) -> SAE:
    """Return the weights without folding; the lengths of the biases determine the orientation of the matrices."""
    bias, decoder_bias = (take(tensors, key, WEIGHTS, (-1,)) for key in (layout.bias, layout.decoder_bias))
    for key, vector in (("dict_size", bias), ("activation_dim", decoder_bias)):
        if trainer.get(key, len(vector)) != len(vector):
            raise FormatError(f"{CONFIG} trainer.{key}: {trainer[key]!r}, {WEIGHTS} has {len(vector)}")
    encoder, decoder = (
        orient(take(tensors, key, WEIGHTS), len(bias), len(decoder_bias), f"{WEIGHTS} {key}")
        for key in (layout.encoder, layout.decoder)
    )
    return assemble(encoder, bias, decoder, decoder_bias, threshold_of(tensors, len(bias)))


def threshold_of(tensors: Mapping[str, Any], latents: int) -> Tensor:
    """Return the thresholds [F] of z: one for each latent, one for all, or 0."""
    if "threshold" not in tensors:
        return torch.zeros(latents)
    threshold = take(tensors, "threshold", WEIGHTS).float()
    if threshold.shape not in ((), (latents,)):
        raise FormatError(f"{WEIGHTS} threshold: shape {tuple(threshold.shape)}, neither one nor {latents} values")
    return threshold.expand(latents)


def fold_around(sae: SAE, kind: str, tensors: Mapping[str, Any]) -> tuple[SAE, tuple[str, ...]]:
    """Fold gate, pre-bias and decoder norms into the SAE; return it and the names of what was folded."""
    folded = []
    if kind == "GatedAutoEncoder":
        gate_bias, r_mag = (take(tensors, key, WEIGHTS, (sae.latents,)) for key in ("gate_bias", "r_mag"))
        sae = folding.fold_gate(sae, gate_bias, r_mag)
        folded.append("gate")
    if LAYOUTS[kind].pre_bias:
        sae = folding.fold_pre_bias(sae, sae.decoder_bias)
        folded.append("pre_bias")
    # The library normalises decoder rows when it loads this class, and only this class.
    norm = torch.linalg.vector_norm(sae.decoder, dim=1, dtype=torch.float32)
    if kind == "AutoEncoder" and not torch.allclose(norm, torch.ones(())):
        sae = folding.fold_decoder_norm(sae)
        folded.append("decoder_norm")
    return sae, tuple(folded)


def with_selection(
    sae: SAE, kind: str, tensors: Mapping[str, Any], trainer: Mapping[str, Any], notes: dict[str, Any]
) -> SAE:
    """Return the SAE with its class's default selection: the k largest for TopK, a threshold for the batch classes.

    A learned threshold is noted. A negative one was never learned; then the library applies ReLU only.
    """
    stated = {"k": int(tensors["k"])} if isinstance(tensors.get("k"), Tensor) and tensors["k"].numel() == 1 else trainer
    k = count(stated, "k", WEIGHTS, maximum=sae.latents)
    if trainer.get("k", k) != k:
        raise FormatError(f"{CONFIG} trainer.k: {trainer['k']!r}, {WEIGHTS} has {k}")
    notes["k"] = k
    if isinstance(tensors.get("threshold"), Tensor):
        learned = float(take(tensors, "threshold", WEIGHTS, ()))
        notes["threshold"] = learned if learned >= 0 else "never learned"
    if kind == "AutoEncoderTopK":
        return replace(sae, threshold=torch.zeros_like(sae.threshold), selection=TopK(k))
    return sae


def declaration(kind: str, config: Mapping[str, Any], folded: tuple[str, ...], notes: dict[str, Any]) -> Declaration:
    """Return the declaration in config.json. A layer's number alone does not name a site."""
    trainer, buffer = section(config, "trainer", CONFIG), section(config, "buffer", CONFIG)
    model, l0 = name_of(trainer, "lm_name"), notes.get("k", trainer.get("target_l0"))
    site, why = sites.canonical(name_of(trainer, "submodule_name"), model)
    notes |= {key: trainer[key] for key in ("layer", "submodule_name", "trainer_class") if trainer.get(key) is not None}
    notes |= {key: buffer[key] for key in ("ctx_len", "io") if buffer.get(key) is not None}
    if why:
        notes["site"] = why
    sparsity = float(l0) if isinstance(l0, int | float) else None
    return Declaration(kind, (site,) if site else (), "", model, folded, sparsity, notes)


FORMAT = Format("dictionary_learning", recognise, read)
