"""SAEs saved by SAELens are read, and written SAEs load in SAELens; both encode and decode alike."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor

from rudder.sae_models.formats import saelens
from rudder.sae_models.formats.load import load
from rudder.sae_models.formats.source import Declaration, FormatError
from rudder.sae_models.sae import SAE, GroupMax, Normalisation, TopK
from tests.conformance.agreement import (
    D_OUT,
    TOLERANCE,
    D,
    F,
    K,
    assert_agrees,
    assert_close,
    assert_same,
    fill,
    on_edge,
    random_sae,
)

warnings.filterwarnings("ignore", category=UserWarning)

TRANSCODERS = ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]
NORMALISATIONS = ["none", "constant_norm_rescale", "layer_norm", "expected_average_only_in"]
METADATA = {"model_name": "textbook-lm", "hook_name": "blocks.2.hook_resid_post"}


def inference_sae(architecture: str, **config: Any) -> Any:
    """Return an inference SAE of SAELens with random weights."""
    config = {"architecture": architecture, "d_in": D, "d_sae": F, "metadata": dict(METADATA)} | config
    sae = sae_lens.SAE.from_dict(config)
    fill(sae)
    return sae


def trained(architecture: str, **config: Any) -> Any:
    """Return a training SAE of SAELens with random weights."""
    kind, settings = get_sae_training_class(architecture)
    sae = kind(settings.from_dict({"architecture": architecture, "d_in": D, "d_sae": F} | config))
    fill(sae)
    return sae


def run(theirs: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the library's latents and output."""
    with torch.no_grad():
        latents = theirs.encode(x)
        skip = x @ theirs.W_skip.T if hasattr(theirs, "W_skip") else 0.0
        return latents, theirs.decode(latents) + skip


def saved(theirs: Any, path: Path) -> SAE:
    """Save an SAE with the library and load it."""
    theirs.save_model(path)
    return load(path).sae


def edit(path: Path, **changes: Any) -> None:
    """Change the settings; None removes a field."""
    config = json.loads((path / "cfg.json").read_text()) | changes
    (path / "cfg.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated", "topk"])
def test_saes_agree(architecture: str, normalisation: str, pre_bias: bool, x: Tensor, tmp_path: Path) -> None:
    options = {"k": K} if architecture == "topk" else {}
    theirs = inference_sae(architecture, normalize_activations=normalisation, apply_b_dec_to_input=pre_bias, **options)
    assert_agrees(saved(theirs, tmp_path / "sae"), x, *run(theirs, x))


def test_layer_norm_of_small_inputs_agrees_to_its_constant(x: Tensor, tmp_path: Path) -> None:
    theirs, small = inference_sae("jumprelu", normalize_activations="layer_norm"), x / 500
    latents, output = run(theirs, small)
    sae = saved(theirs, tmp_path / "sae")
    assert_close(sae.encode(small), latents, on_edge(sae, small))
    assert float((sae.decode(latents, small) - output).norm() / output.norm()) < TOLERANCE


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_topk_whose_z_is_rescaled_by_the_decoder_norm_agrees(normalisation: str, x: Tensor, tmp_path: Path) -> None:
    theirs = inference_sae("topk", k=K, rescale_acts_by_decoder_norm=True, normalize_activations=normalisation)
    assert_agrees(saved(theirs, tmp_path / "sae"), x, *run(theirs, x))


@pytest.mark.parametrize("rescaled", [True, False])
def test_signed_latents_are_split_in_two(rescaled: bool, x: Tensor, tmp_path: Path) -> None:
    theirs = inference_sae("abstopk", k=K, rescale_acts_by_decoder_norm=rescaled)
    sae = saved(theirs, tmp_path / "sae")
    latents, output = run(theirs, x)
    both = torch.cat([latents.relu(), (-latents).relu()], -1)
    assert bool((latents < 0).any())
    assert_agrees(sae, x, both, output)


@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_transcoders_agree(architecture: str, x: Tensor, tmp_path: Path) -> None:
    names = {"hook_name": "blocks.2.hook_resid_mid", "hook_name_out": "blocks.2.hook_mlp_out"}
    theirs = inference_sae(architecture, d_out=D_OUT, apply_b_dec_to_input=False, metadata=names)
    assert_agrees(saved(theirs, tmp_path / "sae"), x, *run(theirs, x))
    declared = load(tmp_path / "sae").declared
    assert (declared.sites, declared.output_site) == (("layers.2.resid_mid",), "layers.2.mlp_out")


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated", "topk"])
@pytest.mark.parametrize("kind", ["checkpoint", "inference"])
def test_checkpoint_of_a_training_run_agrees(architecture: str, kind: str, x: Tensor, tmp_path: Path) -> None:
    training = trained(architecture, **({"k": K} if architecture == "topk" else {}))
    (training.save_model if kind == "checkpoint" else training.save_inference_model)(tmp_path / "sae")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    assert_agrees(load(tmp_path / "sae").sae, x, *run(theirs, x))


@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_batch_topk_agrees_as_saved_for_inference_and_as_a_checkpoint(
    architecture: str, rescaled: bool, x: Tensor, tmp_path: Path
) -> None:
    widths = {"matryoshka_widths": [64, 192, F]} if "matryoshka" in architecture else {}
    training = trained(architecture, k=K, rescale_acts_by_decoder_norm=rescaled, **widths)
    training.topk_threshold.fill_(1.5)
    training.save_model(tmp_path / "checkpoint")
    training.save_inference_model(tmp_path / "inference")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    assert theirs.cfg.architecture() == "jumprelu"
    for name in ("inference", "checkpoint"):
        assert_agrees(load(tmp_path / name).sae, x, *run(theirs, x))


def test_checkpoint_with_scaler_equals_the_final_sae(x: Tensor, tmp_path: Path) -> None:
    training = trained("standard", normalize_activations="expected_average_only_in")
    training.save_model(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "activation_scaler.json").write_text('{"scaling_factor": 0.31}')
    training.fold_activation_norm_scaling_factor(0.31)
    training.save_inference_model(tmp_path / "end")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "end")
    loaded = load(tmp_path / "checkpoint")
    assert "input_scale" in loaded.declared.folded
    assert_agrees(loaded.sae, x, *run(theirs, x))


@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "gated", "topk"])
def test_whitening_is_folded_like_in_saelens(architecture: str, pre_bias: bool, x: Tensor, tmp_path: Path) -> None:
    options = {"k": K} if architecture == "topk" else {}
    training = trained(
        architecture, normalize_activations="covariance_whitening", apply_b_dec_to_input=pre_bias, **options
    )
    training.save_model(tmp_path / "checkpoint")
    matrix = torch.eye(D) / 4 + torch.randn(D, D, generator=torch.Generator().manual_seed(5)) / 200
    statistics = {"mean": x.mean(0), "matrix": matrix, "inverse_matrix": torch.linalg.inv(matrix).contiguous()}
    save_file(statistics, tmp_path / "checkpoint" / "activation_whitening.safetensors")
    training.fold_activation_whitening(statistics["mean"], matrix, statistics["inverse_matrix"])
    training.save_inference_model(tmp_path / "end")
    assert_agrees(load(tmp_path / "checkpoint").sae, x, *run(sae_lens.SAE.load_from_disk(tmp_path / "end"), x))


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_flat_settings_before_version_6_agree(architecture: str, x: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "sae"
    theirs = inference_sae(architecture, **({"k": K} if architecture == "topk" else {}))
    theirs.save_model(path)
    activation = "topk" if architecture == "topk" else "relu"
    edit(
        path,
        architecture="standard" if architecture == "topk" else architecture,
        activation_fn_str=activation,
        activation_fn_kwargs={"k": K} if architecture == "topk" else {},
        hook_point="blocks.2.hook_resid_post",
        hook_point_layer=2,
        model_name="textbook-lm",
        normalize_activations=False,
        metadata=None,
        k=None,
        rescale_acts_by_decoder_norm=None,
    )
    loaded = load(path)
    assert loaded.declared.sites == ("layers.2.resid_post",)
    assert_agrees(loaded.sae, x, *run(sae_lens.SAE.load_from_disk(path), x))


def test_hook_z_sae_reads_flattened_heads(x: Tensor, tmp_path: Path) -> None:
    names = {"hook_name": "blocks.2.attn.hook_z"}
    theirs = inference_sae("standard", reshape_activations="hook_z", metadata=names)
    theirs.save_model(tmp_path / "sae")
    loaded, heads = load(tmp_path / "sae"), x.unflatten(-1, (4, -1))
    latents, output = run(theirs, heads)
    assert_agrees(loaded.sae, x, latents, output.flatten(-2))
    assert loaded.declared.sites == ()
    assert loaded.declared.notes["reshape_activations"] == "hook_z"


@pytest.mark.parametrize(
    ("sae", "declared", "architecture"),
    [
        (random_sae(), Declaration("x"), "standard"),
        (random_sae(thresholds=True), Declaration("x"), "jumprelu"),
        (random_sae(selection=TopK(K)), Declaration("x"), "topk"),
        (random_sae(d_out=D_OUT), Declaration("x"), "transcoder"),
        (random_sae(d_out=D_OUT, skip=True), Declaration("x"), "skip_transcoder"),
        (random_sae(d_out=D_OUT, thresholds=True), Declaration("x"), "jumprelu_transcoder"),
        (random_sae(skip=True, thresholds=True), Declaration("x"), "jumprelu_skip_transcoder"),
        (random_sae(), Declaration("x", ("layers.2.mlp_in",), "layers.2.mlp_out"), "transcoder"),
    ],
)
def test_written_sae_loads_in_the_library(
    sae: SAE, declared: Declaration, architecture: str, x: Tensor, tmp_path: Path
) -> None:
    saelens.write(tmp_path / "sae", sae, declared)
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    assert theirs.cfg.architecture() == architecture
    assert_agrees(sae, x, *run(theirs, x))
    assert_same(sae, load(tmp_path / "sae").sae, x)


@pytest.mark.parametrize("normalisation", [Normalisation.CONSTANT_NORM, Normalisation.LAYER_NORM])
def test_written_normalisation_is_applied_by_saelens(normalisation: Normalisation, x: Tensor, tmp_path: Path) -> None:
    plain = random_sae(thresholds=True)
    sae = SAE(
        plain.encoder, plain.bias, plain.threshold, plain.decoder, plain.decoder_bias, normalisation=normalisation
    )
    saelens.write(tmp_path / "sae", sae, Declaration("x"))
    assert_agrees(sae, x, *run(sae_lens.SAE.load_from_disk(tmp_path / "sae"), x))


def test_every_registered_architecture_is_read_or_refused_by_name(tmp_path: Path) -> None:
    theirs = set(SAE_CLASS_REGISTRY) | set(SAE_TRAINING_CLASS_REGISTRY)
    assert theirs == set(saelens.TENSORS) | set(saelens.REFUSED)
    inference_sae("matching_pursuit").save_model(tmp_path / "sae")
    with pytest.raises(FormatError, match="matching_pursuit cannot be served per token"):
        load(tmp_path / "sae")


def test_write_refuses_selections_that_saelens_lacks(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="selection: SAELens has no GroupMax"):
        saelens.write(tmp_path / "sae", random_sae(selection=GroupMax(K)), Declaration("x"))
    assert not (tmp_path / "sae").exists()


# Known defects of SAELens 6.54.


def test_sparsify_loader_of_saelens_transposes_the_decoder(tmp_path: Path) -> None:
    coder = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K))
    fill(coder)
    coder.save_to_disk(tmp_path / "layers.2")
    config, tensors = sparsify_disk_loader(tmp_path / "layers.2")
    assert tensors["W_dec"].shape == (D, F)
    assert coder.W_dec.shape == (F, D)
    assert config["apply_b_dec_to_input"] is False
    with pytest.raises(RuntimeError, match="size mismatch"):
        sae_lens.SAE.load_from_disk(tmp_path / "layers.2", converter=sparsify_disk_loader)


def test_finetuned_files_fold_although_saelens_cannot_load_them(x: Tensor, tmp_path: Path) -> None:
    path, theirs = tmp_path / "sae", inference_sae("standard")
    theirs.save_model(path)
    factor = 0.5 + torch.rand(F, generator=torch.Generator().manual_seed(1))
    save_file(
        load_file(path / "sae_weights.safetensors") | {"scaling_factor": factor}, path / "sae_weights.safetensors"
    )
    edit(path, finetuning_scaling_factor=True)
    with pytest.raises(RuntimeError, match="finetuning_scaling_factor"):
        sae_lens.SAE.load_from_disk(path)
    latents, _ = run(theirs, x)
    with torch.no_grad():
        assert_agrees(load(path).sae, x, latents, theirs.decode(latents * factor))


def test_tanh_sae_is_refused_although_saelens_reads_it_as_relu(tmp_path: Path) -> None:
    path = tmp_path / "sae"
    inference_sae("standard").save_model(path)
    edit(path, activation_fn_str="tanh-relu", metadata=None)
    assert sae_lens.SAE.load_from_disk(path).cfg.architecture() == "standard"
    with pytest.raises(FormatError, match="activation_fn: 'tanh-relu'"):
        load(path)


def test_missing_input_scale_is_noted_although_saelens_ignores_it(x: Tensor, tmp_path: Path) -> None:
    theirs = inference_sae("standard", normalize_activations="expected_average_only_in")
    plain = inference_sae("standard")
    assert_close(run(theirs, x)[0], run(plain, x)[0])
    theirs.save_model(tmp_path / "sae")
    assert "not in the files" in load(tmp_path / "sae").declared.notes["input_scale"]


def test_missing_whitening_is_refused_although_saelens_ignores_it(x: Tensor, tmp_path: Path) -> None:
    theirs = inference_sae("standard", normalize_activations="covariance_whitening")
    assert_close(run(theirs, x)[0], run(inference_sae("standard"), x)[0])
    theirs.save_model(tmp_path / "sae")
    with pytest.raises(FormatError, match=r"covariance_whitening without activation_whitening\.safetensors"):
        load(tmp_path / "sae")


def test_normalised_transcoder_is_refused_although_saelens_reads_it(x: Tensor, tmp_path: Path) -> None:
    theirs = inference_sae("transcoder", d_out=D, apply_b_dec_to_input=False, normalize_activations="layer_norm")
    latents, output = run(theirs, x)
    with torch.no_grad():
        assert_close(output, latents @ theirs.W_dec + theirs.b_dec)
    theirs.save_model(tmp_path / "sae")
    with pytest.raises(FormatError, match="normalize_activations: layer_norm of a transcoder"):
        load(tmp_path / "sae")


def test_saelens_loads_a_batch_topk_checkpoint_only_for_training(tmp_path: Path) -> None:
    trained("batchtopk", k=K).save_model(tmp_path / "sae")
    assert sae_lens.TrainingSAE.load_from_disk(tmp_path / "sae").cfg.architecture() == "batchtopk"
    with pytest.raises((KeyError, ValueError)):
        sae_lens.SAE.load_from_disk(tmp_path / "sae")


def test_edges_are_rare(x: Tensor, tmp_path: Path) -> None:
    sae = saved(inference_sae("jumprelu"), tmp_path / "sae")
    assert float(on_edge(sae, x).float().mean()) < 1e-3
