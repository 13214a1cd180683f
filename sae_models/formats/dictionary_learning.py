"""dictionary_learning: a folder with ae.pt, a state dict, and config.json, whose `trainer` names the class.

The names of the weights depend on the class, see LAYOUTS. Matrices are those of linear layers, (F, d) and (d, F), or
W_enc (d, F) and W_dec (F, d). Trainers that normalise their inputs scale biases and thresholds back before they save:
the files read plain activations.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rudder.sae_models.formats import folding, sites
from rudder.sae_models.formats.folder import home
from rudder.sae_models.formats.settings import count, section, word
from rudder.sae_models.formats.source import Declaration, Format, FormatError
from rudder.sae_models.formats.tensors import assembled, only, oriented, read_json, read_pickle, state, take
from rudder.sae_models.sae import SAE, TopK

CONFIG, WEIGHTS, ADAPTIVE = "config.json", "ae.pt", "dynamic_config.json"


class Layout(NamedTuple):
    """The names of a class's weights, and whether it takes its decoder bias off its input."""

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
    """Why a path holds this format, or None."""
    folder = home(path, WEIGHTS)
    # AdaptiveK writes these two names and a third.
    found = all((folder / name).is_file() for name in (CONFIG, WEIGHTS)) and not (folder / ADAPTIVE).exists()
    return f"{WEIGHTS} beside {CONFIG}" if found else None


def read(path: Path) -> tuple[SAE, Declaration]:
    """The SAE in canonical form, as the library itself loads it, and what config.json says of it. FormatError: the file
    and the field.
    """
    folder = home(path, WEIGHTS)
    config = read_json(folder / CONFIG)
    trainer = section(config, "trainer", CONFIG)
    kind = class_of(trainer)
    layout, tensors = LAYOUTS[kind], state(read_pickle(folder / WEIGHTS), WEIGHTS)
    only(tensors, (*layout[:4], *layout.others), WEIGHTS)
    sae, notes = stored(layout, tensors, trainer), dict[str, Any]()
    sae, folded = folded_in(sae, kind, tensors)
    if "TopK" in kind:
        sae = selected(sae, kind, tensors, trainer, notes)
    return sae, declaration(kind, config, folded, notes)


def class_of(trainer: Mapping[str, Any]) -> str:
    """The name of the class; FormatError where it is none that can be served."""
    kind = word(trainer, "dict_class")
    if kind in LAYOUTS:
        return kind
    why = REFUSED.get(kind, f"known are {', '.join(LAYOUTS)}")
    raise FormatError(f"{CONFIG} trainer.dict_class: {kind or 'missing'}: {why}")


def stored(layout: Layout, tensors: Mapping[str, Any], trainer: Mapping[str, Any]) -> SAE:
    """The weights as they are; the lengths of the biases tell how the matrices lie."""
    bias, decoder_bias = (take(tensors, key, WEIGHTS, (-1,)) for key in (layout.bias, layout.decoder_bias))
    for key, vector in (("dict_size", bias), ("activation_dim", decoder_bias)):
        if trainer.get(key, len(vector)) != len(vector):
            raise FormatError(f"{CONFIG} trainer.{key}: {trainer[key]!r}, {WEIGHTS} has {len(vector)}")
    encoder, decoder = (
        oriented(take(tensors, key, WEIGHTS), len(bias), len(decoder_bias), f"{WEIGHTS} {key}")
        for key in (layout.encoder, layout.decoder)
    )
    return assembled(encoder, bias, decoder, decoder_bias, threshold_of(tensors, len(bias)))


def threshold_of(tensors: Mapping[str, Any], latents: int) -> Tensor:
    """Of z [F]: one for each latent, or one for all, or 0."""
    if "threshold" not in tensors:
        return torch.zeros(latents)
    found = take(tensors, "threshold", WEIGHTS).float()
    if found.shape not in ((), (latents,)):
        raise FormatError(f"{WEIGHTS} threshold: shape {tuple(found.shape)}, neither one nor {latents} values")
    return found.expand(latents)


def folded_in(sae: SAE, kind: str, tensors: Mapping[str, Any]) -> tuple[SAE, tuple[str, ...]]:
    """The SAE with its gate, pre-bias and decoder norms folded into it, and what that was."""
    folded = []
    if kind == "GatedAutoEncoder":
        gate_bias, r_mag = (take(tensors, key, WEIGHTS, (sae.latents,)) for key in ("gate_bias", "r_mag"))
        sae = folding.fold_gate(sae, gate_bias, r_mag)
        folded.append("gate")
    if LAYOUTS[kind].pre_bias:
        sae = folding.fold_pre_bias(sae, sae.decoder_bias)
        folded.append("pre_bias")
    # The library does so as it loads this class, and this class alone.
    norm = torch.linalg.vector_norm(sae.decoder, dim=1, dtype=torch.float32)
    if kind == "AutoEncoder" and not torch.allclose(norm, torch.ones(())):
        sae = folding.fold_decoder_norm(sae)
        folded.append("decoder_norm")
    return sae, tuple(folded)


def selected(sae: SAE, kind: str, tensors: Mapping[str, Any], trainer: Mapping[str, Any], notes: dict[str, Any]) -> SAE:
    """The SAE as its class encodes without being told how: TopK by the k largest, the batch classes by threshold.

    A TopK file's learned threshold is noted. A negative one was never learned; then the library takes the ReLU alone.
    """
    stated = {"k": int(tensors["k"])} if isinstance(tensors.get("k"), Tensor) and tensors["k"].numel() == 1 else trainer
    k = count(stated, "k", WEIGHTS, most=sae.latents)
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
    """What config.json says beside the weights. A layer's number alone does not name a site."""
    trainer, buffer = section(config, "trainer", CONFIG), section(config, "buffer", CONFIG)
    model, l0 = word(trainer, "lm_name"), notes.get("k", trainer.get("target_l0"))
    site, why = sites.canonical(word(trainer, "submodule_name"), model)
    notes |= {key: trainer[key] for key in ("layer", "submodule_name", "trainer_class") if trainer.get(key) is not None}
    notes |= {key: buffer[key] for key in ("ctx_len", "io") if buffer.get(key) is not None}
    if why:
        notes["site"] = why
    sparsity = float(l0) if isinstance(l0, int | float) else None
    return Declaration(kind, (site,) if site else (), "", model, folded, sparsity, notes)


FORMAT = Format("dictionary_learning", recognise, read)
