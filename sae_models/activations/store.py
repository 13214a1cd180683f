"""Activations on disk: a folder of shards and a manifest that describes them.

store.json                manifest: model, corpus, sites, window, and each shard's size, error and SHA-256
00000.safetensors         `layers.L.POINT` [n, d], bfloat16, or int8 with `layers.L.POINT.scale` [n], float32

The manifest lists a shard only once the shard is on disk, so an interrupted harvest resumes after the last complete
one. A store that holds more vectors than a run needs serves it too, even while the rest is being written, and one that
holds fewer is extended.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal

import msgspec
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from rudder.sae_models.activations.stream import Vectors, VectorSource
from rudder.sae_models.errors import UserError
from rudder.sae_models.files import PARTIAL, lock_folder, write_atomically

FORMAT_VERSION = 2
MANIFEST = "store.json"
SCALE = ".scale"
SHARD_TOKENS = 32_768

Precision = Literal["bfloat16", "int8"]
Part = Literal["training", "held out"]


class StoreError(UserError):
    """A store cannot be read or written. The message names the file or field."""


class Content(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Identity of a store: two stores with equal content hold the same vectors in the same order.

    `tokens`: when it is complete. `part`: of the documents.
    """

    model: str
    model_sha256: str
    corpus_sha256: str
    sites: tuple[str, ...]
    window: int
    seed: int
    tokens: int
    precision: Precision
    prepend_bos: bool | None = None
    excluded_positions: tuple[int, ...] = ()
    exclude_special_tokens: bool = False
    chats_sha256: str = ""
    chat_share: float = 0.0
    part: Part = "training"


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a store. `chunks`: number of vectors in each chunk of the source, so that a stored stream has the
    same order as a live one. `error`: quantisation error at each site, as FVU.
    """

    file: str
    chunks: tuple[int, ...]
    tokens: int
    size: int
    sha256: str
    error: dict[str, float]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Content of store.json. `complete` is False until the last shard is written."""

    format_version: int
    content: Content
    complete: bool
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Store:
    """An open store, a `stream.VectorSource`. Shards are memory-mapped, and each is verified when it is first read."""

    path: Path
    manifest: Manifest
    verified: set[str] = field(default_factory=set)

    @property
    def tokens(self) -> int:
        """Number of vectors at each site."""
        return sum(shard.tokens for shard in self.manifest.shards)

    @property
    def error(self) -> dict[str, float]:
        """Quantisation error of the stored vectors by site, as FVU."""
        sites = self.manifest.content.sites
        return {site: sum(s.tokens * s.error[site] for s in self.manifest.shards) / self.tokens for site in sites}

    @cached_property
    def chunk_sizes(self) -> list[int]:
        """Number of vectors in each chunk."""
        return [last - first for _, first, last in self._locations]

    @cached_property
    def _locations(self) -> list[tuple[int, int, int]]:
        """(shard number, first vector, last vector + 1) of each chunk."""
        return [
            (number, last - size, last)
            for number, shard in enumerate(self.manifest.shards)
            for size, last in zip(shard.chunks, accumulate(shard.chunks), strict=True)
        ]

    def load(self, chunks: Sequence[int]) -> Vectors:
        """Return the vectors of some chunks at every site, bfloat16. Raise StoreError if a shard has changed since it
        was written.
        """
        locations = self._locations
        parts = [self._read(*locations[chunk]) for chunk in chunks]
        return {site: torch.cat([part[site] for part in parts]) for site in self.manifest.content.sites}

    def _read(self, number: int, first: int, last: int) -> dict[str, Tensor]:
        shard = self.manifest.shards[number]
        path = self.path / shard.file
        if shard.file not in self.verified:
            verify(path, shard)
            self.verified.add(shard.file)
        with safe_open(path, "pt") as file:
            return {
                site: dequantise(
                    file.get_slice(site)[first:last],
                    file.get_slice(site + SCALE)[first:last] if site + SCALE in file.keys() else None,  # noqa: SIM118
                )
                for site in self.manifest.content.sites
            }


def verify(path: Path, shard: Shard) -> None:
    """Raise StoreError unless the SHA-256 of a shard is that of the manifest."""
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            raise StoreError(f"store: {path}: the content does not have the SHA-256 of {MANIFEST}")


def load(folder: Path) -> Store:
    """Open a complete store. Raise StoreError if it is damaged or incomplete, or a shard is missing or truncated."""
    manifest = read_manifest(folder)
    if not manifest.complete:
        raise StoreError(f"store: {folder} is not complete: run the harvest again to resume it")
    return Store(folder, manifest)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest and check that every shard exists and has its size. Raise StoreError otherwise."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"store: {folder / MANIFEST}: {error}") from error
    if manifest.format_version != FORMAT_VERSION:
        raise StoreError(f"store: format_version {manifest.format_version}, this program reads {FORMAT_VERSION}")
    for shard in manifest.shards:
        path = folder / shard.file
        size = path.stat().st_size if path.is_file() else None
        if size != shard.size:
            problem = "is missing" if size is None else f"has {size} bytes instead of {shard.size}: it is cut short"
            raise StoreError(f"store: {path} {problem}")
    return manifest


def load_part(folder: Path, content: Content) -> Store | None:
    """Open the first shards of a store that hold `content.tokens` vectors; None if there are fewer or it is not there.

    Raise StoreError if the folder holds other content.
    """
    if not (folder / MANIFEST).exists():
        return None
    manifest = read_manifest(folder)
    require_content(folder, manifest, content)
    ends = list(accumulate(shard.tokens for shard in manifest.shards))
    count = sum(end < content.tokens for end in ends) + 1
    if count > len(ends):
        return None
    return Store(folder, msgspec.structs.replace(manifest, shards=manifest.shards[:count]))


def require_content(folder: Path, manifest: Manifest, content: Content) -> None:
    """Raise StoreError unless a store has this content, whatever the number of its vectors."""
    for name in Content.__struct_fields__:
        stored, requested = getattr(manifest.content, name), getattr(content, name)
        if name != "tokens" and stored != requested:
            raise StoreError(f"store: {folder} has {name} {stored}, this run needs {requested}")


def write(folder: Path, content: Content, source: VectorSource, shard_tokens: int = SHARD_TOKENS) -> Store:
    """Harvest a source into a folder until it holds `content.tokens` vectors; resume an interrupted harvest.

    Raise StoreError if the folder holds other content, the source is too small, or the disk is full.
    """
    stored = load_part(folder, content)
    if stored is not None:
        return stored
    try:
        with lock_folder(folder):
            manifest = _open_manifest(folder, content)
            for shard, tensors in _missing_shards(source, manifest, shard_tokens):
                manifest = _append_shard(folder, manifest, shard, tensors)
            return Store(folder, _mark_complete(folder, manifest))
    except OSError as error:
        raise StoreError(f"store: {folder}: {error.strerror or error}; the shards before it are complete") from error


def _open_manifest(folder: Path, content: Content) -> Manifest:
    for partial in folder.glob(f"*{PARTIAL}"):
        partial.unlink()
    if not (folder / MANIFEST).exists():
        return Manifest(FORMAT_VERSION, content, False, ())
    manifest = read_manifest(folder)
    require_content(folder, manifest, content)
    # The last shard of a complete store may end within a chunk.
    shards = manifest.shards[:-1] if manifest.complete else manifest.shards
    return Manifest(FORMAT_VERSION, content, False, shards)


def _missing_shards(
    source: VectorSource, manifest: Manifest, shard_tokens: int
) -> Iterator[tuple[Shard, dict[str, Tensor]]]:
    """Yield the shards that are still to be written. A shard ends with the chunk that fills it; the last ends with the
    last vector.
    """
    content, done = manifest.content, sum(shard.tokens for shard in manifest.shards)
    parts: list[Vectors] = []
    number, tokens = len(manifest.shards), 0
    first = sum(len(shard.chunks) for shard in manifest.shards)
    with tqdm(total=content.tokens, initial=done, desc="harvest", unit="tok", unit_scale=True) as progress:
        for chunk in range(first, len(source.chunk_sizes)):
            if done + tokens >= content.tokens:
                break
            parts.append(source.load([chunk]))
            tokens += source.chunk_sizes[chunk]
            progress.update(min(source.chunk_sizes[chunk], content.tokens - progress.n))
            if tokens >= shard_tokens or done + tokens >= content.tokens:
                limit = content.tokens - done
                yield _pack(f"{number:05}.safetensors", parts, limit, content)
                number, done, tokens, parts = number + 1, done + min(tokens, limit), 0, []


def _pack(name: str, parts: Sequence[Vectors], limit: int, content: Content) -> tuple[Shard, dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    error = {}
    for site in content.sites:
        x = torch.cat([part[site] for part in parts])[:limit].float().cpu()
        tensors |= quantise(site, x, content.precision)
        error[site] = quantisation_error(x, dequantise(tensors[site], tensors.get(site + SCALE)))
    ends = [0, *accumulate(len(part[content.sites[0]]) for part in parts)]
    chunks = tuple(min(last, limit) - first for first, last in pairwise(ends))
    return Shard(name, chunks, len(x), 0, "", error), tensors


def _append_shard(folder: Path, manifest: Manifest, shard: Shard, tensors: dict[str, Tensor]) -> Manifest:
    encoded = save(tensors)
    write_atomically(folder / shard.file, encoded)
    shard = msgspec.structs.replace(shard, size=len(encoded), sha256=hashlib.sha256(encoded).hexdigest())
    manifest = msgspec.structs.replace(manifest, shards=(*manifest.shards, shard))
    _write_manifest(folder, manifest)
    return manifest


def _mark_complete(folder: Path, manifest: Manifest) -> Manifest:
    written = sum(shard.tokens for shard in manifest.shards)
    if written < manifest.content.tokens:
        raise StoreError(f"store: {folder}: the corpus gave {written} tokens, {manifest.content.tokens} were requested")
    if not manifest.complete:
        manifest = msgspec.structs.replace(manifest, complete=True)
        _write_manifest(folder, manifest)
    return manifest


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    write_atomically(folder / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")


def quantise(site: str, x: Tensor, precision: Precision) -> dict[str, Tensor]:
    """Return the stored tensors of x [n, d]: bfloat16, or int8 with one scale per token."""
    if precision == "bfloat16":
        return {site: x.bfloat16()}
    scale = x.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return {site: (x / scale[:, None]).round().to(torch.int8), site + SCALE: scale}


def dequantise(stored: Tensor, scale: Tensor | None) -> Tensor:
    """Return stored vectors as bfloat16 [n, d]."""
    return stored if scale is None else (stored.float() * scale[:, None]).bfloat16()


def quantisation_error(x: Tensor, y: Tensor) -> float:
    """FVU of y against x [n, d]; 0 if both are constant."""
    error, variance = (x - y.float()).square().sum(), (x - x.mean(0)).square().sum()
    return float(error / variance.clamp_min(torch.finfo(torch.float32).tiny))
