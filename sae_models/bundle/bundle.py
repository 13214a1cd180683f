"""The artifact that goes from trainer to server: a folder with one SAE and all that is needed to trust it.

manifest.json             what it is, what it fits, and the SHA-256 of every other file (manifest.Manifest)
sae.safetensors           the canonical form (sae.SAE); matrices stay in the manifest's dtype and memory-mapped
statistics.safetensors    max_activation [F], frequency [F], mean [d] (mean residual), residual_norm [] (mean ||x||);
                          absent where an SAE was imported without text to measure it on
conformance.safetensors   inputs [n, d], with a router [n, L, d], and the activations [m, F] expected of the first m;
                          targets [n, d_out] where another site is written than is read
catalogue.sqlite          labels and contexts (catalogue.Catalogue)
"""

import hashlib
import shutil
import sqlite3
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NoReturn

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from rudder.sae_models import fidelity
from rudder.sae_models.bundle import manifest
from rudder.sae_models.bundle.catalogue import Catalogue
from rudder.sae_models.bundle.manifest import (
    DTYPES,
    FORMAT_VERSION,
    BundleError,
    InputNormalisation,
    Manifest,
    Model,
    Source,
    Training,
    describe,
    require,
)
from rudder.sae_models.formats.source import FormatError
from rudder.sae_models.formats.tensors import finite, fits, read_safetensors
from rudder.sae_models.sae import SAE

__all__ = [
    "FORMAT_VERSION", "Bundle", "BundleError", "Conformance", "InputNormalisation", "Manifest", "Model", "Source",
    "Statistics", "Training", "check_model", "conformance_of", "describe", "load", "mapped", "model_sha256", "write",
]  # fmt: skip

MANIFEST = "manifest.json"
WEIGHTS = "sae.safetensors"
STATISTICS = "statistics.safetensors"
CONFORMANCE = "conformance.safetensors"
CATALOGUE = "catalogue.sqlite"
FILES = frozenset({WEIGHTS, STATISTICS, CONFORMANCE, CATALOGUE})
MATRICES = frozenset({"encoder", "decoder", "skip"})

MANIFEST_LIMIT = 1 << 20
QUICK_S = 2.0
ACTIVATION_TOLERANCE = 1e-3
CLAIM_TOLERANCE = 0.25
CONFORMANCE_TOKENS = 128
EXPECTED_TOKENS = 32


@dataclass(frozen=True)
class Statistics:
    """Of the corpus at the site, BOS excluded: max_activation [F], frequency [F], mean [d], residual_norm []."""

    max_activation: Tensor
    frequency: Tensor
    mean: Tensor
    residual_norm: Tensor


@dataclass(frozen=True)
class Conformance:
    """Inputs [n, d] and the activations [m, F], m <= n, that the SAE must give on the first m of them.

    The inputs are real residuals where the manifest has an L0 and FVU, which then hold on them. `targets` [n, d_out]
    are what the output must be near to, where that is not the input.
    """

    inputs: Tensor
    activations: Tensor
    targets: Tensor | None = None


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

    @property
    def measured(self) -> bool:
        """Whether the statistics are known; they are all zero where not."""
        return STATISTICS in self.manifest.files


def load(path: Path) -> Bundle:
    """Reads and verifies a bundle. BundleError: the field that is missing, tampered with or out of shape."""
    check_files(path, read_manifest(path)[0])
    bundle = mapped(path)
    try:
        for check in (check_values, check_conformance, check_catalogue):
            check(bundle)
    except BundleError:
        bundle.catalogue.close()
        raise
    return bundle


def mapped(path: Path) -> Bundle:
    """A bundle of which only names, shapes and types were checked: quick, and reads no matrix."""
    content, sha256 = read_manifest(path)
    weights = manifest.sae_of(content, _tensors(path, WEIGHTS, manifest.weight_shapes(content)))
    check_dtype(content, weights)
    shapes = _statistics_shapes(content)
    known = STATISTICS in content.files
    statistics = _tensors(path, STATISTICS, shapes) if known else {k: torch.zeros(s) for k, s in shapes.items()}
    conformance = _tensors(path, CONFORMANCE, _conformance_shapes(content))
    catalogue = _opened_catalogue(path)
    return Bundle(path, content, sha256, weights, Statistics(**statistics), Conformance(**conformance), catalogue)


def read_manifest(path: Path) -> tuple[Manifest, str]:
    """The manifest of a bundle's folder, and its SHA-256."""
    file = path / MANIFEST
    require(file.is_file(), MANIFEST, f"not a file in {path}")
    size = file.stat().st_size
    require(size <= MANIFEST_LIMIT, MANIFEST, f"{size} bytes, at most {MANIFEST_LIMIT} are read")
    raw = file.read_bytes()
    return manifest.parse(raw), hashlib.sha256(raw).hexdigest()


def check_model(bundle: Bundle, sha256: str, hidden_size: int) -> None:
    """BundleError unless the bundle was made for the checkpoint with this `model_sha256` and width."""
    model = bundle.manifest.model
    width = f"the bundle fits {model.hidden_size}, the model has {hidden_size}"
    require(model.hidden_size == hidden_size, "model.hidden_size", width)
    fits_model = f"the bundle fits {model.name} {model.sha256}, the model is {sha256}"
    require(model.sha256 == sha256, "model.sha256", fits_model)


def model_sha256(folder: Path) -> str:
    """SHA-256 of a checkpoint's safetensors files, one after the other in the order of their names."""
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"model: no safetensors file in {folder}")
    with hashing(shards, f"hashing {folder.name}") as bar:
        return sha256_of(shards, bar)


def hashing(files: Sequence[Path], task: str) -> "tqdm[NoReturn]":
    """The bar, in bytes of the files, of a task that shows itself on a terminal if it is not quick."""
    total = sum(file.stat().st_size for file in files)
    return tqdm(total=total, desc=task, unit="B", unit_scale=True, delay=QUICK_S, leave=False, disable=None)


def sha256_of(files: Sequence[Path], bar: "tqdm[NoReturn]") -> str:
    """Of files one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                bar.update(len(block))
    return digest.hexdigest()


def write(
    path: Path,
    content: Manifest,
    weights: SAE,
    statistics: Statistics | None,
    conformance: Conformance,
    catalogue: Path,
) -> Bundle:
    """Writes the bundle beside `path` and moves it there whole, in place of an older; `files` is filled in."""
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        folder = Path(scratch) / path.name
        folder.mkdir()
        _save(folder / WEIGHTS, manifest.tensors_of(weights))
        _save(folder / CONFORMANCE, _fields(conformance))
        if statistics is not None:
            _save(folder / STATISTICS, _fields(statistics))
        shutil.copyfile(catalogue, folder / CATALOGUE)
        hashed = msgspec.structs.replace(
            content, files=_sha256s(folder, sorted(file.name for file in folder.iterdir()))
        )
        for name in hashed.files:
            # safetensors makes files that only their owner may read.
            shutil.copymode(folder / CATALOGUE, folder / name)
        (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(hashed), indent=2) + b"\n")
        verified = load(folder)
        if path.exists():
            path.rename(Path(scratch) / "replaced")
        folder.rename(path)
    return replace(verified, path=path)


def check_replaceable(path: Path) -> None:
    """BundleError if there is something at `path` that is no bundle: writing there would destroy it."""
    free = not path.exists() or (path / MANIFEST).is_file() or (path.is_dir() and not any(path.iterdir()))
    require(free, str(path), "is there and is no bundle, so it is left as it is")


def conformance_of(
    weights: SAE, inputs: Tensor, expected: int = EXPECTED_TOKENS, targets: Tensor | None = None
) -> Conformance:
    """Conformance vectors from residuals [n, d]: activations are kept for the first `expected`."""
    return Conformance(inputs, fidelity.encoded(weights, inputs[:expected]), targets)


def check_files(path: Path, content: Manifest) -> None:
    """BundleError unless the folder has the manifest's files with the manifest's hashes."""
    needed = FILES - {STATISTICS}
    require(needed <= content.files.keys() <= FILES, "files", f"{sorted(content.files)} instead of {sorted(FILES)}")
    for name in content.files:
        require((path / name).is_file(), name, f"not a file in {path}")
    for name, found in _sha256s(path, content.files).items():
        differs = "the content does not have the SHA-256 of the manifest"
        require(found == content.files[name], f"files.{name}", differs)


def check_dtype(content: Manifest, weights: SAE) -> None:
    """BundleError unless the matrices are of the manifest's dtype."""
    for name in ("encoder", "decoder", "skip"):
        matrix = getattr(weights, name)
        wanted = matrix is None or matrix.dtype == DTYPES[content.dtype]
        require(wanted, "dtype", f"{content.dtype}, {name} is {matrix.dtype if matrix is not None else None}")


def check_values(bundle: Bundle) -> None:
    """BundleError unless all numbers are finite, and no threshold is negative."""
    stored = {WEIGHTS: manifest.tensors_of(bundle.sae), CONFORMANCE: _fields(bundle.conformance)}
    for file, tensors in {**stored, STATISTICS: _fields(bundle.statistics)}.items():
        for name, tensor in tensors.items():
            require(finite(tensor), f"{file} {name}", "has values that are not finite")
    require(bool((bundle.sae.threshold >= 0).all()), f"{WEIGHTS} threshold", "has negative values")


def check_conformance(bundle: Bundle) -> None:
    """BundleError unless the arithmetic reproduces, and the SAE is as sparse and as faithful as the manifest claims."""
    inputs, expected = bundle.conformance.inputs, bundle.conformance.activations
    field, rows = f"{CONFORMANCE} activations", len(expected)
    require(0 < rows <= len(inputs), field, f"{rows} rows for {len(inputs)} inputs")
    claims, found, differences = bundle.manifest.training, fidelity.Fidelity(), []
    claimless = claims.l0 is None and claims.fvu is None
    # One pass over both: converting the dictionary costs more than all else here.
    for part, target in fidelity.chunks(bundle.sae, inputs[:rows] if claimless else inputs, bundle.conformance.targets):
        latents = bundle.sae.encode(part)
        wanted = expected[found.tokens : found.tokens + len(part)]
        differences.append((latents[: len(wanted)] - wanted).abs())
        fidelity.count(found, bundle.sae, latents, part, target)
    difference = float(torch.cat(differences).max())
    require(difference < ACTIVATION_TOLERANCE * float(expected.abs().max()), field, f"differ by {difference}")
    for name, value, claimed in (("l0", found.l0, claims.l0), ("fvu", found.fvu, claims.fvu)):
        problem = f"{claimed} claimed, {value:.4g} measured on the conformance inputs"
        require(near(value, claimed), f"training.{name}", problem)


def near(measured: float, claimed: float | None) -> bool:
    """Whether a figure is what was claimed, as far as other text allows to tell."""
    return claimed is None or abs(measured - claimed) <= CLAIM_TOLERANCE * claimed


def check_catalogue(bundle: Bundle) -> None:
    """BundleError unless the catalogue has an entry for every latent; reads from its tables."""
    catalogue, latents = bundle.catalogue, bundle.manifest.latents
    try:
        count = len(catalogue)
        require(count == latents, CATALOGUE, f"{count} latents, the manifest says {latents}")
        catalogue.get(latents - 1)
        catalogue.search(bundle.manifest.name, 1)
    except (sqlite3.DatabaseError, LookupError) as error:
        raise BundleError(f"{CATALOGUE}: {error}") from error


def _opened_catalogue(path: Path) -> Catalogue:
    try:
        return Catalogue(path / CATALOGUE)
    except sqlite3.DatabaseError as error:
        raise BundleError(f"{CATALOGUE}: {error}") from error


def _sha256s(path: Path, names: Mapping[str, str] | list[str]) -> dict[str, str]:
    """Of several files at once: hashing holds no lock."""
    files = [path / name for name in names]
    with ThreadPoolExecutor() as pool, hashing(files, f"hashing {path.name}") as bar:
        return dict(zip(names, pool.map(lambda file: sha256_of([file], bar), files), strict=True))


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # Encoder and decoder of a tied SAE are one tensor; the file holds both.
        shared = any(tensor.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in apart.values())
        apart[name] = tensor.contiguous().clone() if shared else tensor.contiguous()
    save_file(apart, path)


def _fields(content: Statistics | Conformance) -> dict[str, Tensor]:
    values = {field.name: getattr(content, field.name) for field in fields(content)}
    return {name: value for name, value in values.items() if value is not None}


def _statistics_shapes(content: Manifest) -> dict[str, tuple[int, ...]]:
    latents = (content.latents,)
    return {"max_activation": latents, "frequency": latents, "mean": (content.d,), "residual_norm": ()}


def _conformance_shapes(content: Manifest) -> dict[str, tuple[int, ...]]:
    inputs = (-1, len(content.sites), content.d) if content.router else (-1, content.d)
    shapes: dict[str, tuple[int, ...]] = {"inputs": inputs, "activations": (-1, content.latents)}
    if content.transcodes and content.training.fvu is not None:
        shapes["targets"] = (-1, content.d_out)
    return shapes


def _tensors(path: Path, name: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The file's tensors, all but the matrices as float32; -1 in a shape stands for any length."""
    require((path / name).is_file(), name, f"not a file in {path}")
    try:
        tensors = read_safetensors(path / name)
    except FormatError as error:
        raise BundleError(str(error)) from error
    require(tensors.keys() == shapes.keys(), name, f"holds {sorted(tensors)} instead of {sorted(shapes)}")
    for key, tensor in tensors.items():
        require(fits(tensor, shapes[key]), f"{name} {key}", f"shape {tuple(tensor.shape)} instead of {shapes[key]}")
        require(tensor.is_floating_point(), f"{name} {key}", f"dtype {tensor.dtype}")
    return {key: tensors[key] if key in MATRICES else tensors[key].float() for key in shapes}
