"""Locate a checkpoint: a local path, a folder or file in a Hugging Face repository, or a SAELens release and id.

path/to/folder-or-file
organisation/repository[@revision][:subfolder-or-file]
release/id                                              from SAELens' table, if the package `sae_lens` is installed
"""

import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
import yaml
from huggingface_hub import errors

from rudder.sae_models.formats.source import FormatError

WEIGHTS = (".safetensors", ".npz", ".pt", ".pth", ".gguf")
SETTINGS = (".json", ".yaml", ".yml")
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
TABLE = "pretrained_saes.yaml"
# SAELens' loader of cross-layer transcoders, whose `path` is the number of a layer.
CROSS_LAYER_LOADER = "mntss_clt_layer_transcoder"
# A folder with more files of weights than one sharded checkpoint has holds several checkpoints.
MAX_WEIGHT_FILES = 8
# Seconds to wait for the hub before falling back to the cache.
HUB_TIMEOUT_S = 10.0
# huggingface_hub passes on the errors of its HTTP library, which differs between versions.
UNREACHABLE: tuple[type[Exception], ...] = (getattr(errors, "HTTPError", OSError), OSError)


class NotFound(FormatError):
    """A name without a checkpoint, or with one that is not accessible now."""


@dataclass(frozen=True)
class Location:
    """A folder or file in a repository, "" for its root; `revision` None: the newest."""

    repository: str
    revision: str | None = None
    within: str = ""


@dataclass(frozen=True)
class Release:
    """A release and id of SAELens' table: the location, and what only the table holds: the input scale of
    `normalize_activations: expected_average_only_in`, and the settings that replace those of the checkpoint.
    """

    location: Location
    scaling: float | None
    overrides: Mapping[str, Any] = field(default_factory=dict)


def resolve(name: str, cache: Path | None = None, offline: bool = False) -> Path:
    """Return the local path of a checkpoint; download it into Hugging Face's cache if necessary.

    NotFound: no such path, release, repository, revision or subfolder; no access to a gated repository; not in the
    cache when offline.
    """
    if Path(name).exists():
        return Path(name)
    published = release(name)
    location = published.location if published else parse(name)
    if offline:
        return cached(location, cache, "offline")
    try:
        return download(location, cache)
    except errors.GatedRepoError as error:
        raise NotFound(f"{name}: access to {location.repository} must be requested and a token configured") from error
    except errors.RevisionNotFoundError as error:
        raise NotFound(f"{name}: {location.repository} has no revision {location.revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise NotFound(f"{name}: {missing(location)}") from error
    except UNREACHABLE as error:
        return cached(location, cache, str(error))


def missing(location: Location) -> str:
    """Return an explanation for a repository that does not exist."""
    hint = "" if saelens_table() else "; for a SAELens release and id, install sae-lens, whose table names them"
    return f"no path and no repository {location.repository} that can be seen{hint}"


def parse(name: str) -> Location:
    """Parse a name. NotFound: not of the form `organisation/repository[@revision][:subfolder]`."""
    repository, _, within = name.partition(":")
    repository, _, revision = repository.partition("@")
    parts = PurePosixPath(within).parts
    if not REPOSITORY.fullmatch(repository) or ".." in parts or within.startswith("/"):
        form = "organisation/repository[@revision][:subfolder]"
        raise NotFound(f"{name}: neither a path nor {form}; {missing(Location(name))}")
    return Location(repository, revision or None, "/".join(parts))


def saelens_table() -> Path | None:
    """Return SAELens' table of releases if the package is installed, without importing it."""
    package = importlib.util.find_spec("sae_lens")
    folders = package.submodule_search_locations if package else None
    tables = [Path(folder) / TABLE for folder in folders or ()]
    return next((table for table in tables if table.is_file()), None)


def release(name: str) -> Release | None:
    """Look up `release/id` in SAELens' table; None if it has no such release. NotFound: the release has no such id."""
    table, (head, _, identity) = saelens_table(), name.partition("/")
    if table is None or not identity:
        return None
    entry = yaml.load(table.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)).get(head)
    if entry is None:
        return None
    matches = [sae for sae in entry["saes"] if sae["id"] == identity]
    if not matches:
        some = ", ".join(str(sae["id"]) for sae in entry["saes"][:3])
        raise NotFound(f"{name}: release {head} has no {identity}; it has {len(entry['saes'])}, such as {some}")
    scaling, within = matches[0].get("norm_scaling_factor"), str(matches[0]["path"])
    if entry.get("conversion_func") == CROSS_LAYER_LOADER:
        within = f"W_enc_{within}.safetensors"
    overrides = {**(entry.get("config_overrides") or {}), **(matches[0].get("config_overrides") or {})}
    if neuronpedia := matches[0].get("neuronpedia"):
        overrides["neuronpedia_id"] = str(neuronpedia)
    return Release(Location(entry["repo_id"], within=within), None if scaling is None else float(scaling), overrides)


def download(location: Location, cache: Path | None) -> Path:
    """Download the files of a location, or find them in the cache; return its path."""
    info = huggingface_hub.HfApi().model_info(location.repository, revision=location.revision, timeout=HUB_TIMEOUT_S)
    names = select_files([file.rfilename for file in info.siblings or ()], location)
    repository, revision = location.repository, location.revision
    paths = [huggingface_hub.hf_hub_download(repository, name, revision=revision, cache_dir=cache) for name in names]
    return snapshot(Path(paths[0]), names[0]) / location.within


def snapshot(path: Path, name: str) -> Path:
    """Return the root of a repository's snapshot in which the file `name` has this path."""
    return path.parents[len(PurePosixPath(name).parts) - 1]


def cached(location: Location, cache: Path | None, why: str) -> Path:
    """Return the path of a location in the cache, if the hub is not reachable. NotFound: it is not in the cache."""
    try:
        folder = huggingface_hub.snapshot_download(
            location.repository, revision=location.revision, cache_dir=cache, local_files_only=True
        )
    except (errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError, OSError) as error:
        raise NotFound(f"{location.repository}: not in the cache, and cannot be reached: {why}") from error
    root = Path(folder)
    files = [file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()]
    select_files(files, location)
    return root / location.within


def select_files(files: Iterable[str], location: Location) -> list[str]:
    """Select the files of a location from all files of its repository.

    For a folder: weights and settings in it and in its `checkpoints`. For a file: the file, its separate decoders if
    any, and the settings beside it. NotFound: no weights, or those of several checkpoints.
    """
    paths = [PurePosixPath(name) for name in sorted(files) if ".." not in name.split("/")]
    within = PurePosixPath(location.within)
    if within in paths:
        folders = (within.parent, within.parent.parent if within.parent.name == "checkpoints" else within.parent)
        decoders = within.with_name(within.name.replace("W_enc_", "W_dec_"))
        separate = [path for path in paths if path == decoders != within]
        settings = [path for path in paths if path.parent in folders and path.suffix in SETTINGS]
        return [str(path) for path in (within, *separate, *settings)]
    folders = (within, within / "checkpoints")
    weights = [str(path) for path in paths if path.parent in folders and path.suffix in WEIGHTS]
    where = f"weights in {location.within or 'its root'}"
    if not weights:
        some = sorted({str(path.parent) for path in paths if path.suffix in WEIGHTS})[:5]
        raise NotFound(f"{location.repository}: no {where}; there are some in {some}")
    if len(weights) > MAX_WEIGHT_FILES:
        raise NotFound(f"{location.repository}: {len(weights)} {where}, name one of them: {weights[:3]}")
    return weights + [str(path) for path in paths if path.parent == within and path.suffix in SETTINGS]
