"""Values in the settings of a foreign checkpoint."""

from collections.abc import Mapping
from typing import Any

from rudder.sae_models.formats.source import FormatError

LONGEST = 300


def count(settings: Mapping[str, Any], key: str, file: str, most: int | None = None) -> int:
    """A whole number from 1 to `most`."""
    found = settings.get(key)
    if not isinstance(found, int) or isinstance(found, bool) or not 1 <= found <= (most or found):
        raise FormatError(f"{file} {key}: {found!r}, not a whole number from 1" + (f" to {most}" if most else ""))
    return found


def flag(settings: Mapping[str, Any], key: str, file: str, default: bool) -> bool:
    """True or false; `default` where it is missing."""
    found = settings.get(key, default)
    if not isinstance(found, bool):
        raise FormatError(f"{file} {key}: {found!r}, neither true nor false")
    return found


def choice(settings: Mapping[str, Any], key: str, file: str, among: tuple[str, ...]) -> str:
    """One of some words, the first where it is missing."""
    found = settings.get(key, among[0])
    if found not in among:
        raise FormatError(f"{file} {key}: {found!r}, not one of {', '.join(among)}")
    return str(found)


def section(settings: Mapping[str, Any], key: str, file: str) -> dict[str, Any]:
    """An object within the settings, empty where it is missing or null."""
    found = settings.get(key)
    if found is not None and not isinstance(found, dict):
        raise FormatError(f"{file} {key}: is not an object")
    return found or {}


def word(settings: Mapping[str, Any], key: str) -> str:
    """A name, empty where it is missing, of another type, or too long to be one."""
    found = settings.get(key)
    return found if isinstance(found, str) and len(found) <= LONGEST else ""
