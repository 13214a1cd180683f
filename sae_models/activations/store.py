"""Activations on disk: a folder of shards and a manifest that says what they are.

store.json                the manifest: model, corpus, sites, the split, and each shard's size, error and SHA-256
00000.safetensors         `layers.L.POINT` [n, d], bfloat16, or int8 with `layers.L.POINT.scale` [n], float32

The manifest names a shard only once the shard is on the disk, so a harvest that was killed goes on behind the last one.
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

from rudder.sae_models.activations.stream import Source, Vectors
from rudder.sae_models.errors import UserError
from rudder.sae_models.files import PARTIAL, locked, write_whole

FORMAT_VERSION = 2
MANIFEST = "store.json"
SCALE = ".scale"
SHARD_TOKENS = 131_072

Precision = Literal["bfloat16", "int8"]


class StoreError(UserError):
    """A store that cannot be read or written; the message names the file or field."""


class Content(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a store holds: two stores with the same content have the same vectors in the same order."""

    model: str
    model_sha256: str
    corpus_sha256: str
    sites: tuple[str, ...]
    window: int
    seed: int
    tokens: int
    precision: Precision


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file. `chunks`: vectors of each chunk of the harvest in it, so that they are read in the order in which they
    would be on the fly. `error` is what the precision costs, as FVU at each site.
    """

    file: str
    chunks: tuple[int, ...]
    tokens: int
    size: int
    sha256: str
    error: dict[str, float]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of store.json. `complete` is false until the last shard is written."""

    format_version: int
    content: Content
    complete: bool
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Store:
    """An open store, a `stream.Source`. Shards are mapped, and each is checked when it is first read."""

    path: Path
    manifest: Manifest
    checked: set[str] = field(default_factory=set)

    @property
    def tokens(self) -> int:
        """Vectors at each site."""
        return sum(shard.tokens for shard in self.manifest.shards)

    @property
    def error(self) -> dict[str, float]:
        """FVU of what is stored against what was harvested, by site."""
        sites = self.manifest.content.sites
        return {site: sum(s.tokens * s.error[site] for s in self.manifest.shards) / self.tokens for site in sites}

    @cached_property
    def sizes(self) -> list[int]:
        """Vectors in each chunk."""
        return [last - first for _, first, last in self._chunks]

    @cached_property
    def _chunks(self) -> list[tuple[int, int, int]]:
        return [
            (number, last - size, last)
            for number, shard in enumerate(self.manifest.shards)
            for size, last in zip(shard.chunks, accumulate(shard.chunks), strict=True)
        ]

    def load(self, chunks: Sequence[int]) -> Vectors:
        """The vectors of some chunks at every site, bfloat16. StoreError: a shard has changed."""
        places = self._chunks
        parts = [self._read(*places[chunk]) for chunk in chunks]
        return {site: torch.cat([part[site] for part in parts]) for site in self.manifest.content.sites}

    def _read(self, number: int, first: int, last: int) -> dict[str, Tensor]:
        shard = self.manifest.shards[number]
        path = self.path / shard.file
        if shard.file not in self.checked:
            check(path, shard)
            self.checked.add(shard.file)
        with safe_open(path, "pt") as file:
            return {
                site: restored(
                    file.get_slice(site)[first:last],
                    file.get_slice(site + SCALE)[first:last] if site + SCALE in file.keys() else None,  # noqa: SIM118
                )
                for site in self.manifest.content.sites
            }


def check(path: Path, shard: Shard) -> None:
    """StoreError unless a shard is what was written."""
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            raise StoreError(f"store: {path}: the content does not have the SHA-256 of {MANIFEST}")


def load(folder: Path) -> Store:
    """Opens a whole store. StoreError: it is not one, is not complete, or a shard is missing or cut short."""
    manifest = read_manifest(folder)
    if not manifest.complete:
        raise StoreError(f"store: {folder} is not complete: run the harvest again, it goes on where it was")
    return Store(folder, manifest)


def read_manifest(folder: Path) -> Manifest:
    """The manifest, its shards there and of the right size. StoreError."""
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
            found = "is missing" if size is None else f"has {size} bytes instead of {shard.size}: it is cut short"
            raise StoreError(f"store: {path} {found}")
    return manifest


def write(folder: Path, content: Content, source: Source, shard_tokens: int = SHARD_TOKENS) -> Store:
    """Harvests a source into a folder until it holds `content.tokens` vectors, or goes on where it was killed.

    StoreError: the folder holds another content, the source is too small, or the disk is full.
    """
    try:
        with locked(folder):
            manifest = _begun(folder, content)
            for shard, tensors in _shards(source, manifest, shard_tokens):
                manifest = _with_shard(folder, manifest, shard, tensors)
            return Store(folder, _closed(folder, manifest))
    except OSError as error:
        raise StoreError(f"store: {folder}: {error.strerror or error}; the shards before it are whole") from error


def _begun(folder: Path, content: Content) -> Manifest:
    for partial in folder.glob(f"*{PARTIAL}"):
        partial.unlink()
    if not (folder / MANIFEST).exists():
        return Manifest(FORMAT_VERSION, content, False, ())
    manifest = read_manifest(folder)
    for name in Content.__struct_fields__:
        have, want = getattr(manifest.content, name), getattr(content, name)
        if have != want:
            raise StoreError(f"store: {folder} has {name} {have}, this run needs {want}")
    return manifest


def _shards(source: Source, manifest: Manifest, shard_tokens: int) -> Iterator[tuple[Shard, dict[str, Tensor]]]:
    """What is still to be written. A shard ends with the chunk that fills it, and the last with the last vector."""
    content, done = manifest.content, sum(shard.tokens for shard in manifest.shards)
    held: list[Vectors] = []
    number, tokens = len(manifest.shards), 0
    first = sum(len(shard.chunks) for shard in manifest.shards)
    with tqdm(total=content.tokens, initial=done, desc="harvest", unit="tok", unit_scale=True) as progress:
        for chunk in range(first, len(source.sizes)):
            if done + tokens >= content.tokens:
                break
            held.append(source.load([chunk]))
            tokens += source.sizes[chunk]
            progress.update(min(source.sizes[chunk], content.tokens - progress.n))
            if tokens >= shard_tokens or done + tokens >= content.tokens:
                most = content.tokens - done
                yield _packed(f"{number:05}.safetensors", held, most, content)
                number, done, tokens, held = number + 1, done + min(tokens, most), 0, []


def _packed(name: str, held: Sequence[Vectors], most: int, content: Content) -> tuple[Shard, dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    error = {}
    for site in content.sites:
        x = torch.cat([part[site] for part in held])[:most].float().cpu()
        tensors |= quantised(site, x, content.precision)
        error[site] = lost(x, restored(tensors[site], tensors.get(site + SCALE)))
    ends = [0, *accumulate(len(part[content.sites[0]]) for part in held)]
    chunks = tuple(min(last, most) - first for first, last in pairwise(ends))
    return Shard(name, chunks, len(x), 0, "", error), tensors


def _with_shard(folder: Path, manifest: Manifest, shard: Shard, tensors: dict[str, Tensor]) -> Manifest:
    encoded = save(tensors)
    write_whole(folder / shard.file, encoded)
    shard = msgspec.structs.replace(shard, size=len(encoded), sha256=hashlib.sha256(encoded).hexdigest())
    manifest = msgspec.structs.replace(manifest, shards=(*manifest.shards, shard))
    _write_manifest(folder, manifest)
    return manifest


def _closed(folder: Path, manifest: Manifest) -> Manifest:
    held = sum(shard.tokens for shard in manifest.shards)
    if held < manifest.content.tokens:
        raise StoreError(f"store: {folder}: the corpus gave {held} tokens, {manifest.content.tokens} were asked for")
    if not manifest.complete:
        manifest = msgspec.structs.replace(manifest, complete=True)
        _write_manifest(folder, manifest)
    return manifest


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    write_whole(folder / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")


def quantised(site: str, x: Tensor, precision: Precision) -> dict[str, Tensor]:
    """x [n, d] as it is stored; int8 has one scale for each token."""
    if precision == "bfloat16":
        return {site: x.bfloat16()}
    scale = x.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return {site: (x / scale[:, None]).round().to(torch.int8), site + SCALE: scale}


def restored(stored: Tensor, scale: Tensor | None) -> Tensor:
    """What is stored as bfloat16 [n, d]."""
    return stored if scale is None else (stored.float() * scale[:, None]).bfloat16()


def lost(x: Tensor, y: Tensor) -> float:
    """FVU of y against x [n, d]; 0 where x does not vary."""
    error, variance = (x - y.float()).square().sum(), (x - x.mean(0)).square().sum()
    return float(error / variance.clamp_min(torch.finfo(torch.float32).tiny))
