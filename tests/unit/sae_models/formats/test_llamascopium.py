"""Llama Scope and Llamascopium: the quantity that thresholds apply to, and folding into the weights."""

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
    Checkpoint,
    Draw,
    K,
    check,
    linears,
    relu_above,
    rewrite,
    save_json,
    save_safe,
    save_torch,
    scopium_settings,
    top,
    write_llama_scope,
)

THRESHOLD = "activation_function.log_jumprelu_threshold"
RESIDUAL = "blocks.15.hook_resid_post"


def test_llama_scope_threshold_includes_decoder_norm_and_output_scale(tmp_path: Path) -> None:
    d = Draw()
    checkpoint = write_llama_scope(tmp_path, d)
    z = (d.x * math.sqrt(WIDTH) / 5.0) @ d.w_enc.T + d.b_enc
    for threshold in (0.4, 0.4 * math.sqrt(WIDTH) / 5.0, 0.4 / d.w_dec.norm(dim=1)):
        assert not torch.equal(relu_above(z, threshold) > 0, checkpoint.f > 0)
    sae, declared = llama_scope.FORMAT.read(checkpoint.path)
    check(sae, checkpoint)
    assert declared.folded == ("input_scale", "decoder_norm")
    check(llama_scope.FORMAT.read(checkpoint.file)[0], checkpoint)


@pytest.mark.parametrize(
    ("field", "value"),
    [("act_fn", "topk"), ("norm_activation", "token-wise"), ("use_glu_encoder", True), ("jump_relu_threshold", -1)],
)
def test_llama_scope_settings_that_change_the_arithmetic_are_refused(field: str, value: object, tmp_path: Path) -> None:
    checkpoint = write_llama_scope(tmp_path, Draw())
    settings = yaml.safe_load((checkpoint.path / "hyperparams.json").read_text())
    save_json(checkpoint.path / "hyperparams.json", settings | {field: value})
    with pytest.raises(FormatError, match=f"hyperparams.json.*{field}"):
        llama_scope.FORMAT.read(checkpoint.path)


def scopium(folder: Path, tensors: dict[str, Tensor], **settings: object) -> Path:
    """Write a Llamascopium checkpoint."""
    save_safe(folder / "sae_weights.safetensors", tensors)
    save_json(folder / "config.json", scopium_settings(RESIDUAL, **settings))
    return folder


def newer(d: Draw) -> dict[str, Tensor]:
    """Return weights by the names of 2.x, with the NaN norm that the library writes if it measured none."""
    unmeasured = {f"dataset_average_activation_norm.{RESIDUAL}": torch.tensor(math.nan)}
    return {"W_E": d.w_enc.T, "b_E": d.b_enc, "W_D": d.w_dec, "b_D": d.b_dec} | unmeasured


def test_llama_scope_r1_uses_names_of_1_x_and_thresholds_per_latent(tmp_path: Path) -> None:
    d = Draw()
    norm = {f"dataset_average_activation_norm.{RESIDUAL}": torch.tensor(7.0)}
    tensors = linears(d) | {"log_jumprelu_threshold": d.threshold.log()} | norm
    folder = scopium(tmp_path, tensors, apply_decoder_bias_to_pre_encoder=True, sparsity_include_decoder_norm=False)
    scale = math.sqrt(WIDTH) / 7.0
    f = relu_above((d.x * scale - d.b_dec) @ d.w_enc.T + d.b_enc, d.threshold)
    sae, declared = llamascopium.FORMAT.read(folder)
    check(sae, Checkpoint(llamascopium.FORMAT, folder, folder, d.x, f, (f @ d.w_dec + d.b_dec) / scale))
    assert declared.folded == ("pre_bias", "input_scale")


def test_model_name_is_in_lm_config(tmp_path: Path) -> None:
    folder = scopium(tmp_path, newer(Draw()), act_fn="relu", norm_activation="inference")
    assert llamascopium.FORMAT.read(folder)[1].model == ""
    save_json(folder / "lm_config.json", {"model_name": "meta-llama/Llama-3.1-8B", "d_model": WIDTH})
    assert llamascopium.FORMAT.read(folder)[1].model == "meta-llama/Llama-3.1-8B"


def test_llamascopium_token_wise_norm_is_a_run_time_normalisation(tmp_path: Path) -> None:
    d = Draw()
    folder = scopium(tmp_path, newer(d), act_fn="relu", norm_activation="token-wise")
    scale = math.sqrt(WIDTH) / d.x.norm(dim=-1, keepdim=True)
    f = ((d.x * scale) @ d.w_enc.T + d.b_enc).relu()
    sae, _ = llamascopium.FORMAT.read(folder)
    check(sae, Checkpoint(llamascopium.FORMAT, folder, folder, d.x, f, (f @ d.w_dec + d.b_dec) / scale))
    assert sae.normalisation is Normalisation.CONSTANT_NORM


def test_llamascopium_top_k_selects_by_z_times_decoder_norm(tmp_path: Path) -> None:
    d = Draw()
    folder = scopium(tmp_path, newer(d), act_fn="topk", norm_activation="inference")
    norm = d.w_dec.norm(dim=1)
    z = d.x @ d.w_enc.T + d.b_enc
    f = top(z * norm, K)
    assert not torch.equal(f > 0, top(z, K) > 0)
    sae, declared = llamascopium.FORMAT.read(folder)
    check(sae, Checkpoint(llamascopium.FORMAT, folder, folder, d.x, f, (f / norm) @ d.w_dec + d.b_dec))
    assert (sae.selection, declared.folded) == (TopK(K), ("decoder_norm",))


def test_llamascopium_torch_file_has_weights_under_the_key_sae(tmp_path: Path) -> None:
    d = Draw()
    folder = scopium(tmp_path, newer(d), act_fn="relu", norm_activation="inference", use_decoder_bias=False)
    (folder / "sae_weights.safetensors").unlink()
    weights = {key: tensor.contiguous() for key, tensor in newer(d).items() if key != "b_D"}
    save_torch(folder / "sae_weights.pt", {"sae": weights, "version": "2.0"})
    f = (d.x @ d.w_enc.T + d.b_enc).relu()
    check(llamascopium.FORMAT.read(folder)[0], Checkpoint(llamascopium.FORMAT, folder, folder, d.x, f, f @ d.w_dec))


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


def test_llamascopium_refuses_an_invalid_dataset_norm(tmp_path: Path) -> None:
    d = Draw()
    for norm, why in ((math.nan, "not finite"), (0.0, "is not a norm")):
        tensors = newer(d) | {f"dataset_average_activation_norm.{RESIDUAL}": torch.tensor(norm)}
        with pytest.raises(FormatError, match=f"dataset_average_activation_norm.{RESIDUAL}.*{why}"):
            llamascopium.FORMAT.read(scopium(tmp_path, tensors, act_fn="relu"))


def test_zero_bias_takes_its_width_from_the_decoder(tmp_path: Path) -> None:
    d = Draw()
    settings = {"act_fn": "relu", "norm_activation": "inference", "use_decoder_bias": False}
    for tensors in (newer(d), linears(d)):
        for name in ("b_D", "decoder.bias"):
            tensors.pop(name, None)
        sae = llamascopium.FORMAT.read(scopium(tmp_path, tensors, **settings))[0]
        assert sae.decoder_bias.tolist() == [0.0] * WIDTH
        error = attempt(llamascopium.FORMAT.read, scopium(tmp_path, tensors, d_model=1 << 40, **settings))
        assert str(error) == f"config.json d_model: {1 << 40}, the encoder reads {WIDTH}"
    checkpoint = write_llama_scope(tmp_path / "llama", d)
    rewrite(checkpoint.file, lambda content: content | {"decoder.weight": torch.tensor(1.0)})
    settings = yaml.safe_load((checkpoint.path / "hyperparams.json").read_text())
    save_json(checkpoint.path / "hyperparams.json", settings | {"use_decoder_bias": False})
    with pytest.raises(FormatError, match=r"decoder\.weight: shape \(\) instead of"):
        llama_scope.FORMAT.read(checkpoint.path)


def test_overflow_while_folding_is_refused(tmp_path: Path) -> None:
    d = Draw()
    checkpoint = LAYOUTS["llamascopium"](tmp_path, d)
    norm = f"dataset_average_activation_norm.{RESIDUAL}"
    rewrite(checkpoint.file, lambda content: content | {norm: torch.tensor(1e-39)})
    with pytest.raises(FormatError, match=r"sae_weights\.safetensors: the encoder has values that are not finite once"):
        llamascopium.FORMAT.read(checkpoint.path)
    rewrite(
        checkpoint.file, lambda content: content | {norm: torch.tensor(4.0), THRESHOLD: torch.full((LATENTS,), 99.0)}
    )
    save_json(checkpoint.path / "config.json", scopium_settings(RESIDUAL, sparsity_include_decoder_norm=False))
    with pytest.raises(FormatError, match="the threshold has values that are not finite once"):
        llamascopium.FORMAT.read(checkpoint.path)


def test_latent_with_zero_decoder_is_never_active(tmp_path: Path) -> None:
    d = Draw()
    d.w_dec[3] = 0
    checkpoint = write_llama_scope(tmp_path, d)
    sae = llama_scope.FORMAT.read(checkpoint.path)[0]
    assert bool(sae.threshold.isfinite().all())
    assert float(sae.encode(1e6 * d.x)[:, 3].max()) == 0
