"""Loading refuses a bundle, and names the field, if any part of it disagrees with the manifest."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rudder.sae_models import PRETRAINED, fidelity
from rudder.sae_models.bundle import bundle, catalogue
from rudder.sae_models.bundle.bundle import BundleError, Manifest, Model, Statistics, Training
from rudder.sae_models.bundle.catalogue import Latent, Summary
from rudder.sae_models.fidelity import fvu, l0
from rudder.sae_models.sae import SAE, AdaptiveK, GroupMax, Normalisation, Router, TopK

F, D = 12, 6
SITE = "layers.1.resid_post"


def described(
    sae: SAE, name: str, training: Training, sites: tuple[str, ...] = (SITE,), output_site: str = ""
) -> Manifest:
    """Return the manifest of a toy SAE."""
    model = Model("toy", "ab" * 32, D)
    return bundle.describe(
        sae, name=name, model=model, sites=sites, output_site=output_site, architecture="batch_topk", training=training
    )


def write_bundle(path: Path, form: bundle.Form | None = None) -> bundle.Bundle:
    """Write a small bundle with true claims."""
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(F, D, generator=g), dim=1)
    sae = SAE(directions, torch.zeros(F), torch.full((F,), 0.1), directions / 2, torch.zeros(D))
    inputs = torch.randn(64, D, generator=g)
    encoded = sae.encode(inputs)
    training = Training(1000, 0, l0(encoded), fvu(inputs, sae.decode(encoded)), 0.9, 0.0, "a credit")
    manifest = described(sae, path.name, training)
    statistics = Statistics(encoded.amax(0), (encoded > 0).float().mean(0), inputs.mean(0), inputs.norm(dim=1).mean())
    database = path.parent / "entries.sqlite"
    database.unlink(missing_ok=True)
    catalogue.write(database, (Latent(Summary(i, f"word{i}", 0.5, 1.0), (), ()) for i in range(F)))
    conformance = bundle.conformance_of(sae, inputs, 16)
    return bundle.write(path, manifest, sae, statistics, conformance, database, form)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "toy-layers.1"
    write_bundle(folder).catalogue.close()
    return folder


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest's JSON in place."""
    content = json.loads((path / bundle.MANIFEST).read_text())
    change(content)
    (path / bundle.MANIFEST).write_text(json.dumps(content))


def edit_tensors(path: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change a file's tensors and update its hash in the manifest."""
    tensors = {key: tensor.clone() for key, tensor in load_file(path / name).items()}
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path / name)
    rehash(path, name)


def rehash(path: Path, name: str) -> None:
    """Update the manifest's hash of a file."""
    digest = hashlib.sha256((path / name).read_bytes()).hexdigest()
    edit_manifest(path, lambda content: content["files"].update({name: digest}))


def test_load_returns_what_was_written(path: Path) -> None:
    read = bundle.load(path)
    assert read.manifest.name == "toy-layers.1"
    assert read.sae.latents == F
    assert read.catalogue.get(3).summary.label == "word3"
    assert read.sha256 == hashlib.sha256((path / bundle.MANIFEST).read_bytes()).hexdigest()
    bundle.check_model(read, "ab" * 32, D)


def test_shards_of_weights_hold_what_one_file_holds(path: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    shard_bytes = 4 * (F * D + 2 * F + D)
    write_bundle(sharded, bundle.Form(shard_bytes)).catalogue.close()
    names = [f"sae-{number:05}-of-00002.safetensors" for number in (1, 2)]
    assert sorted(file.name for file in sharded.glob("sae*")) == names
    assert max(sum(t.nbytes for t in load_file(sharded / name).values()) for name in names) == shard_bytes
    one, several = bundle.load(path).sae, bundle.load(sharded).sae
    for name in ("encoder", "bias", "threshold", "decoder", "decoder_bias"):
        assert torch.equal(getattr(one, name), getattr(several, name))
    edit_tensors(sharded, names[1], lambda tensors: tensors.pop("bias"))
    with pytest.raises(BundleError, match=r"^sae-00001-of-00002.safetensors: holds"):
        bundle.load(sharded)
    edit_manifest(sharded, lambda content: content["files"].pop(names[0]))
    with pytest.raises(BundleError, match=r"^files: shards sae-00002-of-00002.safetensors, not sae-00001-of-00001"):
        bundle.load(sharded)


def test_a_compressed_catalogue_reads_as_a_plain_one_and_stays_compressed(path: Path, tmp_path: Path) -> None:
    compressed = tmp_path / "compressed"
    write_bundle(compressed, bundle.Form(4 * F * D, compressed=True)).catalogue.close()
    names = sorted(file.name for file in compressed.iterdir())
    assert "catalogue.sqlite.xz" in names
    assert bundle.CATALOGUE not in names
    plain, read = bundle.load(path).catalogue, bundle.load(compressed).catalogue
    assert read.get(3) == plain.get(3)
    assert read.search("word3", 5) == plain.search("word3", 5)
    # In the form of the older one.
    write_bundle(compressed).catalogue.close()
    assert sorted(file.name for file in compressed.iterdir()) == names
    (compressed / "catalogue.sqlite.xz").write_bytes((compressed / "catalogue.sqlite.xz").read_bytes()[:-40])
    rehash(compressed, "catalogue.sqlite.xz")
    with pytest.raises(BundleError, match=r"^catalogue.sqlite.xz: "):
        bundle.load(compressed)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("format_version: 1, this program reads 2", lambda m: m.update(format_version=1)),
        ("manifest.json.*sites", lambda m: m.pop("sites")),
        ("manifest.json.*surprise", lambda m: m.update(surprise=1)),
        (r"manifest.json.*\$\.latents", lambda m: m.update(latents="many")),
        (r"manifest.json.*\$\.training\.fvu", lambda m: m["training"].update(fvu="low")),
        (r"manifest.json.*\$\.activation", lambda m: m["activation"].update(kind="softmax")),
        (r"manifest.json.*\$\.activation", lambda m: m["activation"].update(k=3)),
        (r"manifest.json.*run_time", lambda m: m["normalisation"].update(run_time="batch_norm")),
        (r"manifest.json.*\$\.dtype", lambda m: m.update(dtype="int8")),
        (r"normalisation\.epsilon: 1e-06, rows are normalised", lambda m: m["normalisation"].update(epsilon=1e-6)),
        ("sites:", lambda m: m.update(sites=["layers.1.somewhere"])),
        ("sites:", lambda m: m.update(sites=["../layers.1.resid_post"])),
        ("sites:", lambda m: m.update(output_site="layers.1")),
        ("sites:", lambda m: m.update(sites=[])),
        ("router:", lambda m: m.update(sites=[SITE, "layers.2.resid_post"])),
        ("router:", lambda m: m.update(router="sum")),
        ("dtype: bfloat16, encoder is torch.float32", lambda m: m.update(dtype="bfloat16")),
        (r"activation\.k:", lambda m: m.update(activation={"kind": "top_k", "k": 13})),
        (r"activation\.k:", lambda m: m.update(activation={"kind": "group_max", "k": 5})),
        ("sae.safetensors: holds", lambda m: m.update(skip=True)),
        ("conformance.safetensors: holds", lambda m: m.update(output_site="layers.1.mlp_out")),
        ("conformance.safetensors activations: differ", lambda m: m.update(activation={"kind": "top_k", "k": 1})),
        ("conformance.safetensors activations: differ", lambda m: m["normalisation"].update(run_time="layer_norm")),
        ("d:", lambda m: m.update(d=7)),
        ("d_out:", lambda m: m.update(d_out=7)),
        ("latents", lambda m: m.update(latents=0)),
        ("sae.safetensors .*: shape", lambda m: m.update(latents=13)),
        ("files:", lambda m: m["files"].pop(bundle.CATALOGUE)),
        ("files:", lambda m: m["files"].pop(bundle.CONFORMANCE)),
        ("files:", lambda m: m["files"].update({"../other": "00"})),
        (r"files\.catalogue\.sqlite", lambda m: m["files"].update({bundle.CATALOGUE: "00"})),
        (r"training\.l0", lambda m: m["training"].update(l0=1.0)),
        (r"training\.fvu", lambda m: m["training"].update(fvu=0.001)),
    ],
)
def test_load_refuses_a_wrong_manifest_by_field(
    path: Path, field: str, change: Callable[[dict[str, Any]], object]
) -> None:
    edit_manifest(path, change)
    with pytest.raises(BundleError, match=f"^{field}"):
        bundle.load(path)


def transpose(key: str) -> Callable[[dict[str, torch.Tensor]], object]:
    """Return a change that transposes a matrix."""
    return lambda t: t.update({key: t[key].T})


def poison(key: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    """Return a change that sets the first value of a tensor."""
    return lambda t: t[key].view(-1)[0].fill_(value)


def halve(key: str) -> Callable[[dict[str, torch.Tensor]], object]:
    """Return a change that stores a tensor in bfloat16."""
    return lambda t: t.update({key: t[key].bfloat16()})


@pytest.mark.parametrize(
    ("field", "name", "change"),
    [
        *((f"sae.safetensors {key}: shape", bundle.WEIGHTS, transpose(key)) for key in ("encoder", "decoder")),
        *(
            (f"sae.safetensors {key}: .*finite", bundle.WEIGHTS, poison(key, float("nan")))
            for key in ("encoder", "bias", "threshold", "decoder", "decoder_bias")
        ),
        *(
            (f"statistics.safetensors {key}: .*finite", bundle.STATISTICS, poison(key, float("inf")))
            for key in ("max_activation", "frequency", "mean", "residual_norm")
        ),
        ("sae.safetensors: holds", bundle.WEIGHTS, lambda t: t.pop("bias")),
        ("sae.safetensors: holds", bundle.WEIGHTS, lambda t: t.update(skip=torch.zeros(1))),
        ("sae.safetensors threshold: has negative", bundle.WEIGHTS, lambda t: t["threshold"].neg_()),
        ("sae.safetensors bias: dtype", bundle.WEIGHTS, lambda t: t.update(bias=t["bias"].long())),
        ("dtype: float32, encoder is torch.bfloat16", bundle.WEIGHTS, halve("encoder")),
        ("conformance.safetensors inputs: shape", bundle.CONFORMANCE, lambda t: t.update(inputs=t["inputs"][:, :2])),
        (
            "conformance.safetensors activations: 17 tokens",
            bundle.CONFORMANCE,
            lambda t: t.update(inputs=t["inputs"][:15], activations=torch.zeros(17, F)),
        ),
        ("conformance.safetensors activations: differ", bundle.CONFORMANCE, poison("activations", 9.0)),
        ("conformance.safetensors activations: differ", bundle.WEIGHTS, lambda t: t["encoder"].mul_(1.05)),
        ("conformance.safetensors activations: differ", bundle.WEIGHTS, lambda t: t["bias"].add_(0.1)),
        ("conformance.safetensors activations: differ", bundle.WEIGHTS, lambda t: t["threshold"].zero_()),
        (r"training\.fvu", bundle.WEIGHTS, lambda t: t["decoder"].mul_(4)),
        (r"training\.fvu", bundle.WEIGHTS, lambda t: t["decoder_bias"].add_(2)),
    ],
)
def test_load_refuses_wrong_tensors_with_the_right_hash(
    path: Path, field: str, name: str, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    edit_tensors(path, name, change)
    with pytest.raises(BundleError, match=f"^{field}"):
        bundle.load(path)


@pytest.mark.parametrize("token", [0, 4, 5, 15])
def test_every_conformance_vector_counts_whichever_chunk_it_is_in(
    token: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "ACTIVATIONS_PER_CHUNK", 5 * F)
    bundle.load(path).catalogue.close()
    edit_tensors(path, bundle.CONFORMANCE, lambda t: t["activations"][token].add_(0.5))
    with pytest.raises(BundleError, match=r"^conformance\.safetensors activations: differ by"):
        bundle.load(path)


def test_nan_activations_do_not_agree(path: Path) -> None:
    edit_tensors(path, bundle.WEIGHTS, poison("bias", float("nan")))
    edit_tensors(path, bundle.CONFORMANCE, poison("activations", float("nan")))
    opened = bundle.open_unverified(path)
    with pytest.raises(BundleError, match=r"^conformance\.safetensors activations: differ by nan"):
        bundle.check_conformance(opened)
    opened.catalogue.close()


@pytest.mark.parametrize("name", sorted(bundle.FILES))
def test_load_refuses_one_changed_byte(path: Path, name: str) -> None:
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"^files\.{name}"):
        bundle.load(path)


@pytest.mark.parametrize("name", sorted({bundle.MANIFEST, *bundle.FILES}))
def test_load_refuses_a_missing_file(path: Path, name: str) -> None:
    (path / name).unlink()
    with pytest.raises(BundleError, match=f"^{name}"):
        bundle.load(path)


@pytest.mark.parametrize("name", [bundle.WEIGHTS, bundle.STATISTICS, bundle.CONFORMANCE, bundle.CATALOGUE])
def test_load_refuses_junk_with_the_right_hash(path: Path, name: str) -> None:
    (path / name).write_bytes(b"junk")
    rehash(path, name)
    with pytest.raises(BundleError, match=f"^{name}"):
        bundle.load(path)


def test_load_refuses_a_catalogue_of_another_size(path: Path) -> None:
    (path / bundle.CATALOGUE).unlink()
    catalogue.write(path / bundle.CATALOGUE, [])
    rehash(path, bundle.CATALOGUE)
    with pytest.raises(BundleError, match=r"^catalogue\.sqlite: 0 latents"):
        bundle.load(path)


def test_check_model_refuses_another_model_by_field(path: Path) -> None:
    read = bundle.load(path)
    with pytest.raises(BundleError, match=r"^model\.sha256"):
        bundle.check_model(read, "cd" * 32, D)
    with pytest.raises(BundleError, match=r"^model\.hidden_size"):
        bundle.check_model(read, "ab" * 32, D + 1)


def test_model_sha256_covers_every_shard(tmp_path: Path) -> None:
    (tmp_path / "b.safetensors").write_bytes(b"two")
    (tmp_path / "a.safetensors").write_bytes(b"one")
    assert bundle.model_sha256(tmp_path) == hashlib.sha256(b"onetwo").hexdigest()
    with pytest.raises(FileNotFoundError, match=r"^model: "):
        bundle.model_sha256(tmp_path / "nowhere")


class Terminal(StringIO):
    """Standard error that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("quick", [True, False])
def test_long_hashing_shows_progress_and_quick_hashing_does_not(
    quick: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    if not quick:
        monkeypatch.setattr(bundle, "PROGRESS_DELAY_S", 0.0)
    bundle.load(path).catalogue.close()
    for name in ("a", "b"):
        (path.parent / f"{name}.safetensors").write_bytes(b"x" * (3 << 20))
    bundle.model_sha256(path.parent)
    output = terminal.getvalue()
    assert (f"hashing {path.name}: " in output, f"hashing {path.parent.name}: " in output) == (not quick, not quick)
    assert ("6.29M" in output) == (not quick)


def test_write_replaces_an_older_bundle_and_leaves_nothing_else(path: Path) -> None:
    (path / "stale").write_text("from an older format")
    write_bundle(path)
    assert {file.name for file in path.iterdir()} == {bundle.MANIFEST, *bundle.FILES}
    assert {file.name for file in path.parent.iterdir()} == {path.name, "entries.sqlite"}


def test_write_refuses_what_load_would_refuse(path: Path) -> None:
    read = bundle.load(path)
    broken = SAE(
        read.sae.encoder, read.sae.bias, read.sae.threshold, read.sae.decoder * float("nan"), read.sae.decoder_bias
    )
    with pytest.raises(BundleError, match=r"^sae\.safetensors decoder"):
        bundle.write(path, read.manifest, broken, read.statistics, read.conformance, path / bundle.CATALOGUE)
    assert bundle.load(path).sha256 == read.sha256


def every_form() -> dict[str, tuple[SAE, tuple[str, ...], str]]:
    """Return an SAE with each part that the canonical form may have, with its sites and output site."""
    plain, g = random_sae(), torch.Generator().manual_seed(1)
    adaptive = AdaptiveK(torch.randn(D, generator=g), torch.tensor(0.5), 2, 5, 6.0, 10.0)
    several = (SITE, "layers.2.resid_post", "layers.3.resid_post")
    routed = Router(torch.randn(3, D, generator=g), mean=True)
    skip = torch.randn(D, D, generator=g)
    return {
        "threshold": (plain, (SITE,), ""),
        "top_k": (replace(plain, selection=TopK(3)), (SITE,), ""),
        "group_max": (replace(plain, selection=GroupMax(4)), (SITE,), ""),
        "adaptive_k": (replace(plain, selection=adaptive), (SITE,), ""),
        "constant_norm": (replace(plain, normalisation=Normalisation.CONSTANT_NORM), (SITE,), ""),
        "layer_norm": (replace(plain, normalisation=Normalisation.LAYER_NORM), (SITE,), ""),
        "skip": (replace(plain, skip=skip), ("layers.1.mlp_in",), "layers.1.mlp_out"),
        "router": (replace(plain, router=routed, normalisation=Normalisation.LAYER_NORM), several, ""),
        "epsilon": (
            replace(plain, router=routed, normalisation=Normalisation.LAYER_NORM, epsilon=0.1),
            several,
            "",
        ),
        "tied": (replace(plain, decoder=plain.encoder), (SITE,), ""),
    }


def random_sae() -> SAE:
    """Return an SAE with random weights and positive thresholds."""
    g = torch.Generator().manual_seed(0)
    encoder, decoder = torch.randn(F, D, generator=g), torch.randn(F, D, generator=g)
    bias, threshold = torch.randn(F, generator=g), torch.rand(F, generator=g)
    return SAE(encoder, bias, threshold, decoder, torch.randn(D, generator=g))


def write_form(path: Path, sae: SAE, sites: tuple[str, ...], output_site: str) -> bundle.Bundle:
    """Write a bundle without figures and statistics."""
    inputs = torch.randn(*((40, len(sites), D) if sae.router else (40, D)), generator=torch.Generator().manual_seed(2))
    manifest = described(sae, path.name, Training(), sites, output_site)
    database = path.parent / "entries.sqlite"
    catalogue.write(database, (Latent(Summary(i, "", None, None), (), ()) for i in range(F)))
    return bundle.write(path, manifest, sae, None, bundle.conformance_of(sae, inputs, 16), database)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", every_form())
def test_every_form_survives_write_and_load(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    sae, sites, output_site = every_form()[form]
    skip = None if sae.skip is None else sae.skip.to(dtype)
    stored = replace(sae, encoder=sae.encoder.to(dtype), decoder=sae.decoder.to(dtype), skip=skip)
    write_form(tmp_path / "a", stored, sites, output_site).catalogue.close()
    read = bundle.load(tmp_path / "a")
    assert (read.sae.encoder.dtype, read.sae.decoder.dtype, read.sae.bias.dtype) == (dtype, dtype, torch.float32)
    assert read.manifest.sites == sites
    assert read.manifest.transcodes == (form == "skip")
    x = read.conformance.inputs
    assert torch.equal(read.sae.encode(x), stored.encode(x))
    assert all(torch.equal(a, b) for a, b in zip(read.sae.forward(x), stored.forward(x), strict=True))


def test_bundle_without_statistics_is_not_measured(tmp_path: Path) -> None:
    written = write_form(tmp_path / "a", random_sae(), (SITE,), "")
    assert not written.measured
    assert written.manifest.training == Training()
    assert not written.statistics.max_activation.any()
    assert not (tmp_path / "a" / bundle.STATISTICS).exists()


def test_write_refuses_a_square_sae_without_an_fvu(tmp_path: Path) -> None:
    sae = random_sae()
    square = SAE(sae.encoder[:D], sae.bias[:D], sae.threshold[:D], sae.decoder[:D], sae.decoder_bias)
    with pytest.raises(BundleError, match=r"^latents: 6 equals d: the matrices' orientation"):
        write_form(tmp_path / "a", square, (SITE,), "")


def test_load_compares_a_transcoder_with_its_targets(tmp_path: Path) -> None:
    sae, sites, output_site = every_form()["skip"]
    g = torch.Generator().manual_seed(3)
    inputs = torch.randn(64, D, generator=g)
    targets = sae.forward(inputs)[0] + 0.1 * torch.randn(64, D, generator=g)
    measured = fidelity.measure(sae, inputs, targets)
    manifest = described(sae, "a", Training(l0=measured.l0, fvu=measured.fvu), sites, output_site)
    catalogue.write(tmp_path / "c", (Latent(Summary(i, "", None, None), (), ()) for i in range(F)))
    vectors = bundle.conformance_of(sae, inputs, 16, targets)
    bundle.write(tmp_path / "a", manifest, sae, None, vectors, tmp_path / "c").catalogue.close()
    edit_tensors(tmp_path / "a", bundle.CONFORMANCE, lambda t: t.update(targets=t["targets"].flip(0)))
    with pytest.raises(BundleError, match=r"^training\.fvu: "):
        bundle.load(tmp_path / "a")


def test_all_files_have_the_same_permissions(path: Path) -> None:
    modes = {file.stat().st_mode for file in path.iterdir()}
    assert len(modes) == 1, "a file has other permissions than the rest"


def test_load_refuses_a_huge_manifest(path: Path) -> None:
    (path / bundle.MANIFEST).write_bytes(b" " * (bundle.MANIFEST_LIMIT + 1))
    with pytest.raises(BundleError, match=r"^manifest\.json: 1048577 bytes"):
        bundle.load(path)


@pytest.mark.parametrize(
    ("field", "key"), [("conformance.safetensors activations", "encoder"), ("training", "decoder")]
)
def test_load_refuses_a_transposed_square_matrix(tmp_path: Path, field: str, key: str) -> None:
    g = torch.Generator().manual_seed(3)
    axes = torch.linalg.qr(torch.randn(D, D, generator=g)).Q.contiguous()
    square = SAE(axes, torch.zeros(D), torch.zeros(D), axes.clone(), torch.zeros(D))
    inputs = torch.rand(64, D, generator=g) @ axes + 0.1 * torch.randn(64, D, generator=g)
    measured = fidelity.measure(square, inputs)
    manifest = described(square, "a", Training(l0=measured.l0, fvu=measured.fvu))
    catalogue.write(tmp_path / "c", (Latent(Summary(i, "", None, None), (), ()) for i in range(D)))
    vectors = bundle.conformance_of(square, inputs, 16)
    bundle.write(tmp_path / "a", manifest, square, None, vectors, tmp_path / "c").catalogue.close()
    edit_tensors(tmp_path / "a", bundle.WEIGHTS, transpose(key))
    with pytest.raises(BundleError, match=rf"^{field}"):
        bundle.load(tmp_path / "a")


def test_shipped_bundle_is_complete_and_small_enough_for_a_repository() -> None:
    shipped = bundle.load(PRETRAINED / "textbook-lm-layers.2")
    assert max(file.stat().st_size for file in shipped.path.iterdir()) < 16 << 20
    assert shipped.measured
    for index in (0, 7, 4000):
        latent, maximum = shipped.catalogue.get(index), float(shipped.statistics.max_activation[index])
        assert latent.summary.origin == ("corpus" if latent.summary.label else "")
        assert latent.summary.label_score is not None
        assert maximum == pytest.approx(latent.summary.max_activation)
        assert list(latent.quantiles) == sorted(latent.quantiles)
        assert 0 < latent.quantiles[0] < latent.quantiles[-1] <= maximum
        assert len(latent.promoted) == len(latent.suppressed) == 10


def test_open_unverified_reads_no_matrix(path: Path) -> None:
    edit_tensors(path, bundle.WEIGHTS, poison("decoder", float("nan")))
    bundle.open_unverified(path).catalogue.close()
    with pytest.raises(BundleError, match=r"^sae\.safetensors decoder"):
        bundle.load(path)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_write_replaces_nothing_but_bundles(path: Path, tmp_path: Path, kind: str) -> None:
    read, other = bundle.load(path), tmp_path / "other"
    if kind == "folder":
        other.mkdir()
    (other / "thesis" if kind == "folder" else other).write_text("years of work")
    with pytest.raises(BundleError, match="is there and is no bundle"):
        bundle.write(other, read.manifest, read.sae, read.statistics, read.conformance, path / bundle.CATALOGUE)
    assert (other / "thesis" if kind == "folder" else other).read_text() == "years of work"
