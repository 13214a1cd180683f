"""SAELens' files, written by hand: each variant agrees with its formula; invalid files are refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rudder.sae_models.formats import saelens
from rudder.sae_models.formats.load import load
from rudder.sae_models.formats.source import Declaration, FormatError
from rudder.sae_models.importing import importer as importing
from rudder.sae_models.sae import SAE, AdaptiveK, GroupMax, Normalisation, Router, TopK, activations

D, F, D_OUT = 6, 10, 4
CONFIG = {
    "architecture": "standard",
    "d_in": D,
    "d_sae": F,
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "metadata": {"sae_lens_version": "6.54.12", "model_name": "toy", "hook_name": "blocks.3.hook_resid_post"},
}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(d_out: int = D, **others: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a standard SAE, and others; an empty tensor removes one."""
    plain = {
        "W_enc": numbers(D, F, seed=1),
        "b_enc": numbers(F, seed=2),
        "W_dec": numbers(F, d_out, seed=3),
        "b_dec": numbers(d_out, seed=4),
    }
    return {key: tensor for key, tensor in (plain | others).items() if tensor.numel()}


def write_out(path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """Write a checkpoint; None removes a setting."""
    path.mkdir(exist_ok=True)
    settings = {key: value for key, value in (CONFIG | config).items() if value is not None}
    (path / "cfg.json").write_text(json.dumps(settings))
    save_file(tensors, path / "sae_weights.safetensors")
    return path


def read(path: Path, tensors: dict[str, Tensor], **config: Any) -> tuple[SAE, Declaration]:
    return saelens.read(write_out(path, tensors, **config))


X = numbers(32, D, seed=9)
NONE = torch.empty(0)


def test_standard_subtracts_its_decoder_bias_from_the_input(tmp_path: Path) -> None:
    t = weights()
    sae, declared = read(tmp_path, t)
    f = torch.relu((X - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
    assert torch.allclose(sae.encode(X), f, atol=1e-5)
    assert torch.allclose(sae.decode(f), f @ t["W_dec"] + t["b_dec"], atol=1e-5)
    assert (declared.sites, declared.model, declared.folded) == (("layers.3.resid_post",), "toy", ("pre_bias",))


CENTRED = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"apply_b_dec_to_input": False}, {"architecture": "topk", "k": 3}])
def test_centred_model_is_read_from_the_plain_stream(tmp_path: Path, settings: Any, dtype: torch.dtype) -> None:
    t = {name: tensor.to(dtype) for name, tensor in weights().items()}
    plain, _ = read(tmp_path / "plain", t, **settings)
    sae, declared = read(tmp_path / "centred", t, **settings, **CENTRED)
    x = X + 40 * numbers(32, 1, seed=8)
    centred = x - x.mean(1, keepdim=True)
    assert torch.allclose(sae.encode(x), plain.encode(centred), atol=1e-3)
    assert torch.allclose(sae.forward(x)[1], plain.forward(centred)[1], atol=1e-3)
    assert not torch.allclose(plain.encode(x), plain.encode(centred), atol=1)
    assert "centring" in declared.folded
    if sae.exact:
        rows = sae.exact_rows(torch.arange(F))
        assert torch.allclose(activations(x, rows), plain.encode(centred), atol=1e-3)


def test_settings_of_the_table_of_releases_replace_those_of_the_checkpoint(tmp_path: Path) -> None:
    path = write_out(tmp_path, weights(), context_size=64)
    declared = load(path, CENTRED | {"context_size": 128}).declared
    assert (declared.notes["context_size"], "centring" in declared.folded) == (128, True)
    assert "centring" not in load(path).declared.folded


@pytest.mark.parametrize("model", ["gemma-2-2b", "meta-llama/Llama-3.1-8B", "qwen2.5-7b", "mistral-7b"])
def test_model_with_rms_norm_is_not_centred(tmp_path: Path, model: str) -> None:
    metadata = {"model_name": model, "hook_name": "blocks.3.hook_resid_post"}
    sae, declared = read(tmp_path, weights(), metadata=metadata, **CENTRED)
    assert sae.skip is None
    assert declared.notes["center_writing_weights"] == f"not applied: {model} has RMSNorm"


def test_layer_norm_centres_already_and_other_normalisations_are_refused(tmp_path: Path) -> None:
    plain, _ = read(tmp_path / "a", weights(), normalize_activations="layer_norm")
    sae, _ = read(tmp_path / "b", weights(), normalize_activations="layer_norm", **CENTRED)
    assert torch.equal(sae.encode(X), plain.encode(X))
    with pytest.raises(FormatError, match=r"^center_writing_weights: .*constant_norm cannot be centred"):
        read(tmp_path / "c", weights(), normalize_activations="constant_norm_rescale", **CENTRED)
    with pytest.raises(FormatError, match="model_from_pretrained_kwargs: 3 is not a mapping"):
        read(tmp_path / "d", weights(), model_from_pretrained_kwargs=3)


def test_centred_sae_is_written_as_one_that_reads_a_centred_model(tmp_path: Path) -> None:
    sae, declared = read(tmp_path / "a", weights(), **CENTRED)
    saelens.write(tmp_path / "b", sae, declared)
    config = json.loads((tmp_path / "b" / "cfg.json").read_text())
    assert (config["architecture"], config["metadata"]["model_from_pretrained_kwargs"]) == (
        "standard",
        {"center_writing_weights": True},
    )
    again, _ = saelens.read(tmp_path / "b")
    assert torch.allclose(again.forward(X)[0], sae.forward(X)[0], atol=1e-5)


@pytest.mark.parametrize("rescaled", [False, True])
def test_input_scale_from_elsewhere_equals_one_in_the_files(rescaled: bool, tmp_path: Path) -> None:
    settings = {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": rescaled}
    path = write_out(tmp_path, weights(), **settings, normalize_activations="expected_average_only_in")
    outside = importing.with_input_scale(load(path), 0.25)
    (path / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    inside = load(path)
    assert torch.allclose(outside.sae.encode(X), inside.sae.encode(X), atol=1e-5)
    assert torch.allclose(outside.sae.forward(X)[0], inside.sae.forward(X)[0], atol=1e-5)
    assert sorted(outside.declared.folded) == sorted(inside.declared.folded)


def test_pre_bias_is_the_default(tmp_path: Path) -> None:
    assert read(tmp_path, weights(), apply_b_dec_to_input=None)[1].folded == ("pre_bias",)


def test_pre_bias_can_be_disabled(tmp_path: Path) -> None:
    t = weights()
    sae, declared = read(tmp_path, t, apply_b_dec_to_input=False)
    assert torch.allclose(sae.encode(X), torch.relu(X @ t["W_enc"] + t["b_enc"]), atol=1e-5)
    assert declared.folded == ()


def test_unchanged_matrices_keep_dtype_and_layout(tmp_path: Path) -> None:
    t = {key: tensor.bfloat16() for key, tensor in weights().items()}
    sae, _ = read(tmp_path, t)
    assert sae.encoder.dtype == sae.decoder.dtype == torch.bfloat16
    assert sae.encoder.stride() == (1, F)
    f = torch.relu((X - t["b_dec"].float()) @ t["W_enc"].float() + t["b_enc"].float())
    assert torch.allclose(sae.encode(X), f, atol=1e-5)


def test_jumprelu_applies_its_threshold_before_the_relu(tmp_path: Path) -> None:
    t = weights(threshold=torch.linspace(-1, 2, F))
    sae, _ = read(tmp_path, t, architecture="jumprelu")
    z = (X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    assert torch.allclose(sae.encode(X), torch.where(z > t["threshold"], torch.relu(z), 0.0), atol=1e-5)


def test_log_threshold_is_exponentiated(tmp_path: Path) -> None:
    sae, _ = read(tmp_path, weights(log_threshold=torch.full((F,), -1.0)), architecture="jumprelu")
    assert torch.allclose(sae.threshold, torch.full((F,), 0.36787944))


def test_topk_selects_the_largest(tmp_path: Path) -> None:
    t = weights()
    sae, declared = read(tmp_path, t, architecture="topk", k=3)
    z = (X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    values, at = z.topk(3)
    assert torch.allclose(sae.encode(X), torch.zeros(32, F).scatter(1, at, torch.relu(values)), atol=1e-5)
    assert declared.l0 == 3


def test_topk_rescaled_by_the_decoder_norm_folds_the_norm(tmp_path: Path) -> None:
    t = weights()
    t["W_dec"] = t["W_dec"] * torch.linspace(0.2, 3, F)[:, None]
    sae, declared = read(tmp_path, t, architecture="topk", k=3, rescale_acts_by_decoder_norm=True)
    norm = t["W_dec"].norm(dim=1)
    values, at = (((X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * norm).topk(3)
    f = torch.zeros(32, F).scatter(1, at, torch.relu(values))
    assert torch.allclose(sae.encode(X), f, atol=1e-5)
    assert torch.allclose(sae.decode(f), (f / norm) @ t["W_dec"] + t["b_dec"], atol=1e-5)
    assert declared.folded == ("pre_bias", "decoder_norm")


def test_latent_with_zero_decoder_is_inactive_after_rescaling(tmp_path: Path) -> None:
    t = weights()
    t["W_dec"][4] = 0.0
    sae, _ = read(tmp_path, t, architecture="topk", k=F, rescale_acts_by_decoder_norm=True)
    assert bool(sae.decoder.isfinite().all())
    assert bool((sae.encode(X)[:, 4] == 0).all())


def test_abstopk_selects_the_largest_magnitudes(tmp_path: Path) -> None:
    t = weights()
    sae, declared = read(tmp_path, t, architecture="abstopk", k=3)
    z = (X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    f = torch.zeros(32, F).scatter(1, z.abs().topk(3).indices, 1.0) * z
    assert torch.allclose(sae.encode(X), torch.cat([f.relu(), (-f).relu()], 1), atol=1e-5)
    assert torch.allclose(sae.forward(X)[0], f @ t["W_dec"] + t["b_dec"], atol=1e-5)
    assert "negative part" in declared.notes["signs"]


def test_gated_becomes_jumprelu(tmp_path: Path) -> None:
    t = weights(b_enc=NONE, b_gate=numbers(F, seed=5), b_mag=numbers(F, seed=6), r_mag=numbers(F, seed=7) / 3)
    sae, declared = read(tmp_path, t, architecture="gated")
    h = (X - t["b_dec"]) @ t["W_enc"]
    f = torch.relu(h * t["r_mag"].exp() + t["b_mag"]) * (h + t["b_gate"] > 0)
    assert torch.allclose(sae.encode(X), f, atol=1e-5)
    assert declared.folded == ("gate", "pre_bias")


@pytest.mark.parametrize("normalisation", ["constant_norm_rescale", "layer_norm"])
def test_inputs_are_normalised_before_the_pre_bias(normalisation: str, tmp_path: Path) -> None:
    t = weights(threshold=torch.full((F,), 0.4))
    sae, _ = read(tmp_path, t, architecture="jumprelu", normalize_activations=normalisation)
    x = 7 * X + 3
    if normalisation == "layer_norm":
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        h = (x - mean) / (std + 1e-5)
    else:
        mean, std = torch.zeros(()), x.norm(dim=1, keepdim=True) / D**0.5
        h = x / std
    z = (h - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    f = torch.where(z > 0.4, z, 0.0)
    assert torch.allclose(sae.encode(x), f, atol=1e-5)
    assert torch.allclose(sae.decode(f, x), (f @ t["W_dec"] + t["b_dec"]) * std + mean, atol=1e-4)


def test_input_scale_multiplies_the_input_and_divides_the_output(tmp_path: Path) -> None:
    t = weights()
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    sae, declared = read(tmp_path, t, normalize_activations="expected_average_only_in")
    f = torch.relu((0.25 * X - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
    assert torch.allclose(sae.encode(X), f, atol=1e-5)
    assert torch.allclose(sae.decode(f), (f @ t["W_dec"] + t["b_dec"]) / 0.25, atol=1e-4)
    assert declared.folded == ("pre_bias", "input_scale")


def test_missing_input_scale_is_assumed_to_be_1_with_a_note(tmp_path: Path) -> None:
    t = weights()
    sae, declared = read(tmp_path, t, normalize_activations=True)
    assert torch.allclose(sae.encode(X), torch.relu((X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]), atol=1e-5)
    assert declared.notes["input_scale"].startswith("not in the files")


@pytest.mark.parametrize("pre_bias", [True, False])
def test_whitening_maps_the_input_and_the_output_back(pre_bias: bool, tmp_path: Path) -> None:
    t, mean = weights(), numbers(D, seed=6)
    matrix = torch.eye(D) + numbers(D, D, seed=7) / 5
    inverse = torch.linalg.inv(matrix).contiguous()
    statistics = {"mean": mean, "matrix": matrix, "inverse_matrix": inverse}
    save_file(statistics, tmp_path / "activation_whitening.safetensors")
    settings = {"normalize_activations": "covariance_whitening", "apply_b_dec_to_input": pre_bias}
    sae, _ = read(tmp_path, t, **settings)
    f = torch.relu(((X - mean) @ matrix - pre_bias * t["b_dec"]) @ t["W_enc"] + t["b_enc"])
    assert torch.allclose(sae.encode(X), f, atol=1e-4)
    assert torch.allclose(sae.decode(f), (f @ t["W_dec"] + t["b_dec"]) @ inverse + mean, atol=1e-4)


def test_finetuning_factors_scale_the_decoder(tmp_path: Path) -> None:
    t = weights(scaling_factor=torch.linspace(0.5, 1.5, F))
    sae, _ = read(tmp_path, t, finetuning_scaling_factor=True)
    f = torch.relu((X - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
    assert torch.allclose(sae.encode(X), f, atol=1e-5)
    assert torch.allclose(sae.decode(f), (f * t["scaling_factor"]) @ t["W_dec"] + t["b_dec"], atol=1e-5)


def test_finetuning_factors_of_one_change_nothing(tmp_path: Path) -> None:
    t = weights(scaling_factor=torch.ones(F))
    assert torch.equal(read(tmp_path, t)[0].decoder, t["W_dec"])


@pytest.mark.parametrize("jumps", [True, False])
@pytest.mark.parametrize("skips", [True, False])
def test_transcoders_read_one_site_and_write_another(jumps: bool, skips: bool, tmp_path: Path) -> None:
    t = weights(D_OUT, threshold=torch.full((F,), 0.5) if jumps else NONE, W_skip=numbers(D_OUT, D) if skips else NONE)
    architecture = "jumprelu_" * jumps + "skip_" * skips + "transcoder"
    names = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    sae, declared = read(tmp_path, t, architecture=architecture, d_out=D_OUT, metadata=names)
    z = X @ t["W_enc"] + t["b_enc"]
    f = torch.where(z > (0.5 if jumps else 0.0), z, 0.0)
    skip = X @ t["W_skip"].T if skips else 0.0
    assert torch.allclose(sae.decode(sae.encode(X), X), f @ t["W_dec"] + t["b_dec"] + skip, atol=1e-5)
    assert (declared.sites, declared.output_site) == (("layers.1.mlp_in",), "layers.1.mlp_out")


@pytest.mark.parametrize("rescaled", [True, False])
def test_batch_topk_checkpoint_has_one_threshold_for_rescaled_latents(rescaled: bool, tmp_path: Path) -> None:
    t = weights(topk_threshold=torch.tensor(1.25, dtype=torch.float64))
    sae, _ = read(tmp_path, t, architecture="batchtopk", k=3, rescale_acts_by_decoder_norm=rescaled)
    norm = t["W_dec"].norm(dim=1) if rescaled else torch.ones(F)
    z = ((X - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * norm
    assert torch.allclose(sae.encode(X), torch.where(z > 1.25, z, 0.0), atol=1e-5)
    assert sae.exact


@pytest.mark.parametrize("activation", ["activation_fn", "activation_fn_str"])
def test_settings_before_version_6_are_read_by_their_old_names(activation: str, tmp_path: Path) -> None:
    old = {activation: "topk", "activation_fn_kwargs": {"k": 2}, "hook_point": "blocks.5.hook_resid_pre"}
    sae, declared = read(tmp_path, weights(), metadata=None, architecture=None, normalize_activations=None, **old)
    assert sae.selection == TopK(2)
    assert (declared.architecture, declared.sites) == ("topk", ("layers.5.resid_pre",))


def test_attention_heads_have_no_site_but_a_note(tmp_path: Path) -> None:
    _, heads = read(tmp_path, weights(), metadata={"hook_name": "blocks.1.attn.hook_z"})
    _, head = read(tmp_path, weights(), metadata={"hook_name": "blocks.1.hook_attn_out", "hook_head_index": 3})
    assert heads.sites == head.sites == ()
    assert "every head" in heads.notes["site"]
    assert head.notes["site"].startswith("head 3 of")


def test_frequencies_beside_the_weights_are_noted(tmp_path: Path) -> None:
    save_file({"sparsity": torch.full((F,), -2.5)}, tmp_path / "sparsity.safetensors")
    _, declared = read(tmp_path, weights())
    assert torch.equal(declared.notes["log10_frequency"], torch.full((F,), -2.5))


def test_orientation_follows_the_lengths_of_the_biases(tmp_path: Path) -> None:
    t = weights()
    other = t | {"W_enc": t["W_enc"].T.contiguous(), "W_dec": t["W_dec"].T.contiguous()}
    (tmp_path / "other").mkdir()
    assert torch.allclose(read(tmp_path / "other", other)[0].encode(X), read(tmp_path, t)[0].encode(X), atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (weights(W_enc=numbers(D, D), b_enc=numbers(D), W_dec=numbers(D, D)), {"d_sae": D}, "W_enc: is square"),
        (weights(W_enc=numbers(D, F + 1)), {}, r"W_enc: shape \(6, 11\), neither \(10, 6\) nor"),
        (weights(W_dec=numbers(F, D + 1)), {}, "W_dec: shape"),
        (weights(b_enc=numbers(F + 1)), {}, "b_enc: shape"),
        (weights(b_enc=NONE), {}, "b_enc: missing among W_dec, W_enc, b_dec"),
        (weights(b_dec=torch.full((D,), torch.nan)), {}, "b_dec: has values that are not finite"),
        (weights(W_enc=torch.full((D, F), torch.inf)), {}, "W_enc: has values that are not finite"),
        (weights(W_enc=torch.ones(D, F, dtype=torch.int32)), {}, "W_enc: is not a tensor of floating-point"),
        (weights(threshold=numbers(F)), {}, "unknown tensors threshold"),
        (weights(log_threshold=numbers(F)), {}, "unknown tensors log_threshold"),
        (weights(threshold=torch.tensor(1.0)), {"architecture": "jumprelu"}, r"threshold: shape \(\)"),
        (weights(), {"architecture": "temporal"}, "temporal cannot be served per token: its latents depend"),
        (weights(), {"architecture": "matching_pursuit"}, "matching_pursuit cannot be served per token"),
        (weights(), {"architecture": "crosscoder"}, "architecture: 'crosscoder', not one of standard"),
        (weights(), {"architecture": ["standard"]}, "architecture"),
        (weights(), {"activation_fn_str": "tanh-relu"}, "activation_fn: 'tanh-relu'"),
        (weights(), {"architecture": "topk", "k": F + 1}, "k: 11, not a whole number from 1 to 10"),
        (weights(), {"architecture": "topk"}, "k: None"),
        (weights(), {"d_in": True}, "d_in: True, not a whole number"),
        (weights(), {"d_sae": "10"}, "d_sae: '10'"),
        (weights(), {"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input: 'yes'"),
        (weights(), {"normalize_activations": "batch"}, "normalize_activations: 'batch'"),
        (weights(), {"normalize_activations": "covariance_whitening"}, "without activation_whitening"),
        (weights(), {"metadata": "none"}, "metadata: is not an object"),
        (
            weights(),
            {"architecture": "transcoder", "d_out": D, "normalize_activations": "layer_norm"},
            "layer_norm of a",
        ),
        (weights(scaling_factor=torch.full((D,), 2.0)), {}, "scaling_factor: shape"),
    ],
)
def test_invalid_content_is_refused_by_file_and_field(
    tensors: dict[str, Tensor], config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=message):
        read(tmp_path, tensors, **config)


@pytest.mark.parametrize("scale", ["0", "-1", "NaN", "Infinity", '"1"', "null"])
def test_invalid_input_scale_is_refused(scale: str, tmp_path: Path) -> None:
    (tmp_path / "activation_scaler.json").write_text(f'{{"scaling_factor": {scale}}}')
    with pytest.raises(FormatError, match=r"activation_scaler\.json scaling_factor"):
        read(tmp_path, weights(), normalize_activations="expected_average_only_in")


def plain() -> SAE:
    t = weights()
    return SAE(t["W_enc"].T, t["b_enc"], torch.zeros(F), t["W_dec"], t["b_dec"])


def test_written_sae_survives_reading(tmp_path: Path) -> None:
    declared = Declaration("batch_topk", ("layers.3.resid_pre",), model="toy")
    sae = replace(plain(), threshold=torch.full((F,), 0.5), normalisation=Normalisation.LAYER_NORM)
    saelens.write(tmp_path / "sae", sae, declared)
    again, read_back = saelens.read(tmp_path / "sae")
    assert read_back.architecture == "jumprelu"
    assert (read_back.sites, read_back.model, read_back.folded) == (("layers.3.resid_pre",), "toy", ())
    assert torch.equal(again.encode(X), sae.encode(X))
    assert torch.equal(again.forward(X)[0], sae.forward(X)[0])


def test_written_skip_transcoder_survives_reading(tmp_path: Path) -> None:
    t = weights(D_OUT)
    sae = SAE(t["W_enc"].T, t["b_enc"], torch.zeros(F), t["W_dec"], t["b_dec"], skip=numbers(D, D_OUT, seed=8))
    saelens.write(tmp_path / "sae", sae, Declaration("x", ("layers.3.mlp_in",), "layers.3.mlp_out"))
    again, read_back = saelens.read(tmp_path / "sae")
    assert (read_back.architecture, read_back.output_site) == ("skip_transcoder", "layers.3.mlp_out")
    assert torch.allclose(again.decode(again.encode(X), X), sae.decode(sae.encode(X), X))


def test_bfloat16_matrices_are_written_in_bfloat16(tmp_path: Path) -> None:
    sae = replace(plain(), encoder=plain().encoder.bfloat16(), decoder=plain().decoder.bfloat16())
    saelens.write(tmp_path / "sae", sae, Declaration("standard"))
    again, _ = saelens.read(tmp_path / "sae")
    assert torch.equal(again.encoder, sae.encoder)
    assert again.encoder.dtype == torch.bfloat16


ADAPTIVE = AdaptiveK(torch.zeros(D), torch.zeros(()), 1, 3)


@pytest.mark.parametrize(
    ("sae", "message"),
    [
        (replace(plain(), selection=GroupMax(2)), "selection: SAELens has no GroupMax"),
        (replace(plain(), selection=ADAPTIVE), "selection: SAELens has no AdaptiveK"),
        (replace(plain(), selection=TopK(2), threshold=torch.ones(F)), "no topk with thresholds"),
        (replace(plain(), selection=TopK(2), skip=torch.eye(D)), "nor of a transcoder"),
        (
            replace(plain(), skip=torch.eye(D), normalisation=Normalisation.LAYER_NORM),
            "normalisation: SAELens does not",
        ),
        (replace(plain(), router=Router(torch.zeros(2, D))), "router: SAELens has no SAE"),
    ],
)
def test_write_refuses_what_saelens_cannot_represent(sae: SAE, message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=message):
        saelens.write(tmp_path / "sae", sae, Declaration("x"))
    assert list(tmp_path.iterdir()) == []


def test_write_refuses_an_existing_path(tmp_path: Path) -> None:
    saelens.write(tmp_path / "sae", plain(), Declaration("x"))
    with pytest.raises(FormatError, match="sae: is there already"):
        saelens.write(tmp_path / "sae", plain(), Declaration("x"))
