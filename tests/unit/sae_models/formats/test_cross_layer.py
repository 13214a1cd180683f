"""One layer of a cross-layer transcoder is read as a partial SAE: exact rows and no output."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rudder.sae_models import PRETRAINED, fidelity
from rudder.sae_models.bundle import bundle as bundles
from rudder.sae_models.bundle.bundle import BundleError, Source, Training
from rudder.sae_models.formats import cross_layer, gemma_scope_2, saelens, sparsify
from rudder.sae_models.formats.load import load
from rudder.sae_models.formats.source import Declaration, FormatError, Loaded
from rudder.sae_models.importing import check as checking
from rudder.sae_models.importing import importer as importing
from rudder.sae_models.importing.importer import ImportRequest
from rudder.sae_models.sae import Rows, TopK, activations
from tests.unit.checkpoints import (
    LATENTS,
    WIDTH,
    Draw,
    assert_near,
    cross_layer_folder,
    relu_above,
    rewrite,
    save_json,
    save_safe,
)

MODEL = PRETRAINED / "textbook-lm"


def test_latents_are_exact_and_have_no_output(tmp_path: Path) -> None:
    checkpoint = cross_layer_folder(tmp_path, Draw())
    for path in (checkpoint.path, checkpoint.file):
        sae = load(path).sae
        assert_near(sae.encode(checkpoint.x), checkpoint.f)
        rows = sae.rows(torch.tensor([3, 7]))
        assert isinstance(rows, Rows)
        assert_near(activations(checkpoint.x, rows), checkpoint.f[:, [3, 7]])
        # Only the part at the latents' own layer.
        assert_near(checkpoint.f @ sae.decoder + sae.decoder_bias, checkpoint.y)
        with pytest.raises(ValueError, match="the latents write to other layers too"):
            sae.decode(checkpoint.f)
        with pytest.raises(ValueError, match="the latents write to other layers too"):
            sae.forward(checkpoint.x)


def test_declaration_comes_from_the_settings(tmp_path: Path) -> None:
    declared = load(cross_layer_folder(tmp_path, Draw()).path).declared
    assert (declared.architecture, declared.model) == ("cross_layer_transcoder", "google/gemma-2-2b")
    assert (declared.sites, declared.output_site) == (("layers.2.resid_mid",), "layers.2.mlp_out")


def test_cross_layer_transcoder_without_thresholds_is_relu(tmp_path: Path) -> None:
    checkpoint = cross_layer_folder(tmp_path, Draw())
    rewrite(checkpoint.file, lambda content: {key: content[key] for key in content if key != "threshold_2"})
    d = Draw()
    assert_near(cross_layer.FORMAT.read(checkpoint.path)[0].encode(d.x), (d.x @ d.w_enc.T + d.b_enc).relu())


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("W_enc_2", {"W_enc_2": torch.ones(WIDTH, LATENTS)}, r"W_enc_2\.safetensors W_enc_2: shape"),
        ("W_dec_2", {"W_dec_2": torch.ones(LATENTS, WIDTH)}, r"W_dec_2\.safetensors W_dec_2: shape .* no layer 0"),
        ("W_dec_2", {"W_dec_2": torch.ones(LATENTS, 0, WIDTH)}, r"W_dec_2\.safetensors W_dec_2: shape .* no layer 0"),
        ("W_dec_2", {"W_dec_2": torch.ones(WIDTH, 3, LATENTS)}, r"W_dec_2\.safetensors W_dec_2: shape"),
        ("W_dec_2", {"W_dec_norm_2": torch.ones(LATENTS)}, r"W_dec_2\.safetensors: unknown tensors W_dec_norm_2"),
        ("W_enc_2", {"threshold_2": torch.ones(2)}, r"threshold_2: 2 thresholds for 24 latents"),
    ],
)
def test_tensors_of_wrong_shape_are_refused_by_name(
    name: str, change: dict[str, Tensor], why: str, tmp_path: Path
) -> None:
    cross_layer_folder(tmp_path, Draw())
    rewrite(tmp_path / f"{name}.safetensors", lambda content: content | change)
    with pytest.raises(FormatError, match=why):
        load(tmp_path)


def test_topk_over_all_layers_without_biases_is_refused(tmp_path: Path) -> None:
    checkpoint = cross_layer_folder(tmp_path, Draw())
    rewrite(checkpoint.file, lambda content: {"W_enc_2": content["W_enc_2"]})
    with pytest.raises(FormatError, match=r"W_enc_2\.safetensors b_enc_2: missing"):
        load(tmp_path)


def test_folder_with_several_layers_needs_a_file_and_its_decoders(tmp_path: Path) -> None:
    checkpoint = cross_layer_folder(tmp_path, Draw())
    (tmp_path / "W_enc_3.safetensors").write_bytes(checkpoint.file.read_bytes())
    with pytest.raises(FormatError, match=r"2 files like W_enc_.*, name one: W_enc_2"):
        load(tmp_path)
    assert load(checkpoint.file).sae.latents == LATENTS
    with pytest.raises(FormatError, match=r"W_dec_3\.safetensors: not beside W_enc_3\.safetensors"):
        load(tmp_path / "W_enc_3.safetensors")
    with pytest.raises(FormatError, match=r"W_dec_2\.safetensors: 0 files like W_enc_"):
        load(tmp_path / "W_dec_2.safetensors")


def write_gemma(home: Path, d: Draw, layers: int = 3) -> Path:
    """Write layer 1 of a Gemma Scope 2 cross-layer transcoder; its decoders cover all layers, with zeros before it."""
    file = home / "gemma-scope-2-1b-pt/clt/width_262k_l0_medium/layer_1.safetensors"
    decoders = torch.stack([torch.zeros(LATENTS, WIDTH), d.w_dec, *(d.normal(layers - 2, LATENTS, WIDTH))], 1)
    weights = {"w_enc": d.w_enc.T, "w_dec": decoders, "b_enc": d.b_enc, "b_dec": d.b_dec, "threshold": d.threshold}
    save_safe(file, weights)
    return file


def test_gemma_scope_2_reads_the_layer_in_the_file_name(tmp_path: Path) -> None:
    d = Draw()
    file = write_gemma(tmp_path, d)
    loaded = load(file)
    assert loaded.sae.partial
    assert_near(loaded.sae.encode(d.x), relu_above(d.x @ d.w_enc.T + d.b_enc, d.threshold))
    assert torch.equal(loaded.sae.decoder, d.w_dec)
    assert (loaded.declared.sites, loaded.declared.model) == ((), "google/gemma-3-1b-pt")
    hooks = {"hf_hook_point_in": "model.layers.1.pre_feedforward_layernorm.output"}
    save_json(file.with_name("config.json"), {"architecture": "jump_relu"} | hooks)
    assert load(file).declared.sites == ("layers.1.mlp_in",)
    with pytest.raises(FormatError, match="has no layer 7"):
        load(file.rename(file.with_name("layer_7.safetensors")))


def test_crosscoder_is_refused_by_name(tmp_path: Path) -> None:
    file = write_gemma(tmp_path, Draw())
    rewrite(file, lambda content: content | {"w_enc": content["w_enc"][:, None].expand(-1, 4, -1)})
    with pytest.raises(FormatError, match="w_enc: a crosscoder"):
        gemma_scope_2.FORMAT.read(file)


@pytest.mark.parametrize("write", [saelens.write, sparsify.write])
def test_other_formats_refuse_a_partial_sae(write: Callable[..., None], tmp_path: Path) -> None:
    sae = load(cross_layer_folder(tmp_path / "clt", Draw()).path).sae
    if write is sparsify.write:
        sae = replace(sae, threshold=torch.zeros(LATENTS), selection=TopK(3))
    with pytest.raises(FormatError, match=r"^partial: "):
        write(tmp_path / "out", sae, Declaration("cross_layer_transcoder", output_site="layers.2.mlp_out"))


def model_wide(home: Path) -> Loaded:
    """Write and load layer 2 of a cross-layer transcoder of the shipped model's width."""
    g = torch.Generator().manual_seed(0)
    encoder = {"W_enc_2": torch.randn(40, 192, generator=g), "b_enc_2": -torch.rand(40, generator=g)}
    save_safe(home / "W_enc_2.safetensors", encoder | {"b_dec_2": torch.zeros(192)})
    save_safe(home / "W_dec_2.safetensors", {"W_dec_2": torch.randn(40, 4, 192, generator=g)})
    (home / "config.yaml").write_text("feature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n")
    return load(home)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    words = ("cells", "divide", "viruses", "need", "host", "king", "may", "rule", "state", "free", "people")
    text = " ".join(words[i * i % len(words)] for i in range(900))
    path.write_text(f'{{"text": "{text}"}}\n')
    return path


def test_partial_sae_survives_import_and_check(tmp_path: Path, corpus: Path) -> None:
    loaded = model_wide(tmp_path / "clt")
    result = importing.import_sae(
        loaded, Source("cross_layer", "clt"), ImportRequest(MODEL, tmp_path / "out", corpus=corpus, tokens=600)
    )
    training = result.bundle.manifest.training
    assert (training.fvu, result.verdict, result.bundle.measured) == (None, None, True)
    assert training.l0 == pytest.approx(fidelity.measure(loaded.sae, result.bundle.conformance.inputs).l0, rel=0.25)
    assert result.bundle.conformance.targets is None
    assert not any(result.bundle.catalogue.get(i).promoted for i in range(40)), "words of a part of what latents write"
    result.bundle.catalogue.close()
    read = bundles.load(tmp_path / "out")
    assert read.sae.partial
    assert read.manifest.partial
    x = read.conformance.inputs
    assert torch.equal(read.sae.encode(x), loaded.sae.encode(x))
    with pytest.raises(ValueError, match="decode: "):
        read.sae.decode(read.sae.encode(x))
    report = checking.check_bundle(tmp_path / "out", MODEL, corpus)
    assert report.holds, report.findings
    assert {"l0", "model"} <= {finding.field for finding in report.findings}
    assert "fvu" not in {finding.field for finding in report.findings}


def test_partial_sae_cannot_claim_an_fvu(tmp_path: Path) -> None:
    result = importing.import_sae(
        model_wide(tmp_path / "clt"), Source("cross_layer", "clt"), ImportRequest(MODEL, tmp_path / "out")
    )
    manifest = bundles.describe(
        result.bundle.sae, name="a", model=result.bundle.manifest.model, sites=result.bundle.manifest.sites,
        output_site="layers.2.mlp_out", architecture="x", training=Training(fvu=0.1),
    )  # fmt: skip
    with pytest.raises(BundleError, match=r"^training\.fvu: claimed of an SAE that is partial"):
        bundles.write(
            tmp_path / "b",
            manifest,
            result.bundle.sae,
            None,
            result.bundle.conformance,
            tmp_path / "out/catalogue.sqlite",
        )
    assert not (tmp_path / "b").exists()


def test_partial_sae_needs_an_output_site(tmp_path: Path) -> None:
    loaded = model_wide(tmp_path / "clt")
    undeclared = replace(loaded, declared=replace(loaded.declared, output_site=""))
    with pytest.raises(importing.ImportRefused, match=r"^output_site: .* give --output-site"):
        importing.import_sae(undeclared, Source("cross_layer", "clt"), ImportRequest(MODEL, tmp_path / "out"))
    request = ImportRequest(MODEL, tmp_path / "out", output_site="layers.2.mlp_out")
    result = importing.import_sae(undeclared, Source("cross_layer", "clt"), request)
    assert result.bundle.manifest.output_site == "layers.2.mlp_out"


def test_import_refuses_a_partial_sae_with_a_wrong_l0(tmp_path: Path, corpus: Path) -> None:
    request = ImportRequest(MODEL, tmp_path / "out", corpus=corpus, tokens=600)
    with pytest.raises(importing.ImportRefused, match=r"^convention: L0 [\d.]+ on this text, L0 0\.5 is claimed"):
        importing.import_sae(model_wide(tmp_path / "clt"), Source("cross_layer", "clt", l0=0.5), request)
