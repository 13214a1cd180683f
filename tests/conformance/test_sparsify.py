"""SAEs saved by sparsify are read, and written SAEs load in sparsify; both encode and decode alike."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor

from rudder.sae_models.formats import sparsify
from rudder.sae_models.formats.load import load
from rudder.sae_models.formats.source import Declaration
from rudder.sae_models.sae import SAE, GroupMax, TopK
from tests.conformance.agreement import D, F, K, assert_agrees, assert_same, dense, fill, random_sae

KINDS = [
    {},
    {"activation": "groupmax"},
    {"skip_connection": True},
    {"transcode": True},
    {"transcode": True, "skip_connection": True},
    {"transcode": True, "activation": "groupmax"},
    {"normalize_decoder": False},
]


def random_coder(dtype: torch.dtype = torch.float32, **config: Any) -> SparseCoder:
    """Return a coder of sparsify with random weights."""
    coder = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K, **config), dtype=dtype)
    fill(coder)
    return coder


def run(coder: SparseCoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coder's latents and output."""
    with torch.no_grad():
        values, indices, _ = coder.encode(x)
        return dense(values, indices), coder(x).sae_out


@pytest.mark.parametrize("config", KINDS, ids=str)
def test_coders_agree(config: dict[str, Any], x: Tensor, tmp_path: Path) -> None:
    coder = random_coder(**config)
    coder.save_to_disk(tmp_path / "layers.2")
    loaded = load(tmp_path / "layers.2")
    assert loaded.format == "sparsify"
    assert_agrees(loaded.sae, x, *run(coder, x))
    assert_agrees(loaded.sae, x, *run(SparseCoder.load_from_disk(tmp_path / "layers.2"), x))


def test_bfloat16_file_keeps_its_dtype_and_computes_in_float32(x: Tensor, tmp_path: Path) -> None:
    coder = random_coder(torch.bfloat16)
    coder.save_to_disk(tmp_path / "layers.2")
    sae = load(tmp_path / "layers.2").sae
    assert sae.encoder.dtype == sae.decoder.dtype == torch.bfloat16
    assert_agrees(sae, x, *run(coder.float(), x))


def test_expansion_factor_replaces_a_missing_number_of_latents(x: Tensor, tmp_path: Path) -> None:
    coder = SparseCoder(D, SparseCoderConfig(expansion_factor=3, k=K))
    fill(coder)
    coder.save_to_disk(tmp_path / "layers.2")
    assert json.loads((tmp_path / "layers.2" / "cfg.json").read_text())["num_latents"] == 0
    assert_agrees(load(tmp_path / "layers.2").sae, x, *run(coder, x))


def test_folder_and_run_of_sparsify_declare_the_site(tmp_path: Path) -> None:
    random_coder().save_to_disk(tmp_path / "layers.2")
    random_coder(transcode=True).save_to_disk(tmp_path / "layers.3.mlp")
    (tmp_path / "config.json").write_text('{"model": "textbook-lm", "dataset": "textbooks"}')
    sae, transcoder = load(tmp_path / "layers.2").declared, load(tmp_path / "layers.3.mlp").declared
    assert (sae.sites, sae.output_site, sae.model) == (("layers.2.resid_post",), "", "textbook-lm")
    assert (transcoder.sites, transcoder.output_site) == (("layers.3.mlp_in",), "layers.3.mlp_out")


@pytest.mark.parametrize(
    ("sae", "declared"),
    [
        (random_sae(selection=TopK(K)), Declaration("x")),
        (random_sae(selection=GroupMax(K)), Declaration("x")),
        (random_sae(selection=TopK(K), skip=True), Declaration("x")),
        (random_sae(selection=TopK(K)), Declaration("x", ("layers.2.mlp_in",), "layers.2.mlp_out")),
    ],
)
def test_written_sae_loads_in_the_library(sae: SAE, declared: Declaration, x: Tensor, tmp_path: Path) -> None:
    sparsify.write(tmp_path / "layers.2", sae, declared)
    assert_agrees(sae, x, *run(SparseCoder.load_from_disk(tmp_path / "layers.2"), x))
    assert_same(sae, load(tmp_path / "layers.2").sae, x)


# Known defects of sparsify 1.3.


def test_multi_topk_of_sparsify_returns_the_output_of_four_times_k(x: Tensor, tmp_path: Path) -> None:
    coder = random_coder(multi_topk=True)
    coder.save_to_disk(tmp_path / "layers.2")
    sae = load(tmp_path / "layers.2").sae
    with torch.no_grad():
        values, indices, _ = coder.encode(x)
        assert_agrees(sae, x, dense(values, indices), coder.decode(values, indices))
        wider = replace(sae, selection=TopK(4 * K))
        assert_agrees(wider, x, wider.encode(x), coder(x).sae_out)


def test_sparsify_loads_all_tensors_in_the_first_dtype(tmp_path: Path) -> None:
    random_coder().save_to_disk(tmp_path / "layers.2")
    file = tmp_path / "layers.2" / "sae.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"W_dec": tensors["W_dec"].bfloat16()}, file)
    assert SparseCoder.load_from_disk(tmp_path / "layers.2").encoder.bias.dtype == torch.bfloat16
    assert load(tmp_path / "layers.2").sae.bias.dtype == torch.float32
