"""Optional dependencies, imported where they are needed."""

import importlib
from typing import Any

from rudder.sae_models.errors import UserError


class MissingPackage(UserError):
    """An optional package is not installed. The message says what needs it and how to install it."""


def import_optional(module: str, purpose: str) -> Any:
    """Import a module of an optional package. Raise MissingPackage if it is not installed; `purpose` begins the
    message.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise MissingPackage(f"{purpose} needs the package {name}: pip install {name}") from error
