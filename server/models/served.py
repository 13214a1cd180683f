"""The models that `rudder demo` and `rudder serve --model` serve, each with its SAE bundles and programs."""

import json
from collections.abc import Callable
from pathlib import Path

from rudder.sae_models import PRETRAINED
from rudder.sae_models.errors import UserError
from rudder.server.models import known
from rudder.server.models.package import DownloadError

AUTO, INSTRUCT, SMALL = "auto", "smollm2-135m-instruct", "small"
NAMES = (AUTO, INSTRUCT, SMALL)
HELP = f"{INSTRUCT}: downloaded once; {SMALL}: a toy that ships; {AUTO}: the first, the toy where it cannot be had"


def fields_of(name: str, say: Callable[[str], None]) -> dict[str, str]:
    """Return the fields of the configuration that serve a model, as text; download the model if necessary.

    With AUTO, `say` gets one line if it is the small model for want of the other. UserError: it cannot be had.
    """
    if name == SMALL:
        return small_fields()
    try:
        if name == AUTO:
            require_programs()
        return instruct_fields()
    except (DownloadError, BundleMissing) as error:
        if name != AUTO:
            raise
        say(f"serving the small model instead: {error}")
        return small_fields()


class BundleMissing(UserError):
    """The SAE bundles of a model are not installed, or the programs on them that the demo shows."""


def small_fields() -> dict[str, str]:
    """Return the fields for the shipped toy: those of the default configuration."""
    return {
        "engine.model": str(PRETRAINED / "textbook-lm"),
        "engine.bundles": str(PRETRAINED / "textbook-lm-layers.2"),
        "programs.folder": str(PRETRAINED / "programs"),
    }


def instruct_programs() -> Path:
    """Return the folder of SmolLM2's programs, which may be missing."""
    return PRETRAINED / "programs" / INSTRUCT


def require_programs() -> None:
    """Raise BundleMissing if SmolLM2 has no programs, which the demo shows."""
    if not instruct_programs().is_dir():
        raise BundleMissing(f"no programs of {INSTRUCT} are installed")


def instruct_fields() -> dict[str, str]:
    """Return the fields for SmolLM2, with its programs if there are any. Eager: it starts in a tenth of the time that
    compiling it takes.
    """
    bundles = instruct_bundles()
    return {
        "engine.model": str(known.get(INSTRUCT)),
        "engine.bundles": json.dumps([str(folder) for folder in bundles]),
        "engine.enforce_eager": "true",
        "programs.folder": str(programs) if (programs := instruct_programs()).is_dir() else "null",
    }


def instruct_bundles() -> list[Path]:
    """Return the shipped bundles of SmolLM2, from its first site to its last.

    BundleMissing: there are none.
    """
    folders = sorted(PRETRAINED.glob("smollm2-135m-layers.*"), key=lambda folder: int(folder.name.rpartition(".")[2]))
    if not folders:
        raise BundleMissing(f"no SAE bundle of {INSTRUCT} is installed")
    return folders
