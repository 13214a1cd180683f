"""Each published format reads as its own arithmetic says, from files laid out as they are published."""

import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from sae_models.formats import (
    adaptive_k,
    deepseek_r1,
    gemma_scope,
    gemma_scope_2,
    goodfire,
    llama_scope,
    llamascopium,
    openai,
    opensae,
    qwen_scope,
    route_sae,
    saelens,
    sparsify,
    transcoders,
)
from sae_models.formats.source import Declaration, FormatError
from sae_models.sae import SAE, Normalisation, TopK
from tests.unit.checkpoints import (
    LATENTS,
    LAYOUTS,
    WIDTH,
    Draw,
    K,
    Laid,
    lay_gemma_scope,
    lay_gemma_scope_2,
    lay_llama_scope,
    lay_openai,
    lay_opensae,
    lay_qwen_scope,
    lay_transcoders,
    linears,
    relu_above,
    rewrite,
    save_json,
    save_npz,
    save_safe,
    save_torch,
    scopium_settings,
    top,
)

READERS = (
    adaptive_k,
    deepseek_r1,
    gemma_scope,
    gemma_scope_2,
    goodfire,
    llama_scope,
    llamascopium,
    openai,
    opensae,
    qwen_scope,
    route_sae,
    saelens,
    sparsify,
    transcoders,
)
MATRICES = ((LATENTS, WIDTH), (WIDTH, LATENTS))
THRESHOLD = "activation_function.log_jumprelu_threshold"
RESIDUAL = "blocks.15.hook_resid_post"


def check(sae: SAE, laid: Laid, tolerance: float = 1e-5) -> None:
    """Encode and decode agree with the formula, which leaves some latents active and most not."""
    f = sae.encode(laid.x)
    assert 0.02 < float((laid.f > 0).float().mean()) < 0.8
    assert torch.equal(f > 0, laid.f > 0)
    assert_near(f, laid.f, tolerance)
    if sae.router is None:
        assert_near(sae.decode(f, laid.x), laid.y, tolerance)
    else:
        assert_near(replace(sae, router=None, normalisation=Normalisation.NONE).decode(f), laid.y, tolerance)


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the largest value."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < tolerance * float(expected.abs().max())


@pytest.mark.parametrize("name", LAYOUTS)
def test_encode_and_decode_are_those_of_the_format(name: str, tmp_path: Path) -> None:
    laid = LAYOUTS[name](tmp_path, Draw())
    assert laid.format.name == name
    assert laid.format.recognise(laid.path)
    check(laid.format.read(laid.path)[0], laid, 3e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_format_recognises_its_own_checkpoints_alone(name: str, tmp_path: Path) -> None:
    laid = LAYOUTS[name](tmp_path, Draw())
    assert [reader.FORMAT.name for reader in READERS if reader.FORMAT.recognise(laid.path)] == [name]


def matrices(laid: Laid) -> list[str]:
    """The names of the encoder and decoder in a checkpoint."""
    found: list[str] = []

    def look(content: dict[str, Any]) -> dict[str, Any]:
        found.extend(key for key, value in content.items() if getattr(value, "shape", ()) in MATRICES)
        return content

    rewrite(laid.file, look)
    assert len(found) == 2
    return found


def transposed(key: str, content: dict[str, Any]) -> dict[str, Any]:
    """With that matrix transposed."""
    return content | {key: content[key].T.contiguous()}


def without(key: str, content: dict[str, Any]) -> dict[str, Any]:
    """All but that."""
    return {name: value for name, value in content.items() if name != key}


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "qwen_scope"])
def test_a_transposed_matrix_is_refused_by_name(name: str, tmp_path: Path) -> None:
    for key in matrices(LAYOUTS[name](tmp_path, Draw())):
        laid = LAYOUTS[name](tmp_path, Draw())
        rewrite(laid.file, partial(transposed, key))
        with pytest.raises(FormatError, match=rf"{laid.file.name}.* {re.escape(key)}: shape"):
            laid.format.read(laid.path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_missing_matrix_is_named(name: str, tmp_path: Path) -> None:
    for key in matrices(LAYOUTS[name](tmp_path, Draw())):
        laid = LAYOUTS[name](tmp_path, Draw())
        rewrite(laid.file, partial(without, key))
        with pytest.raises(FormatError, match=rf" {re.escape(key)}: missing among"):
            laid.format.read(laid.path)


@pytest.mark.parametrize(
    ("name", "declared"),
    [
        ("gemma_scope", ("layers.20.resid_post", "layers.20.resid_post", "google/gemma-2-2b", 71.0)),
        ("gemma_scope_2", ("layers.7.mlp_in", "layers.7.mlp_out", "gemma-v3-1b-pt", 10.0)),
        ("openai", ("layers.8.resid_post", "layers.8.resid_post", "gpt2", None)),
        ("llama_scope", ("layers.8.resid_mid", "layers.8.mlp_out", "meta-llama/Llama-3.1-8B", None)),
        ("llamascopium", ("layers.15.resid_post", "layers.15.resid_post", "", None)),
        ("goodfire", ("layers.19.resid_post", "layers.19.resid_post", "meta-llama/Llama-3.1-8B-Instruct", None)),
        ("deepseek_r1", ("layers.19.resid_post",) * 2 + ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", None)),
        ("qwen_scope", ("layers.3.resid_post", "layers.3.resid_post", "Qwen/Qwen3-1.7B-Base", 5.0)),
        ("transcoders", ("layers.4.mlp_in", "layers.4.mlp_out", "Qwen/Qwen3-0.6B", None)),
        ("opensae", ("layers.12.resid_post", "layers.12.resid_post", "meta-llama/meta-llama-3.1-8b", None)),
        ("route_sae", ("", "", "", 5.0)),
        ("adaptive_k", ("layers.3.resid_post", "layers.3.resid_post", "EleutherAI/pythia-70m", None)),
    ],
)
def test_site_model_and_l0_come_from_settings_and_path(
    name: str, declared: tuple[str, str, str, float | None], tmp_path: Path
) -> None:
    laid = LAYOUTS[name](tmp_path, Draw())
    said = laid.format.read(laid.path)[1]
    assert ("".join(said.sites), said.output_site, said.model, said.l0) == declared


def test_gemma_scope_reads_lower_case_names_too(tmp_path: Path) -> None:
    laid = lay_gemma_scope(tmp_path, Draw(), "w_")
    check(gemma_scope.FORMAT.read(laid.file)[0], laid)


def gemma_scope_at(home: Path, where: str) -> Declaration:
    """What is declared of a Gemma Scope SAE at a path."""
    d = Draw()
    tensors = {"W_enc": d.w_enc.T, "W_dec": d.w_dec, "b_enc": d.b_enc, "b_dec": d.b_dec, "threshold": d.threshold}
    save_npz(home / where / "params.npz", tensors)
    return gemma_scope.FORMAT.read(home / where)[1]


def test_gemma_scope_declares_what_its_path_says_and_no_more(tmp_path: Path) -> None:
    mlp = gemma_scope_at(tmp_path, "google/gemma-scope-9b-it-mlp/layer_9/width_131k/average_l0_12")
    assert (mlp.sites, mlp.output_site, mlp.model, mlp.l0) == (
        ("layers.9.mlp_out",),
        "layers.9.mlp_out",
        "google/gemma-2-9b-it",
        12,
    )
    attention = gemma_scope_at(tmp_path, "gemma-scope-2b-pt-att/layer_0/width_16k/average_l0_104")
    assert (attention.sites, attention.notes["hook"]) == ((), "blocks.0.attn.hook_z")
    transcoder = gemma_scope_at(tmp_path, "gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_8")
    assert (transcoder.sites, transcoder.output_site) == ((), "layers.3.mlp_out")
    assert transcoder.architecture == "jumprelu_transcoder"
    unknown = gemma_scope_at(tmp_path, "mine")
    assert (unknown.sites, unknown.output_site, unknown.model, unknown.l0) == ((), "", "", None)


def test_gemma_scope_embedding_sae_reads_what_the_model_reads(tmp_path: Path) -> None:
    d = Draw()
    folder = tmp_path / "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"
    tensors = {"W_enc": d.w_enc.T, "W_dec": d.w_dec, "b_enc": d.b_enc, "b_dec": d.b_dec, "threshold": d.threshold}
    save_npz(folder / "params.npz", tensors)
    sae, said = gemma_scope.FORMAT.read(folder)
    row = d.x / math.sqrt(WIDTH)
    f = relu_above(row @ d.w_enc.T + d.b_enc, d.threshold)
    check(sae, Laid(gemma_scope.FORMAT, folder, folder, d.x, f, math.sqrt(WIDTH) * (f @ d.w_dec + d.b_dec)))
    assert (said.sites, said.folded) == (("embed",), ("input_scale",))


def test_gemma_scope_2_without_settings_takes_the_site_from_its_folder(tmp_path: Path) -> None:
    laid = lay_gemma_scope_2(tmp_path, Draw())
    (laid.path / "config.json").unlink()
    sae, said = gemma_scope_2.FORMAT.read(laid.path)
    check(sae, laid)
    assert (said.sites, said.output_site) == (("layers.7.mlp_in",), "layers.7.mlp_out")
    assert said.model == "google/gemma-3-1b-pt"


def test_gemma_scope_2_attention_has_no_site_and_a_missing_skip_is_named(tmp_path: Path) -> None:
    d = Draw()
    tensors = {"w_enc": d.w_enc.T, "w_dec": d.w_dec, "b_enc": d.b_enc, "b_dec": d.b_dec, "threshold": d.threshold}
    folder = tmp_path / "gemma-scope-2-4b-it/attn_out/layer_9_width_16k_l0_medium"
    save_safe(folder / "params.safetensors", tensors)
    said = gemma_scope_2.FORMAT.read(folder)[1]
    assert (said.sites, said.notes["hook"]) == ((), "model.layers.9.self_attn.o_proj.input")
    save_json(folder / "config.json", {"architecture": "jump_relu", "affine_connection": True})
    with pytest.raises(FormatError, match="affine_skip_connection: missing"):
        gemma_scope_2.FORMAT.read(folder)


def test_cross_layer_transcoders_are_refused_by_name(tmp_path: Path) -> None:
    d = Draw()
    across = {"w_enc": d.w_enc.T, "w_dec": d.w_dec[:, None].expand(-1, 3, -1), "b_enc": d.b_enc, "b_dec": d.b_dec}
    clt = tmp_path / "clt/layer_0_width_262k_l0_medium.safetensors"
    save_safe(clt, across | {"threshold": d.threshold})
    assert gemma_scope_2.FORMAT.recognise(clt)
    with pytest.raises(FormatError, match=r"w_dec: a cross-layer transcoder"):
        gemma_scope_2.FORMAT.read(clt)
    save_safe(tmp_path / "mntss/W_enc_0.safetensors", {"W_enc_0": d.w_enc, "b_enc_0": d.b_enc, "b_dec_0": d.b_dec})
    assert "cross-layer" in str(transcoders.FORMAT.recognise(tmp_path / "mntss"))
    with pytest.raises(FormatError, match=r"W_enc_0\.safetensors: a cross-layer transcoder"):
        transcoders.FORMAT.read(tmp_path / "mntss")


def test_openai_takes_the_pre_bias_off_after_the_layer_norm(tmp_path: Path) -> None:
    d = Draw()
    laid = lay_openai(tmp_path, d)
    before = torch.nn.functional.layer_norm(d.x - d.b_dec, (WIDTH,))
    other = top(before @ d.w_enc.T + d.b_enc, K)
    assert float((other - laid.f).abs().max()) > 0.1
    sae, said = openai.FORMAT.read(laid.path)
    check(sae, laid, 3e-5)
    assert (sae.selection, sae.normalisation, said.folded) == (TopK(K), Normalisation.LAYER_NORM, ("pre_bias",))


def test_openai_relu_is_not_normalised(tmp_path: Path) -> None:
    d = Draw()
    content = {"pre_bias": d.b_dec, "latent_bias": d.b_enc, "encoder.weight": d.w_enc}
    save_torch(tmp_path / "0.pt", content | {"decoder.weight": d.w_dec.T.contiguous(), "activation": "ReLU"})
    f = ((d.x - d.b_dec) @ d.w_enc.T + d.b_enc).relu()
    file = tmp_path / "0.pt"
    check(openai.FORMAT.read(file)[0], Laid(openai.FORMAT, file, file, d.x, f, f @ d.w_dec + d.b_dec))


def test_openai_activation_without_a_relu_behind_it_is_refused(tmp_path: Path) -> None:
    laid = lay_openai(tmp_path, Draw())
    content = torch.load(laid.file)
    content["activation_state_dict"]["postact_fn"] = "Identity"
    save_torch(laid.file, content)
    with pytest.raises(FormatError, match=r"8\.pt activation"):
        openai.FORMAT.read(laid.file)


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


def test_qwen_scope_refuses_square_matrices_and_an_unknown_k(tmp_path: Path) -> None:
    laid = lay_qwen_scope(tmp_path, Draw())
    square = {
        "W_enc": torch.eye(WIDTH),
        "b_enc": torch.ones(WIDTH),
        "W_dec": torch.eye(WIDTH),
        "b_dec": torch.ones(WIDTH),
    }
    save_torch(laid.file, square)
    with pytest.raises(FormatError, match=r"layer3\.sae\.pt W_enc: is square"):
        qwen_scope.FORMAT.read(laid.file)
    elsewhere = lay_qwen_scope(tmp_path / "a", Draw()).file.rename(tmp_path / "layer3.sae.pt")
    with pytest.raises(FormatError, match="k is in the repository's name"):
        qwen_scope.FORMAT.read(elsewhere)


def test_a_folder_of_many_layers_asks_for_one(tmp_path: Path) -> None:
    laid = lay_transcoders(tmp_path, Draw())
    save_safe(tmp_path / "layer_5.safetensors", {"W_enc": torch.ones(1)})
    with pytest.raises(FormatError, match=r"2 files like layer_\*\.safetensors, name one: layer_4"):
        transcoders.FORMAT.read(tmp_path)
    check(transcoders.FORMAT.read(laid.file)[0], laid)


def test_transcoders_with_a_threshold_are_jumprelu(tmp_path: Path) -> None:
    d = Draw()
    file = tmp_path / "qwen3-14b-transcoders/layer_4.safetensors"
    tensors = {"W_enc": d.w_enc, "b_enc": d.b_enc, "W_dec": d.w_dec, "b_dec": d.b_dec}
    save_safe(file, tensors | {"activation_function.threshold": d.threshold[None]})
    sae, said = transcoders.FORMAT.read(file)
    f = relu_above(d.x @ d.w_enc.T + d.b_enc, d.threshold)
    check(sae, Laid(transcoders.FORMAT, file, file, d.x, f, f @ d.w_dec + d.b_dec))
    assert (said.model, said.sites) == ("Qwen/Qwen3-14B", ("layers.4.mlp_in",))


@pytest.mark.parametrize(
    ("field", "value"),
    [("normalize_shift_back", False), ("input_normalize_eps", 1e-6), ("activation", "jumprelu"), ("num_experts", 4)],
)
def test_opensae_refuses_what_the_canonical_form_does_not_have(field: str, value: object, tmp_path: Path) -> None:
    laid = lay_opensae(tmp_path, Draw())
    settings = yaml.safe_load((laid.path / "config.json").read_text())
    save_json(laid.path / "config.json", settings | {field: value})
    with pytest.raises(FormatError, match=f"config.json.*{field}"):
        opensae.FORMAT.read(laid.path)


def test_opensae_without_normalisation_reads_x_itself(tmp_path: Path) -> None:
    d = Draw()
    laid = lay_opensae(tmp_path, d)
    settings = yaml.safe_load((laid.path / "config.json").read_text())
    save_json(laid.path / "config.json", settings | {"input_normalize": False, "normalize_shift_back": False})
    f = top((d.x - d.b_dec) @ d.w_enc.T + d.b_enc, K)
    check(opensae.FORMAT.read(laid.path)[0], replace(laid, f=f, y=f @ d.w_dec + d.b_dec))


def test_soft_routing_is_refused(tmp_path: Path) -> None:
    laid = LAYOUTS["route_sae"](tmp_path, Draw())
    soft = laid.file.rename(laid.file.with_name(laid.file.name.replace("hard", "soft")))
    with pytest.raises(FormatError, match="not soft"):
        route_sae.FORMAT.read(soft)


def test_plain_linear_layers_are_not_taken_without_a_layer_in_the_name(tmp_path: Path) -> None:
    save_torch(tmp_path / "ae.pt", linears(Draw()))
    assert deepseek_r1.FORMAT.recognise(tmp_path) is None
    assert goodfire.FORMAT.recognise(tmp_path) is None


def test_tensors_beside_the_known_ones_are_named(tmp_path: Path) -> None:
    d = Draw()
    save_torch(tmp_path / "x-SAE-l1.pt", linears(d, "encoder_linear", "decoder_linear") | {"scale": torch.ones(1)})
    with pytest.raises(FormatError, match=r"x-SAE-l1\.pt: unknown tensors scale"):
        goodfire.FORMAT.read(tmp_path)


def test_latents_number_as_many_as_the_encoder_has_rows(tmp_path: Path) -> None:
    sae = lay_openai(tmp_path, Draw()).format.read(tmp_path / "gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt")[0]
    assert (sae.latents, sae.width) == (LATENTS, WIDTH)
