"""Llama Scope and Llamascopium: what the threshold is compared with, and what is folded into the weights."""

import math
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from rudder.sae_models.formats import llama_scope, llamascopium
from rudder.sae_models.formats.source import FormatError
from rudder.sae_models.sae import Normalisation, TopK
from tests.unit.bounded import attempt
from tests.unit.checkpoints import (
    LATENTS,
    LAYOUTS,
    WIDTH,
    Draw,
    K,
    Laid,
    check,
    lay_llama_scope,
    linears,
    relu_above,
    rewrite,
    save_json,
    save_safe,
    save_torch,
    scopium_settings,
    top,
)

THRESHOLD = "activation_function.log_jumprelu_threshold"
RESIDUAL = "blocks.15.hook_resid_post"


def test_llama_scope_threshold_counts_the_decoder_norm_and_the_scale_of_the_output(tmp_path: Path) -> None:
    d = Draw()
    laid = lay_llama_scope(tmp_path, d)
    z = (d.x * math.sqrt(WIDTH) / 5.0) @ d.w_enc.T + d.b_enc
    for threshold in (0.4, 0.4 * math.sqrt(WIDTH) / 5.0, 0.4 / d.w_dec.norm(dim=1)):
        assert not torch.equal(relu_above(z, threshold) > 0, laid.f > 0)
    sae, said = llama_scope.FORMAT.read(laid.path)
    check(sae, laid)
    assert said.folded == ("input_scale", "decoder_norm")
    check(llama_scope.FORMAT.read(laid.file)[0], laid)


@pytest.mark.parametrize(
    ("field", "value"),
    [("act_fn", "topk"), ("norm_activation", "token-wise"), ("use_glu_encoder", True), ("jump_relu_threshold", -1)],
)
def test_llama_scope_settings_that_change_the_arithmetic_are_refused(field: str, value: object, tmp_path: Path) -> None:
    laid = lay_llama_scope(tmp_path, Draw())
    settings = yaml.safe_load((laid.path / "hyperparams.json").read_text())
    save_json(laid.path / "hyperparams.json", settings | {field: value})
    with pytest.raises(FormatError, match=f"hyperparams.json.*{field}"):
        llama_scope.FORMAT.read(laid.path)


def scopium(folder: Path, tensors: dict[str, Tensor], **settings: object) -> Path:
    """A Llamascopium checkpoint."""
    save_safe(folder / "sae_weights.safetensors", tensors)
    save_json(folder / "config.json", scopium_settings(RESIDUAL, **settings))
    return folder


def newer(d: Draw) -> dict[str, Tensor]:
    """Weights by the names of 2.x, with the norm that the library writes even where none was measured."""
    unmeasured = {f"dataset_average_activation_norm.{RESIDUAL}": torch.tensor(math.nan)}
    return {"W_E": d.w_enc.T, "b_E": d.b_enc, "W_D": d.w_dec, "b_D": d.b_dec} | unmeasured


def test_llama_scope_r1_has_the_names_of_1_x_and_a_threshold_for_each_latent(tmp_path: Path) -> None:
    d = Draw()
    norm = {f"dataset_average_activation_norm.{RESIDUAL}": torch.tensor(7.0)}
    tensors = linears(d) | {"log_jumprelu_threshold": d.threshold.log()} | norm
    folder = scopium(tmp_path, tensors, apply_decoder_bias_to_pre_encoder=True, sparsity_include_decoder_norm=False)
    scale = math.sqrt(WIDTH) / 7.0
    f = relu_above((d.x * scale - d.b_dec) @ d.w_enc.T + d.b_enc, d.threshold)
    sae, said = llamascopium.FORMAT.read(folder)
    check(sae, Laid(llamascopium.FORMAT, folder, folder, d.x, f, (f @ d.w_dec + d.b_dec) / scale))
    assert said.folded == ("pre_bias", "input_scale")


def test_the_model_is_named_beside_the_settings(tmp_path: Path) -> None:
    folder = scopium(tmp_path, newer(Draw()), act_fn="relu", norm_activation="inference")
    assert llamascopium.FORMAT.read(folder)[1].model == ""
    save_json(folder / "lm_config.json", {"model_name": "meta-llama/Llama-3.1-8B", "d_model": WIDTH})
    assert llamascopium.FORMAT.read(folder)[1].model == "meta-llama/Llama-3.1-8B"


def test_llamascopium_by_token_is_normalised_at_run_time(tmp_path: Path) -> None:
    d = Draw()
    folder = scopium(tmp_path, newer(d), act_fn="relu", norm_activation="token-wise")
    scale = math.sqrt(WIDTH) / d.x.norm(dim=-1, keepdim=True)
    f = ((d.x * scale) @ d.w_enc.T + d.b_enc).relu()
    sae, _ = llamascopium.FORMAT.read(folder)
    check(sae, Laid(llamascopium.FORMAT, folder, folder, d.x, f, (f @ d.w_dec + d.b_dec) / scale))
    assert sae.normalisation is Normalisation.CONSTANT_NORM


def test_llamascopium_top_k_chooses_by_decoder_norm(tmp_path: Path) -> None:
    d = Draw()
    folder = scopium(tmp_path, newer(d), act_fn="topk", norm_activation="inference")
    norm = d.w_dec.norm(dim=1)
    z = d.x @ d.w_enc.T + d.b_enc
    f = top(z * norm, K)
    assert not torch.equal(f > 0, top(z, K) > 0)
    sae, said = llamascopium.FORMAT.read(folder)
    check(sae, Laid(llamascopium.FORMAT, folder, folder, d.x, f, (f / norm) @ d.w_dec + d.b_dec))
    assert (sae.selection, said.folded) == (TopK(K), ("decoder_norm",))


def test_llamascopium_torch_file_holds_the_weights_under_sae(tmp_path: Path) -> None:
    d = Draw()
    folder = scopium(tmp_path, newer(d), act_fn="relu", norm_activation="inference", use_decoder_bias=False)
    (folder / "sae_weights.safetensors").unlink()
    weights = {key: tensor.contiguous() for key, tensor in newer(d).items() if key != "b_D"}
    save_torch(folder / "sae_weights.pt", {"sae": weights, "version": "2.0"})
    f = (d.x @ d.w_enc.T + d.b_enc).relu()
    check(llamascopium.FORMAT.read(folder)[0], Laid(llamascopium.FORMAT, folder, folder, d.x, f, f @ d.w_dec))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sae_type", "clt"),
        ("act_fn", "batchtopk"),
        ("norm_activation", "batch-wise"),
        ("use_glu_encoder", True),
        ("d_model", WIDTH + 1),
        ("top_k", 0),
    ],
)
def test_llamascopium_refuses_by_name(field: str, value: object, tmp_path: Path) -> None:
    settings: dict[str, object] = {"act_fn": "topk", "norm_activation": "inference"} | {field: value}
    folder = scopium(tmp_path, newer(Draw()), **settings)
    with pytest.raises(FormatError, match=f"config.json {field}"):
        llamascopium.FORMAT.read(folder)


def test_llamascopium_dataset_norm_that_is_missing_or_not_a_norm_is_refused(tmp_path: Path) -> None:
    d = Draw()
    for norm, why in ((math.nan, "not finite"), (0.0, "is not a norm")):
        tensors = newer(d) | {f"dataset_average_activation_norm.{RESIDUAL}": torch.tensor(norm)}
        with pytest.raises(FormatError, match=f"dataset_average_activation_norm.{RESIDUAL}.*{why}"):
            llamascopium.FORMAT.read(scopium(tmp_path, tensors, act_fn="relu"))


def test_a_decoder_without_a_bias_is_as_wide_as_it_is_and_not_as_the_settings_say(tmp_path: Path) -> None:
    d = Draw()
    settings = {"act_fn": "relu", "norm_activation": "inference", "use_decoder_bias": False}
    for tensors in (newer(d), linears(d)):
        for name in ("b_D", "decoder.bias"):
            tensors.pop(name, None)
        sae = llamascopium.FORMAT.read(scopium(tmp_path, tensors, **settings))[0]
        assert sae.decoder_bias.tolist() == [0.0] * WIDTH
        found = attempt(llamascopium.FORMAT.read, scopium(tmp_path, tensors, d_model=1 << 40, **settings))
        assert str(found) == f"config.json d_model: {1 << 40}, the encoder reads {WIDTH}"
    laid = lay_llama_scope(tmp_path / "llama", d)
    rewrite(laid.file, lambda content: content | {"decoder.weight": torch.tensor(1.0)})
    said = yaml.safe_load((laid.path / "hyperparams.json").read_text())
    save_json(laid.path / "hyperparams.json", said | {"use_decoder_bias": False})
    with pytest.raises(FormatError, match=r"decoder\.weight: shape \(\) instead of"):
        llama_scope.FORMAT.read(laid.path)


def test_what_overflows_when_it_is_folded_is_refused(tmp_path: Path) -> None:
    d = Draw()
    laid = LAYOUTS["llamascopium"](tmp_path, d)
    norm = f"dataset_average_activation_norm.{RESIDUAL}"
    rewrite(laid.file, lambda content: content | {norm: torch.tensor(1e-39)})
    with pytest.raises(FormatError, match=r"sae_weights\.safetensors: the encoder has values that are not finite once"):
        llamascopium.FORMAT.read(laid.path)
    rewrite(laid.file, lambda content: content | {norm: torch.tensor(4.0), THRESHOLD: torch.full((LATENTS,), 99.0)})
    save_json(laid.path / "config.json", scopium_settings(RESIDUAL, sparsity_include_decoder_norm=False))
    with pytest.raises(FormatError, match="the threshold has values that are not finite once"):
        llamascopium.FORMAT.read(laid.path)


def test_a_latent_without_a_decoder_never_passes_a_gate(tmp_path: Path) -> None:
    d = Draw()
    d.w_dec[3] = 0
    laid = lay_llama_scope(tmp_path, d)
    sae = llama_scope.FORMAT.read(laid.path)[0]
    assert bool(sae.threshold.isfinite().all())
    assert float(sae.encode(1e6 * d.x)[:, 3].max()) == 0
