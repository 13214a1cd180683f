"""Read values of known types from the settings of a checkpoint."""

from collections.abc import Mapping
from typing import Any

from rudder.sae_models.formats.source import FormatError

MAX_NAME_LENGTH = 300


def count(settings: Mapping[str, Any], key: str, file: str, maximum: int | None = None) -> int:
    """Return an integer from 1 to `maximum`. FormatError: another value."""
    value = settings.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= (maximum or value):
        limit = f" to {maximum}" if maximum else ""
        raise FormatError(f"{file} {key}: {value!r}, not a whole number from 1{limit}")
    return value


def flag(settings: Mapping[str, Any], key: str, file: str, default: bool) -> bool:
    """Return a boolean, `default` if it is missing. FormatError: another value."""
    value = settings.get(key, default)
    if not isinstance(value, bool):
        raise FormatError(f"{file} {key}: {value!r}, neither true nor false")
    return value


def choice(settings: Mapping[str, Any], key: str, file: str, among: tuple[str, ...]) -> str:
    """Return one of several words, the first if it is missing. FormatError: another value."""
    value = settings.get(key, among[0])
    if value not in among:
        raise FormatError(f"{file} {key}: {value!r}, not one of {', '.join(among)}")
    return str(value)


def section(settings: Mapping[str, Any], key: str, file: str) -> dict[str, Any]:
    """Return an object within the settings, empty if it is missing or null. FormatError: another value."""
    value = settings.get(key)
    if value is not None and not isinstance(value, dict):
        raise FormatError(f"{file} {key}: is not an object")
    return value or {}


def name_of(settings: Mapping[str, Any], key: str) -> str:
    """Return a string; empty if it is missing, of another type, or too long for a name."""
    value = settings.get(key)
    return value if isinstance(value, str) and len(value) <= MAX_NAME_LENGTH else ""
