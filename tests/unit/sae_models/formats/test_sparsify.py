"""sparsify's files, written by hand: each variant agrees with its formula; invalid files are refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rudder.sae_models.formats import sparsify
from rudder.sae_models.formats.source import Declaration, FormatError
from rudder.sae_models.sae import SAE, GroupMax, Normalisation, Router, TopK

D, F, K = 6, 12, 3
CONFIG = {"activation": "topk", "k": K, "d_in": D, "num_latents": F, "transcode": False, "skip_connection": False}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(**others: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a coder, and others; an empty tensor removes one."""
    plain = {
        "encoder.weight": numbers(F, D, seed=1),
        "encoder.bias": numbers(F, seed=2),
        "W_dec": numbers(F, D, seed=3),
        "b_dec": numbers(D, seed=4),
    }
    return {key: tensor for key, tensor in (plain | others).items() if tensor.numel()}


def read(path: Path, tensors: dict[str, Tensor], **config: Any) -> tuple[SAE, Declaration]:
    path.mkdir(exist_ok=True)
    (path / "cfg.json").write_text(json.dumps({k: v for k, v in (CONFIG | config).items() if v is not None}))
    save_file(tensors, path / "sae.safetensors")
    return sparsify.read(path)


X = numbers(32, D, seed=9)
NONE = torch.empty(0)


def select_topk(z: Tensor, k: int = K) -> Tensor:
    values, at = torch.relu(z).topk(k)
    return torch.zeros_like(z).scatter(1, at, values)


def test_topk_subtracts_its_decoder_bias_from_the_input(tmp_path: Path) -> None:
    t = weights()
    sae, declared = read(tmp_path / "layers.4", t)
    f = select_topk((X - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"])
    assert torch.allclose(sae.encode(X), f, atol=1e-5)
    assert torch.allclose(sae.decode(f), f @ t["W_dec"] + t["b_dec"], atol=1e-5)
    assert (declared.architecture, declared.sites, declared.l0) == ("topk", ("layers.4.resid_post",), 3.0)


def test_normalize_decoder_does_not_matter(tmp_path: Path) -> None:
    unit, _ = read(tmp_path / "unit", weights(), normalize_decoder=True)
    other, _ = read(tmp_path / "other", weights(), normalize_decoder=False)
    assert torch.equal(unit.encode(X), other.encode(X))


def test_groupmax_selects_the_largest_of_each_group(tmp_path: Path) -> None:
    t = weights()
    sae, _ = read(tmp_path / "layers.4", t, activation="groupmax")
    z = ((X - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]).relu().view(32, K, F // K)
    f = torch.where(z == z.amax(-1, keepdim=True), z, 0.0).view(32, F)
    assert torch.allclose(sae.encode(X), f, atol=1e-5)


def test_signed_file_selects_the_largest_magnitudes(tmp_path: Path) -> None:
    t = weights()
    sae, declared = read(tmp_path / "layers.4", t, signed=True, activation=None)
    z = (X - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]
    f = torch.zeros(32, F).scatter(1, z.abs().topk(K).indices, 1.0) * z
    assert torch.allclose(sae.encode(X), torch.cat([f.relu(), (-f).relu()], 1), atol=1e-5)
    assert torch.allclose(sae.forward(X)[0], f @ t["W_dec"] + t["b_dec"], atol=1e-5)
    assert "negative part" in declared.notes["signs"]


def test_transcoder_has_no_pre_bias_and_reads_the_input_of_its_module(tmp_path: Path) -> None:
    t = weights(W_skip=numbers(D, D, seed=6))
    (tmp_path / "config.json").write_text('{"model": "toy", "ctx_len": 64}')
    sae, declared = read(tmp_path / "layers.4.mlp", t, transcode=True, skip_connection=True)
    f = select_topk(X @ t["encoder.weight"].T + t["encoder.bias"])
    assert torch.allclose(sae.decode(sae.encode(X), X), f @ t["W_dec"] + t["b_dec"] + X @ t["W_skip"].T, atol=1e-5)
    assert (declared.sites, declared.output_site) == (("layers.4.mlp_in",), "layers.4.mlp_out")
    assert (declared.model, declared.notes["ctx_len"], declared.folded) == ("toy", 64, ())


def test_seed_folder_belongs_to_the_folder_above(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model": "toy"}')
    (tmp_path / "layers.4").mkdir()
    _, declared = read(tmp_path / "layers.4" / "seed22", weights())
    assert (declared.sites, declared.model) == (("layers.4.resid_post",), "toy")


def test_branch_module_needs_a_model_name_to_be_a_site(tmp_path: Path) -> None:
    _, unknown = read(tmp_path / "layers.4.mlp", weights())
    assert unknown.sites == ()
    assert "the model is not named" in unknown.notes["site"]


def test_unchanged_matrices_keep_their_dtype(tmp_path: Path) -> None:
    sae, _ = read(tmp_path / "layers.4", {key: tensor.bfloat16() for key, tensor in weights().items()})
    assert sae.encoder.dtype == sae.decoder.dtype == torch.bfloat16
    assert sae.bias.dtype == torch.float32


def test_latents_follow_from_the_expansion_factor(tmp_path: Path) -> None:
    assert read(tmp_path / "layers.4", weights(), num_latents=0, expansion_factor=2)[0].latents == F


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (
            weights(**{"encoder.weight": numbers(D, D), "encoder.bias": numbers(D), "W_dec": numbers(D, D)}),
            {"num_latents": D},
            "encoder.weight: is square",
        ),
        (weights(W_dec=numbers(F, D + 1)), {}, r"W_dec: shape \(12, 7\), neither"),
        (weights(b_dec=numbers(D + 1)), {}, "b_dec: shape"),
        (weights(b_dec=NONE), {}, "b_dec: missing among W_dec, encoder.bias"),
        (weights(), {"skip_connection": True}, "W_skip: missing"),
        (weights(W_skip=numbers(D, D + 1)), {"skip_connection": True}, "W_skip: shape"),
        (weights(**{"decoder.weight": numbers(D, F)}), {}, "unknown tensors decoder.weight"),
        (weights(W_dec=torch.full((F, D), torch.nan)), {}, "W_dec: has values that are not finite"),
        (weights(), {"num_latents": F + 1}, "encoder.bias: shape"),
        (weights(), {"num_latents": "12"}, "encoder.bias: shape"),
        (weights(), {"num_latents": None}, "expansion_factor: None"),
        (weights(), {"d_in": None}, "d_in: None"),
        (weights(), {"k": F + 1}, "k: 13, not a whole number from 1 to 12"),
        (weights(), {"k": 2.0}, "k: 2.0"),
        (weights(), {"k": 5, "activation": "groupmax"}, "k: 5 groups of 12 latents"),
        (weights(), {"activation": "jumprelu"}, "activation: 'jumprelu', not one of topk, groupmax"),
        (weights(), {"transcode": "no"}, "transcode: 'no'"),
    ],
)
def test_invalid_content_is_refused_by_file_and_field(
    tensors: dict[str, Tensor], config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=message):
        read(tmp_path / "layers.4", tensors, **config)


def plain(**parts: Any) -> SAE:
    t = weights()
    sae = SAE(t["encoder.weight"], t["encoder.bias"], torch.zeros(F), t["W_dec"], t["b_dec"], selection=TopK(K))
    return replace(sae, **parts)


@pytest.mark.parametrize("output_site", ["", "layers.4.mlp_out"])
@pytest.mark.parametrize("selection", [TopK(K), GroupMax(K)])
def test_written_sae_survives_reading(selection: Any, output_site: str, tmp_path: Path) -> None:
    sae = plain(selection=selection, skip=numbers(D, D, seed=8) if output_site else None)
    sparsify.write(tmp_path / "layers.4", sae, Declaration("topk", (), output_site))
    again, _ = sparsify.read(tmp_path / "layers.4")
    assert again.selection == selection
    assert torch.allclose(again.encode(X), sae.encode(X), atol=1e-5)
    assert torch.allclose(again.forward(X)[0], sae.forward(X)[0], atol=1e-5)
    assert json.loads((tmp_path / "layers.4" / "cfg.json").read_text())["transcode"] is bool(output_site)


def test_all_tensors_are_written_in_float32(tmp_path: Path) -> None:
    sparsify.write(tmp_path / "layers.4", plain(decoder=weights()["W_dec"].bfloat16()), Declaration("topk"))
    assert {t.dtype for t in load_file(tmp_path / "layers.4" / "sae.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        (plain(selection=None), "selection: sparsify keeps k latents, the batch_topk SAE has no such k"),
        (plain(threshold=torch.full((F,), 0.1)), "threshold: sparsify holds none"),
        (plain(normalisation=Normalisation.CONSTANT_NORM), "normalisation: sparsify has none"),
        (plain(decoder=numbers(F, D + 1), decoder_bias=numbers(D + 1)), "decoder: sparsify writes as many"),
        (plain(router=Router(torch.zeros(2, D))), "router: sparsify has no"),
    ],
)
def test_write_refuses_what_sparsify_cannot_represent(sae: SAE, message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=message):
        sparsify.write(tmp_path / "layers.4", sae, Declaration("batch_topk"))
    assert list(tmp_path.iterdir()) == []
