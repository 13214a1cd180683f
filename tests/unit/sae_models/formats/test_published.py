"""Readers of published formats agree with each format's own arithmetic."""

import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rudder.sae_models.formats import (
    adaptive_k,
    cross_layer,
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
from rudder.sae_models.formats.source import Declaration, FormatError
from rudder.sae_models.sae import LAYER_NORM_EPSILON, Normalisation, TopK
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
    save_npz,
    save_safe,
    save_torch,
    top,
    write_gemma_scope,
    write_gemma_scope_2,
    write_openai,
    write_opensae,
    write_qwen_scope,
    write_route_sae,
    write_transcoders,
)

READERS = (
    adaptive_k,
    cross_layer,
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


@pytest.mark.parametrize("name", LAYOUTS)
def test_encode_and_decode_agree_with_the_format(name: str, tmp_path: Path) -> None:
    checkpoint = LAYOUTS[name](tmp_path, Draw())
    assert checkpoint.format.name == name
    assert checkpoint.format.recognise(checkpoint.path)
    assert checkpoint.format.recognise(checkpoint.file)
    for path in (checkpoint.path, checkpoint.file):
        check(checkpoint.format.read(path)[0], checkpoint, 3e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_format_recognises_only_its_own_checkpoints(name: str, tmp_path: Path) -> None:
    checkpoint = LAYOUTS[name](tmp_path, Draw())
    assert [reader.FORMAT.name for reader in READERS if reader.FORMAT.recognise(checkpoint.path)] == [name]


def matrices(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the encoder and decoder in a checkpoint."""
    names: list[str] = []

    def look(content: dict[str, Any]) -> dict[str, Any]:
        names.extend(key for key, value in content.items() if getattr(value, "shape", ()) in MATRICES)
        return content

    rewrite(checkpoint.file, look)
    assert len(names) == 2
    return names


def transposed(key: str, content: dict[str, Any]) -> dict[str, Any]:
    """Return the content with a matrix transposed."""
    return content | {key: content[key].T.contiguous()}


def without(key: str, content: dict[str, Any]) -> dict[str, Any]:
    """Return the content without a tensor."""
    return {name: value for name, value in content.items() if name != key}


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "qwen_scope"])
def test_transposed_matrix_is_refused_by_name(name: str, tmp_path: Path) -> None:
    for key in matrices(LAYOUTS[name](tmp_path, Draw())):
        checkpoint = LAYOUTS[name](tmp_path, Draw())
        rewrite(checkpoint.file, partial(transposed, key))
        with pytest.raises(FormatError, match=rf"{checkpoint.file.name}.* {re.escape(key)}: shape"):
            checkpoint.format.read(checkpoint.path)


@pytest.mark.parametrize("name", LAYOUTS)
def test_missing_matrix_is_refused_by_name(name: str, tmp_path: Path) -> None:
    for key in matrices(LAYOUTS[name](tmp_path, Draw())):
        checkpoint = LAYOUTS[name](tmp_path, Draw())
        rewrite(checkpoint.file, partial(without, key))
        with pytest.raises(FormatError, match=rf" {re.escape(key)}: missing among"):
            checkpoint.format.read(checkpoint.path)


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
    checkpoint = LAYOUTS[name](tmp_path, Draw())
    read = checkpoint.format.read(checkpoint.path)[1]
    assert ("".join(read.sites), read.output_site, read.model, read.l0) == declared


def test_gemma_scope_reads_lower_case_names_too(tmp_path: Path) -> None:
    checkpoint = write_gemma_scope(tmp_path, Draw(), "w_")
    check(gemma_scope.FORMAT.read(checkpoint.file)[0], checkpoint)


def gemma_scope_at(home: Path, where: str) -> Declaration:
    """Return the declaration of a Gemma Scope SAE at a path."""
    d = Draw()
    tensors = {"W_enc": d.w_enc.T, "W_dec": d.w_dec, "b_enc": d.b_enc, "b_dec": d.b_dec, "threshold": d.threshold}
    save_npz(home / where / "params.npz", tensors)
    return gemma_scope.FORMAT.read(home / where)[1]


def test_gemma_scope_declaration_comes_from_the_path(tmp_path: Path) -> None:
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


def test_gemma_scope_embedding_sae_reads_scaled_embeddings(tmp_path: Path) -> None:
    d = Draw()
    folder = tmp_path / "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"
    tensors = {"W_enc": d.w_enc.T, "W_dec": d.w_dec, "b_enc": d.b_enc, "b_dec": d.b_dec, "threshold": d.threshold}
    save_npz(folder / "params.npz", tensors)
    sae, declared = gemma_scope.FORMAT.read(folder)
    embedding = d.x / math.sqrt(WIDTH)
    f = relu_above(embedding @ d.w_enc.T + d.b_enc, d.threshold)
    check(sae, Checkpoint(gemma_scope.FORMAT, folder, folder, d.x, f, math.sqrt(WIDTH) * (f @ d.w_dec + d.b_dec)))
    assert (declared.sites, declared.folded) == (("embed",), ("input_scale",))


def test_gemma_scope_2_without_settings_takes_the_site_from_its_folder(tmp_path: Path) -> None:
    checkpoint = write_gemma_scope_2(tmp_path, Draw())
    (checkpoint.path / "config.json").unlink()
    sae, declared = gemma_scope_2.FORMAT.read(checkpoint.path)
    check(sae, checkpoint)
    assert (declared.sites, declared.output_site) == (("layers.7.mlp_in",), "layers.7.mlp_out")
    assert declared.model == "google/gemma-3-1b-pt"


def test_gemma_scope_2_attention_has_no_site_and_a_missing_skip_is_named(tmp_path: Path) -> None:
    d = Draw()
    tensors = {"w_enc": d.w_enc.T, "w_dec": d.w_dec, "b_enc": d.b_enc, "b_dec": d.b_dec, "threshold": d.threshold}
    folder = tmp_path / "gemma-scope-2-4b-it/attn_out/layer_9_width_16k_l0_medium"
    save_safe(folder / "params.safetensors", tensors)
    declared = gemma_scope_2.FORMAT.read(folder)[1]
    assert (declared.sites, declared.notes["hook"]) == ((), "model.layers.9.self_attn.o_proj.input")
    save_json(folder / "config.json", {"architecture": "jump_relu", "affine_connection": True})
    with pytest.raises(FormatError, match="affine_skip_connection: missing"):
        gemma_scope_2.FORMAT.read(folder)


def test_openai_subtracts_the_pre_bias_after_the_layer_norm(tmp_path: Path) -> None:
    d = Draw()
    checkpoint = write_openai(tmp_path, d)
    before = torch.nn.functional.layer_norm(d.x - d.b_dec, (WIDTH,))
    other = top(before @ d.w_enc.T + d.b_enc, K)
    assert float((other - checkpoint.f).abs().max()) > 0.1
    sae, declared = openai.FORMAT.read(checkpoint.path)
    check(sae, checkpoint)
    assert (sae.selection, sae.normalisation, declared.folded) == (TopK(K), Normalisation.LAYER_NORM, ("pre_bias",))


def test_openai_relu_is_not_normalised(tmp_path: Path) -> None:
    d = Draw()
    content = {"pre_bias": d.b_dec, "latent_bias": d.b_enc, "encoder.weight": d.w_enc}
    save_torch(tmp_path / "0.pt", content | {"decoder.weight": d.w_dec.T.contiguous(), "activation": "ReLU"})
    f = ((d.x - d.b_dec) @ d.w_enc.T + d.b_enc).relu()
    file = tmp_path / "0.pt"
    check(openai.FORMAT.read(file)[0], Checkpoint(openai.FORMAT, file, file, d.x, f, f @ d.w_dec + d.b_dec))


@pytest.mark.parametrize(
    ("where", "site"),
    [
        ("gpt2-small/resid_post_mlp/autoencoders/3.pt", ("layers.3.resid_post",)),
        ("gpt2-small/resid_post_attn_v5_128k/autoencoders/0.pt", ("layers.0.resid_mid",)),
        ("gpt2-small/resid_delta_mlp_v5_32k/autoencoders/11.pt", ("layers.11.mlp_out",)),
        ("gpt2-small/resid_delta_attn/autoencoders/7.pt", ("layers.7.attn_out",)),
        ("gpt2-small/mlp_post_act/autoencoders/7.pt", ()),
        ("elsewhere/7.pt", ()),
    ],
)
def test_openai_names_locations_in_its_paths(where: str, site: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / where
    file.parent.mkdir(parents=True)
    write_openai(tmp_path / "as published", Draw()).file.rename(file)
    assert openai.FORMAT.read(file)[1].sites == site


def test_openai_topk_without_relu_is_refused(tmp_path: Path) -> None:
    checkpoint = write_openai(tmp_path, Draw())
    content = torch.load(checkpoint.file)
    content["activation_state_dict"]["postact_fn"] = "Identity"
    save_torch(checkpoint.file, content)
    with pytest.raises(FormatError, match=r"8\.pt activation"):
        openai.FORMAT.read(checkpoint.file)


def test_qwen_scope_refuses_square_matrices_and_an_unknown_k(tmp_path: Path) -> None:
    checkpoint = write_qwen_scope(tmp_path, Draw())
    square = {
        "W_enc": torch.eye(WIDTH),
        "b_enc": torch.ones(WIDTH),
        "W_dec": torch.eye(WIDTH),
        "b_dec": torch.ones(WIDTH),
    }
    save_torch(checkpoint.file, square)
    with pytest.raises(FormatError, match=r"layer3\.sae\.pt W_enc: is square"):
        qwen_scope.FORMAT.read(checkpoint.file)
    elsewhere = write_qwen_scope(tmp_path / "a", Draw()).file.rename(tmp_path / "layer3.sae.pt")
    with pytest.raises(FormatError, match="k is in the repository's name"):
        qwen_scope.FORMAT.read(elsewhere)


def test_folder_with_several_layers_is_refused(tmp_path: Path) -> None:
    checkpoint = write_transcoders(tmp_path, Draw())
    save_safe(tmp_path / "layer_5.safetensors", {"W_enc": torch.ones(1)})
    with pytest.raises(FormatError, match=r"2 files like layer_\*\.safetensors, name one: layer_4"):
        transcoders.FORMAT.read(tmp_path)
    check(transcoders.FORMAT.read(checkpoint.file)[0], checkpoint)


def test_transcoders_with_a_threshold_are_jumprelu(tmp_path: Path) -> None:
    d = Draw()
    file = tmp_path / "qwen3-14b-transcoders/layer_4.safetensors"
    tensors = {"W_enc": d.w_enc, "b_enc": d.b_enc, "W_dec": d.w_dec, "b_dec": d.b_dec}
    save_safe(file, tensors | {"activation_function.threshold": d.threshold[None]})
    sae, declared = transcoders.FORMAT.read(file)
    f = relu_above(d.x @ d.w_enc.T + d.b_enc, d.threshold)
    check(sae, Checkpoint(transcoders.FORMAT, file, file, d.x, f, f @ d.w_dec + d.b_dec))
    assert (declared.model, declared.sites) == ("Qwen/Qwen3-14B", ("layers.4.mlp_in",))


def test_transcoders_with_too_few_thresholds_are_refused(tmp_path: Path) -> None:
    checkpoint = write_transcoders(tmp_path, Draw())
    rewrite(checkpoint.file, lambda content: content | {"threshold": torch.ones(LATENTS - 1)})
    with pytest.raises(FormatError, match=r"layer_4\.safetensors threshold: 23 thresholds for 24 latents"):
        transcoders.FORMAT.read(checkpoint.file)


@pytest.mark.parametrize(
    ("field", "value"),
    [("normalize_shift_back", False), ("input_normalize_eps", 1e-6), ("activation", "jumprelu"), ("num_experts", 4)],
)
def test_opensae_refuses_settings_outside_the_canonical_form(field: str, value: object, tmp_path: Path) -> None:
    checkpoint = write_opensae(tmp_path, Draw())
    settings = yaml.safe_load((checkpoint.path / "config.json").read_text())
    save_json(checkpoint.path / "config.json", settings | {field: value})
    with pytest.raises(FormatError, match=f"config.json.*{field}"):
        opensae.FORMAT.read(checkpoint.path)


def test_opensae_without_normalisation_reads_x_itself(tmp_path: Path) -> None:
    d = Draw()
    checkpoint = write_opensae(tmp_path, d)
    settings = yaml.safe_load((checkpoint.path / "config.json").read_text())
    save_json(checkpoint.path / "config.json", settings | {"input_normalize": False, "normalize_shift_back": False})
    f = top((d.x - d.b_dec) @ d.w_enc.T + d.b_enc, K)
    check(opensae.FORMAT.read(checkpoint.path)[0], replace(checkpoint, f=f, y=f @ d.w_dec + d.b_dec))


def test_route_sae_uses_its_own_epsilon(tmp_path: Path) -> None:
    checkpoint = write_route_sae(tmp_path, Draw(), size=1e-4)
    sae = route_sae.FORMAT.read(checkpoint.path)[0]
    check(sae, checkpoint)
    usual = replace(sae, epsilon=LAYER_NORM_EPSILON).encode(checkpoint.x)
    assert float((usual - checkpoint.f).abs().max()) > 0.01 * float(checkpoint.f.max()), "any epsilon would do"


def test_goodfire_names_model_and_layer_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "Llama-3.3-70B-Instruct-SAE-l50.pt"
    save_torch(file, linears(Draw(), "encoder_linear", "decoder_linear"))
    declared = goodfire.FORMAT.read(tmp_path)[1]
    assert (declared.sites, declared.model) == (("layers.50.resid_post",), "meta-llama/Llama-3.3-70B-Instruct")


def test_soft_routing_is_refused(tmp_path: Path) -> None:
    checkpoint = LAYOUTS["route_sae"](tmp_path, Draw())
    soft = checkpoint.file.rename(checkpoint.file.with_name(checkpoint.file.name.replace("hard", "soft")))
    with pytest.raises(FormatError, match="not soft"):
        route_sae.FORMAT.read(soft)


def test_linear_layers_without_a_layer_in_the_name_are_not_recognised(tmp_path: Path) -> None:
    save_torch(tmp_path / "ae.pt", linears(Draw()))
    assert deepseek_r1.FORMAT.recognise(tmp_path) is None
    assert goodfire.FORMAT.recognise(tmp_path) is None


def test_unknown_tensors_are_refused_by_name(tmp_path: Path) -> None:
    d = Draw()
    save_torch(tmp_path / "x-SAE-l1.pt", linears(d, "encoder_linear", "decoder_linear") | {"scale": torch.ones(1)})
    with pytest.raises(FormatError, match=r"x-SAE-l1\.pt: unknown tensors scale"):
        goodfire.FORMAT.read(tmp_path)


def test_number_of_latents_is_the_number_of_encoder_rows(tmp_path: Path) -> None:
    sae = write_openai(tmp_path, Draw()).format.read(tmp_path / "gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt")[0]
    assert (sae.latents, sae.width) == (LATENTS, WIDTH)
