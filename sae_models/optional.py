"""Packages that only some work needs."""

import importlib
from typing import Any

from rudder.sae_models.errors import UserError


class MissingPackage(UserError):
    """A package that is not installed; the message says what for and how to get it."""


def extra(module: str, purpose: str) -> Any:
    """The module. MissingPackage: its package is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise MissingPackage(f"{purpose} needs the package {name}: pip install {name}") from error
