"""dictionary_learning's files, written by hand: each class encodes like in the library; invalid files are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rudder.sae_models.formats import dictionary_learning
from rudder.sae_models.formats.source import Declaration, FormatError
from rudder.sae_models.sae import SAE, TopK

D, F, K = 6, 10, 3
TRAINER = {"lm_name": "toy", "layer": 2, "submodule_name": "resid_post_layer_2", "activation_dim": D, "dict_size": F}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(**others: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a class with linear layers, and others; an empty tensor removes one."""
    plain = {
        "encoder.weight": numbers(F, D, seed=1),
        "encoder.bias": numbers(F, seed=2),
        "decoder.weight": numbers(D, F, seed=3),
    }
    return {key: tensor for key, tensor in (plain | others).items() if tensor.numel()}


def direct(**others: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a class with its own matrices, and others."""
    return {
        "W_enc": numbers(D, F, seed=1),
        "b_enc": numbers(F, seed=2),
        "W_dec": numbers(F, D, seed=3),
        "b_dec": numbers(D, seed=4),
    } | others


def read(path: Path, kind: str, tensors: dict[str, Tensor], **trainer: Any) -> tuple[SAE, Declaration]:
    settings = {key: value for key, value in (TRAINER | {"dict_class": kind} | trainer).items() if value is not None}
    (path / "config.json").write_text(json.dumps({"trainer": settings, "buffer": {"ctx_len": 128}}))
    torch.save(tensors, path / "ae.pt")
    return dictionary_learning.read(path)


X = numbers(32, D, seed=9)
NONE = torch.empty(0)
BIAS = numbers(D, seed=4)
COUNTED = {"k": torch.tensor(K, dtype=torch.int), "b_dec": BIAS}


def test_autoencoder_is_rescaled_to_unit_decoder_columns_like_in_the_library(tmp_path: Path) -> None:
    t = linear(bias=BIAS)
    sae, declared = read(tmp_path, "AutoEncoder", t)
    norm = t["decoder.weight"].norm(dim=0)
    f = torch.relu((X - BIAS) @ t["encoder.weight"].T + t["encoder.bias"])
    assert torch.allclose(sae.encode(X), f * norm, atol=1e-5)
    assert torch.allclose(sae.forward(X)[0], f @ t["decoder.weight"].T + BIAS, atol=1e-5)
    assert declared.folded == ("pre_bias", "decoder_norm")
    assert (declared.sites, declared.model, declared.notes["ctx_len"]) == (("layers.2.resid_post",), "toy", 128)


def test_unit_decoder_columns_do_not_change(tmp_path: Path) -> None:
    t = linear(bias=BIAS)
    t["decoder.weight"] = t["decoder.weight"] / t["decoder.weight"].norm(dim=0)
    sae, declared = read(tmp_path, "AutoEncoder", t)
    assert torch.equal(sae.decoder, t["decoder.weight"].T)
    assert declared.folded == ("pre_bias",)


def test_april_autoencoder_has_no_pre_bias_and_is_not_rescaled(tmp_path: Path) -> None:
    t = linear(**{"decoder.bias": BIAS})
    sae, declared = read(tmp_path, "AutoEncoderNew", t)
    f = torch.relu(X @ t["encoder.weight"].T + t["encoder.bias"])
    assert torch.allclose(sae.encode(X), f, atol=1e-5)
    assert torch.allclose(sae.decode(f), f @ t["decoder.weight"].T + BIAS, atol=1e-5)
    assert declared.folded == ()


def test_gated_becomes_jumprelu(tmp_path: Path) -> None:
    t = linear(
        **{"encoder.bias": NONE},
        gate_bias=numbers(F, seed=5),
        mag_bias=numbers(F, seed=6),
        r_mag=numbers(F, seed=7) / 3,
    ) | {"decoder_bias": BIAS}
    sae, declared = read(tmp_path, "GatedAutoEncoder", t)
    h = (X - BIAS) @ t["encoder.weight"].T
    f = torch.relu(h * t["r_mag"].exp() + t["mag_bias"]) * (h + t["gate_bias"] > 0)
    assert torch.allclose(sae.encode(X), f, atol=1e-5)
    assert declared.folded == ("gate", "pre_bias")


@pytest.mark.parametrize("threshold", [0.75, -1.0, None])
def test_topk_ignores_and_notes_its_threshold(threshold: float | None, tmp_path: Path) -> None:
    t = linear(**COUNTED) | ({} if threshold is None else {"threshold": torch.tensor(threshold)})
    sae, declared = read(tmp_path, "AutoEncoderTopK", t, k=K)
    values, at = torch.relu((X - BIAS) @ t["encoder.weight"].T + t["encoder.bias"]).topk(K)
    assert torch.allclose(sae.encode(X), torch.zeros(32, F).scatter(1, at, values), atol=1e-5)
    assert declared.notes.get("threshold") == {0.75: 0.75, -1.0: "never learned", None: None}[threshold]
    assert declared.l0 == K


def test_older_topk_reads_k_from_the_trainer(tmp_path: Path) -> None:
    assert read(tmp_path, "AutoEncoderTopK", linear(b_dec=BIAS), k=4)[0].selection == TopK(4)


@pytest.mark.parametrize("kind", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_batch_topk_applies_its_threshold(kind: str, tmp_path: Path) -> None:
    others = {**COUNTED, "threshold": torch.tensor(0.75)}
    t = linear(**others) if kind == "BatchTopKSAE" else direct(**others, group_sizes=torch.tensor([4, 6]))
    sae, declared = read(tmp_path, kind, t, k=K)
    z = (X - BIAS) @ (t["encoder.weight"].T if "encoder.weight" in t else t["W_enc"]) + numbers(F, seed=2)
    assert torch.allclose(sae.encode(X), torch.where(z > 0.75, z, 0.0), atol=1e-5)
    assert sae.exact
    assert (declared.l0, declared.notes["threshold"]) == (3.0, 0.75)


def test_batch_topk_without_a_learned_threshold_is_relu_with_a_note(tmp_path: Path) -> None:
    t = linear(**COUNTED, threshold=torch.tensor(-1.0))
    sae, declared = read(tmp_path, "BatchTopKSAE", t, k=K)
    assert bool((sae.threshold == 0).all())
    assert declared.notes["threshold"] == "never learned"


def test_jumprelu_has_no_pre_bias(tmp_path: Path) -> None:
    t = direct(threshold=torch.linspace(-1, 1, F))
    sae, declared = read(tmp_path, "JumpReluAutoEncoder", t, target_l0=20.0)
    z = X @ t["W_enc"] + t["b_enc"]
    assert torch.allclose(sae.encode(X), torch.where(z > t["threshold"].clamp(min=0), z, 0.0), atol=1e-5)
    assert (declared.folded, declared.l0) == ((), 20.0)


def test_orientation_follows_the_lengths_of_the_biases(tmp_path: Path) -> None:
    t = direct(threshold=torch.ones(F))
    other = t | {"W_enc": t["W_enc"].T.contiguous(), "W_dec": t["W_dec"].T.contiguous()}
    straight = read(tmp_path, "JumpReluAutoEncoder", t)[0].encode(X)
    assert torch.allclose(read(tmp_path, "JumpReluAutoEncoder", other)[0].encode(X), straight, atol=1e-5)


def test_layer_number_alone_declares_no_site(tmp_path: Path) -> None:
    _, declared = read(tmp_path, "AutoEncoder", linear(bias=BIAS), submodule_name=None)
    assert declared.sites == ()
    assert (declared.notes["layer"], declared.notes["site"]) == (2, "no hook point is named")


SQUARE = {key: numbers(D, D) for key in ("W_enc", "W_dec")} | {"b_enc": numbers(D), "threshold": numbers(D)}


@pytest.mark.parametrize(
    ("kind", "tensors", "trainer", "message"),
    [
        ("JumpReluAutoEncoder", direct(**SQUARE), {"dict_size": D}, "W_enc: is square, its orientation"),
        ("AutoEncoder", linear(bias=BIAS, **{"decoder.weight": numbers(D, F + 1)}), {}, "decoder.weight: shape"),
        ("AutoEncoder", linear(bias=NONE), {}, "bias: missing among decoder.weight, encoder.bias"),
        ("AutoEncoder", linear(bias=BIAS, b_dec=BIAS), {}, "unknown tensors b_dec"),
        ("AutoEncoder", linear(bias=torch.full((D,), torch.nan)), {}, "bias: has values that are not finite"),
        ("AutoEncoder", linear(bias=BIAS), {"dict_size": F + 1}, "trainer.dict_size: 11, ae.pt has 10"),
        ("AutoEncoder", linear(bias=BIAS), {"activation_dim": "6"}, "trainer.activation_dim: '6', ae.pt has 6"),
        ("AutoEncoderTopK", linear(**COUNTED), {"k": K + 1}, "trainer.k: 4, ae.pt has 3"),
        ("AutoEncoderTopK", linear(b_dec=BIAS), {}, "k: None, not a whole number"),
        ("AutoEncoderTopK", linear(b_dec=BIAS, k=torch.tensor(F + 1)), {}, "k: 11, not a whole number from 1 to 10"),
        ("AutoEncoderTopK", linear(**COUNTED, threshold=torch.ones(2)), {}, "threshold: shape"),
        ("JumpReluAutoEncoder", direct(threshold=torch.ones(2)), {}, "neither one nor 10 values"),
        ("CrossCoder", linear(), {}, "CrossCoder: it reads several models or layers at once"),
        ("IdentityDict", {}, {}, "IdentityDict: it is the identity"),
        ("SwitchAutoEncoder", linear(), {}, "SwitchAutoEncoder: known are AutoEncoder, AutoEncoderNew"),
        ("", linear(), {}, "dict_class: missing"),
    ],
)
def test_invalid_or_unknown_content_is_refused_by_file_and_field(
    kind: str, tensors: dict[str, Tensor], trainer: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=message):
        read(tmp_path, kind, tensors, **trainer)


def test_file_without_a_dictionary_is_refused(tmp_path: Path) -> None:
    read(tmp_path, "AutoEncoder", linear(bias=BIAS))
    torch.save([numbers(3)], tmp_path / "ae.pt")
    with pytest.raises(FormatError, match=r"ae\.pt: holds no dictionary"):
        dictionary_learning.read(tmp_path)
