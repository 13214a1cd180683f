"""A bundle is refused, by the name of the field, whenever a part of it is not what the manifest says."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_models import bundle, catalogue
from sae_models.bundle import BundleError, Manifest, Model, Statistics, Training
from sae_models.catalogue import Latent, Summary
from sae_models.sae import SAE, fvu, l0

F, D = 12, 6


def write_bundle(path: Path) -> bundle.Bundle:
    """A small bundle whose claims are true."""
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(F, D, generator=g), dim=1)
    sae = SAE(directions, torch.zeros(F), torch.full((F,), 0.1), directions / 2, torch.zeros(D))
    inputs = torch.randn(64, D, generator=g)
    encoded = sae.encode(inputs)
    training = Training(1000, 0, l0(encoded), fvu(inputs, sae.decode(encoded)), 0.9, 0.0, "a credit")
    model = Model("toy", "ab" * 32, D)
    manifest = Manifest(
        1, path.name, model, "layers.1.resid_post", "batch_topk", "jumprelu", "folded", D, F, 4, training, {}
    )
    statistics = Statistics(encoded.amax(0), (encoded > 0).float().mean(0), inputs.mean(0), inputs.norm(dim=1).mean())
    database = path.parent / "entries.sqlite"
    database.unlink(missing_ok=True)
    catalogue.write(database, (Latent(Summary(i, f"word{i}", 0.5, 1.0), (), ()) for i in range(F)))
    return bundle.write(path, manifest, sae, statistics, bundle.conformance_of(sae, inputs, 16), database)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "toy-layers.1"
    write_bundle(folder).catalogue.close()
    return folder


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest's JSON in place."""
    content = json.loads((path / bundle.MANIFEST).read_text())
    change(content)
    (path / bundle.MANIFEST).write_text(json.dumps(content))


def edit_tensors(path: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes a file's tensors and makes its hash right again, as a careless or a clever hand would."""
    tensors = {key: tensor.clone() for key, tensor in load_file(path / name).items()}
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path / name)
    rehash(path, name)


def rehash(path: Path, name: str) -> None:
    """Makes the manifest's hash of a file right."""
    digest = hashlib.sha256((path / name).read_bytes()).hexdigest()
    edit_manifest(path, lambda content: content["files"].update({name: digest}))


def test_what_was_written_is_read(path: Path) -> None:
    read = bundle.load(path)
    assert read.manifest.name == "toy-layers.1"
    assert read.sae.latents == F
    assert read.catalogue.get(3).summary.label == "word3"
    assert read.sha256 == hashlib.sha256((path / bundle.MANIFEST).read_bytes()).hexdigest()
    bundle.check_model(read, "ab" * 32, D)


def test_weights_may_be_bfloat16_on_disk(path: Path) -> None:
    edit_tensors(path, bundle.WEIGHTS, lambda t: t.update({key: tensor.bfloat16() for key, tensor in t.items()}))
    weights = SAE(**{key: tensor.float() for key, tensor in load_file(path / bundle.WEIGHTS).items()})  # type: ignore[arg-type]
    expected = weights.encode(load_file(path / bundle.CONFORMANCE)["inputs"][:16])
    edit_tensors(path, bundle.CONFORMANCE, lambda t: t.update(activations=expected))
    assert bundle.load(path).sae.encoder.dtype == torch.float32


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("format_version", lambda m: m.update(format_version=2)),
        ("manifest.json.*site", lambda m: m.pop("site")),
        ("manifest.json.*surprise", lambda m: m.update(surprise=1)),
        (r"manifest.json.*\$\.latents", lambda m: m.update(latents="many")),
        (r"manifest.json.*\$\.training\.fvu", lambda m: m["training"].update(fvu=None)),
        ("d:", lambda m: m.update(d=7)),
        ("latents", lambda m: m.update(latents=0)),
        ("sae.safetensors .*: shape", lambda m: m.update(latents=13)),
        ("files:", lambda m: m["files"].pop(bundle.CATALOGUE)),
        ("files:", lambda m: m["files"].update({"../other": "00"})),
        (r"files\.catalogue\.sqlite", lambda m: m["files"].update({bundle.CATALOGUE: "00"})),
        (r"training\.l0", lambda m: m["training"].update(l0=1.0)),
        (r"training\.fvu", lambda m: m["training"].update(fvu=0.001)),
    ],
)
def test_a_wrong_manifest_is_refused_by_field(
    path: Path, field: str, change: Callable[[dict[str, Any]], object]
) -> None:
    edit_manifest(path, change)
    with pytest.raises(BundleError, match=f"^{field}"):
        bundle.load(path)


def transpose(key: str) -> Callable[[dict[str, torch.Tensor]], object]:
    """Turns a matrix on its side."""
    return lambda t: t.update({key: t[key].T})


def poison(key: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    """Puts a value in the first place."""
    return lambda t: t[key].view(-1)[0].fill_(value)


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
        ("conformance.safetensors inputs: shape", bundle.CONFORMANCE, lambda t: t.update(inputs=t["inputs"][:, :2])),
        (
            "conformance.safetensors activations: 17 rows",
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
def test_wrong_tensors_are_refused_though_the_hash_is_right(
    path: Path, field: str, name: str, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    edit_tensors(path, name, change)
    with pytest.raises(BundleError, match=f"^{field}"):
        bundle.load(path)


@pytest.mark.parametrize("name", sorted(bundle.FILES))
def test_one_changed_byte_is_refused(path: Path, name: str) -> None:
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(BundleError, match=rf"^files\.{name}"):
        bundle.load(path)


@pytest.mark.parametrize("name", sorted({bundle.MANIFEST, *bundle.FILES}))
def test_a_missing_file_is_refused(path: Path, name: str) -> None:
    (path / name).unlink()
    with pytest.raises(BundleError, match=f"^{name}"):
        bundle.load(path)


@pytest.mark.parametrize("name", [bundle.WEIGHTS, bundle.STATISTICS, bundle.CONFORMANCE, bundle.CATALOGUE])
def test_junk_with_the_right_hash_is_refused(path: Path, name: str) -> None:
    (path / name).write_bytes(b"junk")
    rehash(path, name)
    with pytest.raises(BundleError, match=f"^{name}"):
        bundle.load(path)


def test_a_catalogue_of_another_size_is_refused(path: Path) -> None:
    (path / bundle.CATALOGUE).unlink()
    catalogue.write(path / bundle.CATALOGUE, [])
    rehash(path, bundle.CATALOGUE)
    with pytest.raises(BundleError, match=r"^catalogue\.sqlite: 0 latents"):
        bundle.load(path)


def test_another_model_is_refused_by_field(path: Path) -> None:
    read = bundle.load(path)
    with pytest.raises(BundleError, match=r"^model\.sha256"):
        bundle.check_model(read, "cd" * 32, D)
    with pytest.raises(BundleError, match=r"^model\.hidden_size"):
        bundle.check_model(read, "ab" * 32, D + 1)


def test_the_model_hash_covers_every_shard(tmp_path: Path) -> None:
    (tmp_path / "b.safetensors").write_bytes(b"two")
    (tmp_path / "a.safetensors").write_bytes(b"one")
    assert bundle.model_sha256(tmp_path) == hashlib.sha256(b"onetwo").hexdigest()
    with pytest.raises(FileNotFoundError, match=r"^model: "):
        bundle.model_sha256(tmp_path / "nowhere")


def test_writing_again_replaces_the_bundle_and_leaves_nothing_else(path: Path) -> None:
    (path / "stale").write_text("from an older format")
    write_bundle(path)
    assert {file.name for file in path.iterdir()} == {bundle.MANIFEST, *bundle.FILES}
    assert {file.name for file in path.parent.iterdir()} == {path.name, "entries.sqlite"}


def test_a_bundle_that_would_be_refused_is_not_written(path: Path) -> None:
    read = bundle.load(path)
    broken = SAE(
        read.sae.encoder, read.sae.bias, read.sae.threshold, read.sae.decoder * float("nan"), read.sae.decoder_bias
    )
    with pytest.raises(BundleError, match=r"^sae\.safetensors decoder"):
        bundle.write(path, read.manifest, broken, read.statistics, read.conformance, path / bundle.CATALOGUE)
    assert bundle.load(path).sha256 == read.sha256
