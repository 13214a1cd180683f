"""The artifact that goes from trainer to server: a folder with one SAE and all that is needed to trust it.

manifest.json             what it is, what it fits, and the SHA-256 of every other file
sae.safetensors           the canonical form (sae.SAE), bfloat16 or float32 on disk, float32 once loaded
statistics.safetensors    max_activation [F], frequency [F], mean [d] (mean residual), residual_norm [] (mean ||x||)
conformance.safetensors   inputs [n, d], real residuals, and the activations [m, F] expected of the first m of them
catalogue.sqlite          labels and contexts (catalogue.Catalogue)
"""

import hashlib
import shutil
import sqlite3
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import msgspec
import safetensors
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from sae_models import sae
from sae_models.catalogue import Catalogue
from sae_models.sae import SAE

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "sae.safetensors"
STATISTICS = "statistics.safetensors"
CONFORMANCE = "conformance.safetensors"
CATALOGUE = "catalogue.sqlite"
FILES = frozenset({WEIGHTS, STATISTICS, CONFORMANCE, CATALOGUE})

ACTIVATION_TOLERANCE = 1e-3
CLAIM_TOLERANCE = 0.25


class BundleError(Exception):
    """A bundle that must not be served; the message begins with the field that is wrong."""


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The one checkpoint a bundle fits. `sha256` is `model_sha256` of its folder."""

    name: str
    sha256: str
    hidden_size: int


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the SAE was trained, and how good it is on sections it was not trained on."""

    tokens: int
    seed: int
    l0: float
    fvu: float
    ce_recovered: float
    dead_share: float
    credit: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of manifest.json. `k` is null where the architecture has none."""

    format_version: int
    name: str
    model: Model
    site: str
    architecture: str
    activation: str
    input_normalisation: str
    d: int
    latents: int
    k: int | None
    training: Training
    files: dict[str, str]


@dataclass(frozen=True)
class Statistics:
    """Of the corpus at the site, BOS excluded: max_activation [F], frequency [F], mean [d], residual_norm []."""

    max_activation: Tensor
    frequency: Tensor
    mean: Tensor
    residual_norm: Tensor


@dataclass(frozen=True)
class Conformance:
    """Real residuals [n, d] and the activations [m, F], m <= n, that the SAE must give on the first m of them."""

    inputs: Tensor
    activations: Tensor


@dataclass(frozen=True)
class Bundle:
    """A verified bundle. `sha256` is its identity: the hash of the manifest, which holds those of all files."""

    path: Path
    manifest: Manifest
    sha256: str
    sae: SAE
    statistics: Statistics
    conformance: Conformance
    catalogue: Catalogue


def load(path: Path) -> Bundle:
    """Reads and verifies a bundle. BundleError: the field that is missing, tampered with or out of shape."""
    raw = _read(path, MANIFEST)
    manifest = _parse(raw)
    _check_files(path, manifest)
    weights = SAE(*_tensors(path, WEIGHTS, _weight_shapes(manifest)).values())
    statistics = Statistics(**_tensors(path, STATISTICS, _statistics_shapes(manifest)))
    conformance = Conformance(
        **_tensors(path, CONFORMANCE, {"inputs": (-1, manifest.d), "activations": (-1, manifest.latents)})
    )
    _check_conformance(manifest, weights, conformance)
    catalogue = _catalogue(path, manifest)
    return Bundle(path, manifest, hashlib.sha256(raw).hexdigest(), weights, statistics, conformance, catalogue)


def check_model(bundle: Bundle, sha256: str, hidden_size: int) -> None:
    """BundleError unless the bundle was made for the checkpoint with this `model_sha256` and width."""
    model = bundle.manifest.model
    _require(
        model.hidden_size == hidden_size,
        "model.hidden_size",
        f"the bundle fits {model.hidden_size}, the model has {hidden_size}",
    )
    _require(
        model.sha256 == sha256, "model.sha256", f"the bundle fits {model.name} {model.sha256}, the model is {sha256}"
    )


def model_sha256(folder: Path) -> str:
    """SHA-256 of a checkpoint's safetensors files, one after the other in the order of their names."""
    digest = hashlib.sha256()
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"model: no safetensors file in {folder}")
    for shard in shards:
        with shard.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def write(
    path: Path, manifest: Manifest, weights: SAE, statistics: Statistics, conformance: Conformance, catalogue: Path
) -> Bundle:
    """Writes the bundle beside `path` and moves it there whole, in place of an older; `manifest.files` is filled in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        folder = Path(scratch) / path.name
        folder.mkdir()
        for name, content in ((WEIGHTS, weights), (STATISTICS, statistics), (CONFORMANCE, conformance)):
            values = {field.name: getattr(content, field.name) for field in fields(content)}
            tensors = {key: value.contiguous() for key, value in values.items() if isinstance(value, Tensor)}
            (folder / name).write_bytes(save(tensors))
        shutil.copyfile(catalogue, folder / CATALOGUE)
        files = {name: _sha256(folder / name) for name in sorted(FILES)}
        encoded = msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(manifest, files=files)), indent=2)
        (folder / MANIFEST).write_bytes(encoded + b"\n")
        load(folder).catalogue.close()
        if path.exists():
            path.rename(Path(scratch) / "replaced")
        folder.rename(path)
    return load(path)


def conformance_of(weights: SAE, inputs: Tensor, expected: int = 32) -> Conformance:
    """Conformance vectors from residuals [n, d]: activations are kept for the first `expected`."""
    return Conformance(inputs, weights.encode(inputs[:expected]))


def _require(condition: bool, field: str, problem: str) -> None:
    if not condition:
        raise BundleError(f"{field}: {problem}")


def _read(path: Path, name: str) -> bytes:
    _require((path / name).is_file(), name, f"not a file in {path}")
    return (path / name).read_bytes()


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _parse(raw: bytes) -> Manifest:
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{MANIFEST}: {error}") from error
    _require(
        manifest.format_version == FORMAT_VERSION,
        "format_version",
        f"{manifest.format_version}, this program reads {FORMAT_VERSION}",
    )
    _require(
        manifest.d == manifest.model.hidden_size,
        "d",
        f"{manifest.d}, the model's hidden size is {manifest.model.hidden_size}",
    )
    _require(manifest.latents > 0, "latents", f"{manifest.latents}")
    return manifest


def _check_files(path: Path, manifest: Manifest) -> None:
    _require(manifest.files.keys() == FILES, "files", f"{sorted(manifest.files)} instead of {sorted(FILES)}")
    for name, expected in manifest.files.items():
        _read(path, name)
        _require(
            _sha256(path / name) == expected, f"files.{name}", "the content does not have the SHA-256 of the manifest"
        )


def _weight_shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    matrix, latents = (manifest.latents, manifest.d), (manifest.latents,)
    return {"encoder": matrix, "bias": latents, "threshold": latents, "decoder": matrix, "decoder_bias": (manifest.d,)}


def _statistics_shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    latents = (manifest.latents,)
    return {"max_activation": latents, "frequency": latents, "mean": (manifest.d,), "residual_norm": ()}


def _tensors(path: Path, name: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The file's tensors as float32; -1 in a shape stands for any length."""
    try:
        tensors = load_file(path / name)
    except safetensors.SafetensorError as error:
        raise BundleError(f"{name}: {error}") from error
    _require(tensors.keys() == shapes.keys(), name, f"holds {sorted(tensors)} instead of {sorted(shapes)}")
    for key, tensor in tensors.items():
        shape = tuple(tensor.shape)
        fits = len(shape) == len(shapes[key]) and all(
            want in (-1, have) for have, want in zip(shape, shapes[key], strict=True)
        )
        _require(fits, f"{name} {key}", f"shape {shape} instead of {shapes[key]}")
        _require(bool(torch.isfinite(tensor).all()), f"{name} {key}", "has values that are not finite")
    return {key: tensors[key].float() for key in shapes}


def _catalogue(path: Path, manifest: Manifest) -> Catalogue:
    """Opens the catalogue, and reads from each of its tables."""
    try:
        catalogue = Catalogue(path / CATALOGUE)
        _require(
            len(catalogue) == manifest.latents,
            CATALOGUE,
            f"{len(catalogue)} latents, the manifest says {manifest.latents}",
        )
        catalogue.get(manifest.latents - 1)
        catalogue.search(manifest.name, 1)
    except (sqlite3.DatabaseError, LookupError) as error:
        raise BundleError(f"{CATALOGUE}: {error}") from error
    return catalogue


def _check_conformance(manifest: Manifest, weights: SAE, conformance: Conformance) -> None:
    """The arithmetic reproduces, and the SAE is as sparse and as faithful as the manifest claims."""
    inputs, expected = conformance.inputs, conformance.activations
    _require(
        0 < len(expected) <= len(inputs), f"{CONFORMANCE} activations", f"{len(expected)} rows for {len(inputs)} inputs"
    )
    encoded = weights.encode(inputs)
    difference = float((encoded[: len(expected)] - expected).abs().max())
    _require(
        difference < ACTIVATION_TOLERANCE * float(expected.abs().max()),
        f"{CONFORMANCE} activations",
        f"differ by {difference}",
    )
    claims = (
        ("l0", sae.l0(encoded), manifest.training.l0),
        ("fvu", sae.fvu(inputs, weights.decode(encoded)), manifest.training.fvu),
    )
    for name, measured, claimed in claims:
        near = abs(measured - claimed) <= CLAIM_TOLERANCE * claimed
        _require(near, f"training.{name}", f"{claimed:.4g} claimed, {measured:.4g} measured on the conformance inputs")
