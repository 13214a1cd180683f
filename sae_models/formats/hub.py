"""Where a checkpoint is: a local path, a place in a Hugging Face repository, or a SAELens release and id.

path/to/folder-or-file
organisation/repository[@revision][:subfolder-or-file]
release/id                                              as SAELens' table has it, where `sae_lens` is installed
"""

import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import huggingface_hub
import yaml
from huggingface_hub import errors

from rudder.sae_models.formats.source import FormatError

WEIGHTS = (".safetensors", ".npz", ".pt", ".pth", ".gguf")
SETTINGS = (".json", ".yaml", ".yml")
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
TABLE = "pretrained_saes.yaml"
# SAELens' word for cross-layer transcoders: the path of one is the number of its layer.
LAYERS = "mntss_clt_layer_transcoder"
# A checkpoint has fewer files of weights, in shards or not; a folder with more has many checkpoints.
MANY = 8
# Seconds in which the hub must answer; then the cache must do.
PATIENCE = 10.0
# huggingface_hub lets through the errors of the HTTP library that it is built on, which differs between its versions.
UNREACHABLE: tuple[type[Exception], ...] = (getattr(errors, "HTTPError", OSError), OSError)


class NotFound(FormatError):
    """A name for which there is no checkpoint, or none that can be had now."""


@dataclass(frozen=True)
class Place:
    """A folder or file in a repository, "" for its root; `revision` None is the newest."""

    repository: str
    revision: str | None = None
    within: str = ""


@dataclass(frozen=True)
class Release:
    """What SAELens' table says of a release and id: the place, and the dataset scale of
    `normalize_activations: expected_average_only_in`, which is nowhere else.
    """

    place: Place
    scaling: float | None


def resolve(name: str, cache: Path | None = None, offline: bool = False) -> Path:
    """The local path of a checkpoint, downloaded into Hugging Face's cache if need be, with progress.

    NotFound: no such path, release, repository, revision or subfolder; a gated repository without access; nothing in
    the cache when offline.
    """
    if Path(name).exists():
        return Path(name)
    known = release(name)
    place = known.place if known else parse(name)
    if offline:
        return cached(place, cache, "offline")
    try:
        return download(place, cache)
    except errors.GatedRepoError as error:
        raise NotFound(f"{name}: access to {place.repository} must be asked for and a token given") from error
    except errors.RevisionNotFoundError as error:
        raise NotFound(f"{name}: {place.repository} has no revision {place.revision}") from error
    except errors.RepositoryNotFoundError as error:
        raise NotFound(f"{name}: {missing(place)}") from error
    except UNREACHABLE as error:
        return cached(place, cache, str(error))


def missing(place: Place) -> str:
    """Why a repository may not be there."""
    hint = "" if saelens_table() else "; for a SAELens release and id, install sae-lens, whose table names them"
    return f"no path and no repository {place.repository} that can be seen{hint}"


def parse(name: str) -> Place:
    """A name's parts. NotFound: not of the form `organisation/repository[@revision][:subfolder]`."""
    repository, _, within = name.partition(":")
    repository, _, revision = repository.partition("@")
    parts = PurePosixPath(within).parts
    if not REPOSITORY.fullmatch(repository) or ".." in parts or within.startswith("/"):
        form = "organisation/repository[@revision][:subfolder]"
        raise NotFound(f"{name}: neither a path nor {form}; {missing(Place(name))}")
    return Place(repository, revision or None, "/".join(parts))


def saelens_table() -> Path | None:
    """SAELens' table of releases, where the package is installed; the package itself is not imported."""
    package = importlib.util.find_spec("sae_lens")
    folders = package.submodule_search_locations if package else None
    tables = [Path(folder) / TABLE for folder in folders or ()]
    return next((table for table in tables if table.is_file()), None)


def release(name: str) -> Release | None:
    """What SAELens' table says of `release/id`, None where it has no such release. NotFound: it has no such id."""
    table, (head, _, identity) = saelens_table(), name.partition("/")
    if table is None or not identity:
        return None
    entry = yaml.load(table.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)).get(head)
    if entry is None:
        return None
    found = [sae for sae in entry["saes"] if sae["id"] == identity]
    if not found:
        some = ", ".join(str(sae["id"]) for sae in entry["saes"][:3])
        raise NotFound(f"{name}: release {head} has no {identity}; it has {len(entry['saes'])}, such as {some}")
    scaling, within = found[0].get("norm_scaling_factor"), str(found[0]["path"])
    if entry.get("conversion_func") == LAYERS:
        within = f"W_enc_{within}.safetensors"
    return Release(Place(entry["repo_id"], within=within), None if scaling is None else float(scaling))


def download(place: Place, cache: Path | None) -> Path:
    """The place's files, those alone, from the hub or its cache."""
    said = huggingface_hub.HfApi().model_info(place.repository, revision=place.revision, timeout=PATIENCE)
    names = wanted([file.rfilename for file in said.siblings or ()], place)
    repository, revision = place.repository, place.revision
    paths = [huggingface_hub.hf_hub_download(repository, name, revision=revision, cache_dir=cache) for name in names]
    return snapshot(Path(paths[0]), names[0]) / place.within


def snapshot(path: Path, name: str) -> Path:
    """The folder in which the file `name` of a repository has this path."""
    return path.parents[len(PurePosixPath(name).parts) - 1]


def cached(place: Place, cache: Path | None, why: str) -> Path:
    """The place in the cache, where the hub cannot be asked. NotFound: it is not there."""
    try:
        folder = huggingface_hub.snapshot_download(
            place.repository, revision=place.revision, cache_dir=cache, local_files_only=True
        )
    except (errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError, OSError) as error:
        raise NotFound(f"{place.repository}: not in the cache, and cannot be reached: {why}") from error
    root = Path(folder)
    files = [file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()]
    wanted(files, place)
    return root / place.within


def wanted(files: Iterable[str], place: Place) -> list[str]:
    """The files of a place among a repository's: weights and settings in the folder itself and its `checkpoints`, or
    the one file, its decoders where they are apart, and the settings beside it. NotFound: no weights there, or those of
    many checkpoints.
    """
    paths = [PurePosixPath(name) for name in sorted(files) if ".." not in name.split("/")]
    within = PurePosixPath(place.within)
    if within in paths:
        beside = (within.parent, within.parent.parent if within.parent.name == "checkpoints" else within.parent)
        decoders = within.with_name(within.name.replace("W_enc_", "W_dec_"))
        apart = [path for path in paths if path == decoders != within]
        settings = [path for path in paths if path.parent in beside and path.suffix in SETTINGS]
        return [str(path) for path in (within, *apart, *settings)]
    folders = (within, within / "checkpoints")
    weights = [str(path) for path in paths if path.parent in folders and path.suffix in WEIGHTS]
    where = f"weights in {place.within or 'its root'}"
    if not weights:
        some = sorted({str(path.parent) for path in paths if path.suffix in WEIGHTS})[:5]
        raise NotFound(f"{place.repository}: no {where}; there are some in {some}")
    if len(weights) > MANY:
        raise NotFound(f"{place.repository}: {len(weights)} {where}, name one of them: {weights[:3]}")
    return weights + [str(path) for path in paths if path.parent == within and path.suffix in SETTINGS]
