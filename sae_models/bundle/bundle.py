"""Read, verify and write bundles: folders with one SAE and everything needed to trust it.

manifest.json             model, sites, shapes, training figures; the SHA-256 of every other file (manifest.Manifest)
sae.safetensors           the canonical form (sae.SAE); matrices in the manifest's dtype, read memory-mapped; or else
                          shards of whole tensors, sae-00001-of-00002.safetensors
statistics.safetensors    max_activation [F], frequency [F], mean [d] (mean residual), residual_norm [] (mean ||x||);
                          absent if the SAE was imported without a corpus
conformance.safetensors   inputs [n, d], with a router [n, L, d]; expected activations [m, F] of the first m inputs;
                          targets [n, d_out] of a transcoder
catalogue.sqlite          labels and contexts (catalogue.Catalogue); or else catalogue.sqlite.xz, a quarter of its size
"""

import hashlib
import lzma
import re
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
    Context,
    InputNormalisation,
    Manifest,
    Model,
    Source,
    Training,
    describe,
    require,
)
from rudder.sae_models.files import replacing_folder
from rudder.sae_models.formats.source import FormatError
from rudder.sae_models.formats.tensors import all_finite, has_shape, read_safetensors
from rudder.sae_models.sae import SAE

__all__ = [
    "FORMAT_VERSION", "Bundle", "BundleError", "Conformance", "Context", "Form", "InputNormalisation", "Manifest",
    "Model", "Source", "Statistics", "Training", "check_model", "conformance_of", "describe", "load", "model_sha256",
    "open_unverified", "write",
]  # fmt: skip

MANIFEST = "manifest.json"
WEIGHTS = "sae.safetensors"
STATISTICS = "statistics.safetensors"
CONFORMANCE = "conformance.safetensors"
CATALOGUE = "catalogue.sqlite"
COMPRESSED_CATALOGUE = "catalogue.sqlite.xz"
# The files of a bundle that is neither in shards nor compressed.
FILES = frozenset({WEIGHTS, STATISTICS, CONFORMANCE, CATALOGUE})
SHARD = re.compile(r"sae-(\d{5})-of-(\d{5})\.safetensors")
MATRICES = frozenset({"encoder", "decoder", "skip"})

# Suffixes of a checkpoint's files that decide what its weights do and which ids it reads.
SETTINGS = frozenset({".json", ".jinja", ".txt", ".model"})
MANIFEST_LIMIT = 1 << 20
# Of a catalogue that is unpacked; that of a million latents has 2 GB.
CATALOGUE_LIMIT = 1 << 32
# Seconds before a progress bar appears.
PROGRESS_DELAY_S = 2.0
ACTIVATION_TOLERANCE = 1e-3
# L0 and FVU vary by this much, relatively, between texts.
CLAIM_TOLERANCE = 0.25
CONFORMANCE_TOKENS = 128
EXPECTED_TOKENS = 32


@dataclass(frozen=True)
class Statistics:
    """Statistics of a corpus without BOS, excluded positions and tokens (manifest.Context), and attention sinks:
    max_activation [F], frequency [F], mean [d], residual_norm [] at the site."""

    max_activation: Tensor
    frequency: Tensor
    mean: Tensor
    residual_norm: Tensor


@dataclass(frozen=True)
class Conformance:
    """Conformance vectors: inputs [n, d] and the activations [m, F], m <= n, that the SAE must give on the first m.

    Where the manifest claims L0 and FVU, the inputs are real residuals on which both hold. A transcoder also has
    `targets` [n, d_out], which its output must approximate.
    """

    inputs: Tensor
    activations: Tensor
    targets: Tensor | None = None


@dataclass(frozen=True)
class Form:
    """The files of a bundle. `shard_bytes`: of the tensors in a file of weights, of which each holds one tensor at
    least; None: one file. `compressed`: the catalogue.
    """

    shard_bytes: int | None = None
    compressed: bool = False


@dataclass(frozen=True)
class Bundle:
    """A verified bundle. `sha256` is its identity: the hash of the manifest, which holds the hashes of all files."""

    path: Path
    manifest: Manifest
    sha256: str
    sae: SAE
    statistics: Statistics
    conformance: Conformance
    catalogue: Catalogue

    @property
    def measured(self) -> bool:
        """Whether the bundle has statistics; without them all are zero."""
        return STATISTICS in self.manifest.files


def load(path: Path) -> Bundle:
    """Read and verify a bundle. BundleError: the field that is missing, tampered with or of the wrong shape."""
    check_files(path, read_manifest(path)[0])
    bundle = open_unverified(path)
    try:
        for check in (check_values, check_conformance, check_catalogue):
            check(bundle)
    except BundleError:
        bundle.catalogue.close()
        raise
    return bundle


def open_unverified(path: Path) -> Bundle:
    """Open a bundle memory-mapped; check names, shapes and dtypes only, without reading a matrix.

    For processes that share a bundle which `load` has verified.
    """
    content, sha256 = read_manifest(path)
    weights = manifest.sae_of(content, _tensors(path, weight_files(content), manifest.weight_shapes(content)))
    check_dtype(content, weights)
    shapes = _statistics_shapes(content)
    known = STATISTICS in content.files
    statistics = _tensors(path, [STATISTICS], shapes) if known else {k: torch.zeros(s) for k, s in shapes.items()}
    conformance = _tensors(path, [CONFORMANCE], _conformance_shapes(content))
    catalogue = _opened_catalogue(path / catalogue_file(content))
    return Bundle(path, content, sha256, weights, Statistics(**statistics), Conformance(**conformance), catalogue)


def read_manifest(path: Path) -> tuple[Manifest, str]:
    """Return the manifest of a bundle's folder, and its SHA-256."""
    file = path / MANIFEST
    require(file.is_file(), MANIFEST, f"not a file in {path}")
    size = file.stat().st_size
    require(size <= MANIFEST_LIMIT, MANIFEST, f"{size} bytes, at most {MANIFEST_LIMIT} are read")
    raw = file.read_bytes()
    return manifest.parse(raw), hashlib.sha256(raw).hexdigest()


def check_model(bundle: Bundle, sha256: str, hidden_size: int) -> None:
    """Raise BundleError unless the bundle fits the checkpoint with this `model_sha256` and hidden size."""
    model = bundle.manifest.model
    width = f"the bundle fits {model.hidden_size}, the model has {hidden_size}"
    require(model.hidden_size == hidden_size, "model.hidden_size", width)
    fits_model = f"the bundle fits {model.name} {model.sha256}, the model is {sha256}"
    require(model.sha256 == sha256, "model.sha256", fits_model)


def model_sha256(folder: Path) -> str:
    """Return the SHA-256 of a checkpoint's safetensors files, concatenated in the order of their names."""
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"model: no safetensors file in {folder}")
    with byte_progress(shards, f"hashing {folder.name}") as bar:
        return sha256_of(shards, bar)


def settings_sha256(folder: Path) -> str:
    """Return a digest of a checkpoint's files beside its weights: configuration, tokenizer, chat template.

    Another config.json gives other numbers from the same weights. Empty if there is no such file.
    """
    found = sorted(path for path in folder.glob("*") if path.suffix in SETTINGS and path.is_file())
    lines = [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in found]
    return hashlib.sha256("".join(lines).encode()).hexdigest() if lines else ""


def byte_progress(files: Sequence[Path], task: str) -> "tqdm[NoReturn]":
    """Return a progress bar over the bytes of files; it appears on a terminal after PROGRESS_DELAY_S."""
    total = sum(file.stat().st_size for file in files)
    return tqdm(total=total, desc=task, unit="B", unit_scale=True, delay=PROGRESS_DELAY_S, leave=False, disable=None)


def sha256_of(files: Sequence[Path], bar: "tqdm[NoReturn]") -> str:
    """Return the SHA-256 of concatenated files."""
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
    form: Form | None = None,
) -> Bundle:
    """Write a bundle atomically, in place of an older one; fill in the manifest's `files` and verify the result.

    `form`: of the files; None: that of the older one, or else one file of weights and a plain catalogue.
    BundleError: the content is inconsistent, or `path` exists and is no bundle.
    """
    check_replaceable(path)
    form = form or form_of(path)
    with replacing_folder(path) as folder:
        for name, tensors in shards_of(manifest.tensors_of(weights), form.shard_bytes).items():
            _save(folder / name, tensors)
        _save(folder / CONFORMANCE, _fields(conformance))
        if statistics is not None:
            _save(folder / STATISTICS, _fields(statistics))
        if form.compressed:
            with catalogue.open("rb") as source, lzma.open(folder / COMPRESSED_CATALOGUE, "wb") as target:
                shutil.copyfileobj(source, target)
        else:
            shutil.copyfile(catalogue, folder / CATALOGUE)
        hashed = msgspec.structs.replace(
            content, files=_sha256s(folder, sorted(file.name for file in folder.iterdir()))
        )
        for name in hashed.files:
            # safetensors creates files that only their owner may read.
            shutil.copymode(catalogue, folder / name)
        (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(hashed), indent=2) + b"\n")
        verified = load(folder)
    return replace(verified, path=path)


def form_of(path: Path) -> Form:
    """Return the form of the files of a bundle, or of a new one if there is none."""
    if not (path / MANIFEST).is_file():
        return Form()
    content, _ = read_manifest(path)
    sizes = [(path / name).stat().st_size for name in content.files if SHARD.fullmatch(name)]
    return Form(max(sizes, default=None), COMPRESSED_CATALOGUE in content.files)


def catalogue_file(content: Manifest) -> str:
    """Return the name of the catalogue's file."""
    return COMPRESSED_CATALOGUE if COMPRESSED_CATALOGUE in content.files else CATALOGUE


def shards_of(tensors: Mapping[str, Tensor], shard_bytes: int | None) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each file of weights, by its name."""
    shards: list[dict[str, Tensor]] = [{}]
    for key, tensor in tensors.items():
        size = sum(t.nbytes for t in (*shards[-1].values(), tensor))
        if shard_bytes and shards[-1] and size > shard_bytes:
            shards.append({})
        shards[-1][key] = tensor
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"sae-{n:05}-of-{len(shards):05}.safetensors": shard for n, shard in enumerate(shards, 1)}


def weight_files(content: Manifest) -> list[str]:
    """Return the names of the files of weights. BundleError: a shard is missing."""
    shards = sorted(name for name in content.files if SHARD.fullmatch(name))
    if not shards:
        return [WEIGHTS]
    expected = [f"sae-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    require(shards == expected, "files", f"shards {', '.join(shards)}, not {', '.join(expected)}")
    return shards


def check_replaceable(path: Path) -> None:
    """Raise BundleError if `path` exists and is no bundle, so that writing would destroy it."""
    free = not path.exists() or (path / MANIFEST).is_file() or (path.is_dir() and not any(path.iterdir()))
    require(free, str(path), "is there and is no bundle, so it is left as it is")


def conformance_of(
    weights: SAE, inputs: Tensor, expected: int = EXPECTED_TOKENS, targets: Tensor | None = None
) -> Conformance:
    """Return conformance vectors from residuals [n, d], with activations of the first `expected`."""
    return Conformance(inputs, fidelity.encode_in_chunks(weights, inputs[:expected]), targets)


def check_files(path: Path, content: Manifest) -> None:
    """Raise BundleError unless the folder has the manifest's files with the manifest's hashes."""
    needed = {CONFORMANCE, catalogue_file(content), *weight_files(content)}
    known = needed | {STATISTICS}
    require(needed <= content.files.keys() <= known, "files", f"{sorted(content.files)} instead of {sorted(known)}")
    for name in content.files:
        require((path / name).is_file(), name, f"not a file in {path}")
    for name, digest in _sha256s(path, content.files).items():
        differs = "the content does not have the SHA-256 of the manifest"
        require(digest == content.files[name], f"files.{name}", differs)


def check_dtype(content: Manifest, weights: SAE) -> None:
    """Raise BundleError unless the matrices have the manifest's dtype."""
    for name in ("encoder", "decoder", "skip"):
        matrix = getattr(weights, name)
        wanted = matrix is None or matrix.dtype == DTYPES[content.dtype]
        require(wanted, "dtype", f"{content.dtype}, {name} is {matrix.dtype if matrix is not None else None}")


def check_values(bundle: Bundle) -> None:
    """Raise BundleError unless all values are finite and no threshold is negative."""
    stored = {WEIGHTS: manifest.tensors_of(bundle.sae), CONFORMANCE: _fields(bundle.conformance)}
    for file, tensors in {**stored, STATISTICS: _fields(bundle.statistics)}.items():
        for name, tensor in tensors.items():
            require(all_finite(tensor), f"{file} {name}", "has values that are not finite")
    require(bool((bundle.sae.threshold >= 0).all()), f"{WEIGHTS} threshold", "has negative values")


def check_conformance(bundle: Bundle) -> None:
    """Raise BundleError unless the SAE reproduces the expected activations and has the claimed L0 and FVU."""
    inputs, expected = bundle.conformance.inputs, bundle.conformance.activations
    field, count = f"{CONFORMANCE} activations", len(expected)
    require(0 < count <= len(inputs), field, f"{count} tokens for {len(inputs)} inputs")
    claims, measured, differences = bundle.manifest.training, fidelity.Fidelity(), []
    claimless = claims.l0 is None and claims.fvu is None
    used = inputs[:count] if claimless else inputs
    # One pass for activations and figures: converting a half-precision dictionary costs more than all else here.
    for part, target in fidelity.chunks(bundle.sae, used, bundle.conformance.targets):
        latents = bundle.sae.encode(part)
        wanted = expected[measured.tokens : measured.tokens + len(part)]
        differences.append((latents[: len(wanted)] - wanted).abs())
        measured.update(bundle.sae, latents, part, target)
    difference = float(torch.cat(differences).max())
    require(difference < ACTIVATION_TOLERANCE * float(expected.abs().max()), field, f"differ by {difference}")
    for name, value, claimed in (("l0", measured.l0, claims.l0), ("fvu", measured.fvu, claims.fvu)):
        problem = f"{claimed} claimed, {value:.4g} measured on the conformance inputs"
        require(confirms(value, claimed), f"training.{name}", problem)


def confirms(measured: float, claimed: float | None) -> bool:
    """Return whether a measured figure is within CLAIM_TOLERANCE of the claimed one; None claims nothing."""
    return claimed is None or abs(measured - claimed) <= CLAIM_TOLERANCE * claimed


def check_catalogue(bundle: Bundle) -> None:
    """Raise BundleError unless the catalogue has an entry for every latent and its tables can be read."""
    catalogue, latents = bundle.catalogue, bundle.manifest.latents
    try:
        count = len(catalogue)
        require(count == latents, CATALOGUE, f"{count} latents, the manifest says {latents}")
        catalogue.get(latents - 1)
        catalogue.search(bundle.manifest.name, 1)
    except (sqlite3.DatabaseError, LookupError) as error:
        raise BundleError(f"{CATALOGUE}: {error}") from error


def _opened_catalogue(path: Path) -> Catalogue:
    require(path.is_file(), path.name, f"not a file in {path.parent}")
    try:
        if path.name == CATALOGUE:
            return Catalogue(path)
        # The file is removed at once: the connection keeps it open, and nothing is left behind by a process that ends.
        with tempfile.TemporaryDirectory() as scratch:
            unpacked = Path(scratch) / CATALOGUE
            _unpack(path, unpacked)
            catalogue = Catalogue(unpacked)
            len(catalogue)
            return catalogue
    except (sqlite3.DatabaseError, lzma.LZMAError, EOFError) as error:
        raise BundleError(f"{path.name}: {error}") from error


def _unpack(path: Path, target: Path) -> None:
    with lzma.open(path) as source, target.open("wb") as file:
        while block := source.read(1 << 20):
            file.write(block)
            require(file.tell() <= CATALOGUE_LIMIT, path.name, f"more than {CATALOGUE_LIMIT} bytes")


def _sha256s(path: Path, names: Mapping[str, str] | list[str]) -> dict[str, str]:
    """Return the SHA-256 of each file. Hashing releases the GIL, so threads run in parallel."""
    files = [path / name for name in names]
    with ThreadPoolExecutor() as pool, byte_progress(files, f"hashing {path.name}") as bar:
        return dict(zip(names, pool.map(lambda file: sha256_of([file], bar), files), strict=True))


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    distinct: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # Encoder and decoder of a tied SAE share storage, which save_file refuses.
        shared = any(tensor.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in distinct.values())
        distinct[name] = tensor.contiguous().clone() if shared else tensor.contiguous()
    save_file(distinct, path)


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


def _tensors(path: Path, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read the tensors of files, all but the matrices as float32; -1 in a shape matches any length."""
    tensors: dict[str, Tensor] = {}
    for name in names:
        require((path / name).is_file(), name, f"not a file in {path}")
        try:
            tensors |= read_safetensors(path / name)
        except FormatError as error:
            raise BundleError(str(error)) from error
    name = names[0]
    require(tensors.keys() == shapes.keys(), name, f"holds {sorted(tensors)} instead of {sorted(shapes)}")
    for key, tensor in tensors.items():
        require(
            has_shape(tensor, shapes[key]), f"{name} {key}", f"shape {tuple(tensor.shape)} instead of {shapes[key]}"
        )
        require(tensor.is_floating_point(), f"{name} {key}", f"dtype {tensor.dtype}")
    return {key: tensors[key] if key in MATRICES else tensors[key].float() for key in shapes}
