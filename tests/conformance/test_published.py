"""Published checkpoints read like by SAELens' loaders.

The checkpoints are written by hand; only the download is replaced, by a folder.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.registry import get_sae_class
from safetensors import safe_open
from torch import Tensor

from rudder.sae_models.formats import cross_layer
from tests.conformance.agreement import assert_agrees
from tests.unit.checkpoints import (
    LATENTS,
    WIDTH,
    Checkpoint,
    Draw,
    cross_layer_folder,
    rewrite,
    write_deepseek_r1,
    write_gemma_scope,
    write_gemma_scope_2,
    write_goodfire,
    write_llama_scope,
    write_llamascopium,
    write_qwen_scope,
    write_transcoders,
)

SIZES = {"d_in": WIDTH, "d_sae": LATENTS, "dtype": "float32"}
WANDB = f"d_model: {{value: {WIDTH}}}\nd_feature: {{value: {LATENTS}}}\nbatch_size: {{value: 8}}\n"


class Known(NamedTuple):
    """SAELens' parameters of a checkpoint: loader, repository, path within it, overrides; `write` writes it."""

    write: Callable[[Path, Draw], Checkpoint]
    loader: Callable[..., Any]
    repository: str
    within: str
    overrides: dict[str, Any]


KNOWN = {
    "gemma_scope": Known(
        write_gemma_scope,
        loaders.gemma_2_sae_huggingface_loader,
        "google/gemma-scope-2b-pt-res",
        "layer_20/width_16k/average_l0_71",
        SIZES,
    ),
    "gemma_scope_2": Known(
        write_gemma_scope_2,
        loaders.gemma_3_sae_huggingface_loader,
        "google/gemma-scope-2-1b-pt",
        "transcoder_all/layer_7_width_16k_l0_small_affine",
        {},
    ),
    "goodfire": Known(
        write_goodfire,
        loaders.get_goodfire_huggingface_loader,
        "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
        "Llama-3.1-8B-Instruct-SAE-l19.pth",
        SIZES,
    ),
    "deepseek_r1": Known(
        write_deepseek_r1,
        loaders.deepseek_r1_sae_huggingface_loader,
        "any",
        "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt",
        SIZES,
    ),
    "qwen_scope": Known(
        write_qwen_scope,
        loaders.qwen_scope_sae_huggingface_loader,
        "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_5",
        "layer3.sae.pt",
        SIZES,
    ),
}


@pytest.fixture(autouse=True)
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let SAELens download from the test's folder, wherever in it a file is."""

    def download(repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
        del repo_id
        name = f"{subfolder}/{filename}" if subfolder else filename
        matches = [str(path) for path in tmp_path.rglob("*") if path.as_posix().endswith(f"/{name}")]
        if not matches:
            raise loaders.EntryNotFoundError(name)
        return matches[0]

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        with safe_open(download(repo_id, filename), "pt") as file:
            return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)


def saelens(known: Known, scaling: float | None = None) -> Any:
    """Load the checkpoint with SAELens, in float32."""
    config, weights, _ = known.loader(known.repository, known.within, "cpu", False, dict(known.overrides))
    config = loaders.handle_pre_6_0_config(config | {"dtype": "float32", "device": "cpu"})
    kind, settings = get_sae_class(config["architecture"])
    sae = kind(settings.from_dict(config))
    sae.process_state_dict_for_loading(weights)
    sae.load_state_dict({key: tensor.float() for key, tensor in weights.items()})
    if scaling is not None:
        sae.fold_activation_norm_scaling_factor(scaling)
    return sae


@torch.no_grad()
def run(sae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the library's latents and output; only `forward` includes a transcoder's skip connection."""
    latents = sae.encode(x)
    return latents, sae(x) if "transcoder" in sae.cfg.architecture() else sae.decode(latents)


@pytest.mark.parametrize("name", KNOWN)
def test_published_checkpoint_agrees_with_saelens(name: str, tmp_path: Path) -> None:
    checkpoint = KNOWN[name].write(tmp_path, Draw())
    assert_agrees(checkpoint.format.read(checkpoint.path)[0], checkpoint.x, *run(saelens(KNOWN[name]), checkpoint.x))


def test_transcoder_of_mwhanna_agrees_with_saelens(tmp_path: Path) -> None:
    checkpoint = write_transcoders(tmp_path, Draw())
    rewrite(checkpoint.file, lambda content: {key: value for key, value in content.items() if key != "W_skip"})
    checkpoint.file.with_name("wandb-config.yaml").write_text(WANDB)
    known = Known(write_transcoders, loaders.mwhanna_transcoder_huggingface_loader, "any", checkpoint.file.name, {})
    assert_agrees(checkpoint.format.read(checkpoint.file)[0], checkpoint.x, *run(saelens(known), checkpoint.x))


def test_latents_of_a_cross_layer_transcoder_agree_with_saelens(tmp_path: Path) -> None:
    checkpoint = cross_layer_folder(tmp_path, Draw())
    known = Known(cross_layer_folder, loaders.mntss_clt_layer_huggingface_loader, "any", "2", {})
    with pytest.warns(UserWarning, match="not for reconstruction"):
        theirs = saelens(known)
    ours = cross_layer.FORMAT.read(checkpoint.path)[0]
    # SAELens' loader ignores the thresholds.
    relu = replace(ours, threshold=torch.zeros(LATENTS))
    latents, output = run(theirs, checkpoint.x)
    assert torch.allclose(relu.encode(checkpoint.x), latents, atol=1e-5)
    assert not torch.allclose(ours.encode(checkpoint.x), latents, atol=0.1)
    # SAELens' decoder is the sum over layers, whose output belongs to no layer; here a partial SAE has no output.
    assert not torch.allclose(latents @ ours.decoder + ours.decoder_bias, output, atol=0.1)
    with pytest.raises(ValueError, match=r"^decode: "):
        ours.decode(latents)


def write_llama(home: Path, draw: Draw, **settings: Any) -> tuple[Checkpoint, Known]:
    """Write a Llama Scope SAE of the residual stream, with one norm at input and output."""
    checkpoint = write_llama_scope(home, draw)
    file, hook = checkpoint.path / "hyperparams.json", "blocks.8.hook_resid_post"
    same = {"hook_point_in": hook, "hook_point_out": hook, "dataset_average_activation_norm": {"in": 4.0, "out": 4.0}}
    file.write_text(json.dumps(json.loads(file.read_text()) | same | settings))
    loader = loaders.llama_scope_sae_huggingface_loader
    return checkpoint, Known(write_llama_scope, loader, "any", checkpoint.path.name, {"dtype": "float32"})


def test_llama_scope_agrees_with_saelens_where_the_decoder_norms_are_1(tmp_path: Path) -> None:
    draw = Draw()
    draw.w_dec = torch.nn.functional.normalize(draw.w_dec, dim=1)
    checkpoint, known = write_llama(tmp_path, draw)
    sae = saelens(known, math.sqrt(WIDTH) / 4.0)
    assert_agrees(checkpoint.format.read(checkpoint.path)[0], checkpoint.x, *run(sae, checkpoint.x))


def test_saelens_compares_z_with_the_threshold_of_llama_scope_without_the_decoder_norm(tmp_path: Path) -> None:
    checkpoint, known = write_llama(tmp_path / "gated", Draw())
    latents, _ = run(saelens(known, math.sqrt(WIDTH) / 4.0), checkpoint.x)
    ours = checkpoint.format.read(checkpoint.path)[0]
    assert not torch.equal(ours.encode(checkpoint.x) > 0, latents > 0)
    plain, _ = write_llama(tmp_path / "gated", Draw(), sparsity_include_decoder_norm=False)
    assert torch.equal(plain.format.read(plain.path)[0].encode(checkpoint.x) > 0, latents > 0)


def test_llama_scope_r1_agrees_with_saelens_where_the_decoder_norm_is_not_in_the_gate(tmp_path: Path) -> None:
    draw = Draw()
    checkpoint = write_llamascopium(tmp_path, draw)
    names = {"W_E": "encoder.weight", "b_E": "encoder.bias", "W_D": "decoder.weight", "b_D": "decoder.bias"}
    names["activation_function.log_jumprelu_threshold"] = "log_jumprelu_threshold"
    rewrite(checkpoint.file, lambda content: {names.get(key, key): value.t() for key, value in content.items()})
    file = checkpoint.path / "config.json"
    changes = {"sparsity_include_decoder_norm": False, "expansion_factor": LATENTS // WIDTH}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    known = Known(
        write_llamascopium, loaders.llama_scope_r1_distill_sae_huggingface_loader, "any", checkpoint.path.name, {}
    )
    sae = saelens(known, math.sqrt(WIDTH) / 4.0)
    assert_agrees(checkpoint.format.read(checkpoint.path)[0], checkpoint.x, *run(sae, checkpoint.x))


def test_saelens_does_not_scale_the_decoder_bias_of_an_embedding_sae(tmp_path: Path) -> None:
    draw = Draw()
    checkpoint = write_gemma_scope(tmp_path, draw)
    folder = checkpoint.path.parents[2] / "embedding/width_4k/average_l0_6"
    folder.mkdir(parents=True)
    checkpoint.file.rename(folder / "params.npz")
    known = KNOWN["gemma_scope"]._replace(within="embedding/width_4k/average_l0_6")
    latents, output = run(saelens(known), checkpoint.x)
    ours = checkpoint.format.read(folder)[0]
    unscaled = replace(ours, decoder_bias=draw.b_dec)
    assert torch.allclose(ours.encode(checkpoint.x), latents, atol=1e-5)
    assert torch.allclose(unscaled.decode(latents), output, atol=1e-4)
    assert torch.allclose(ours.decoder_bias, draw.b_dec * math.sqrt(WIDTH))
