"""The interface of a reader, and its result: an SAE in canonical form and what its source declares about it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rudder.sae_models.errors import UserError
from rudder.sae_models.sae import SAE


class FormatError(UserError):
    """A checkpoint that cannot be read as what it claims to be; the message begins with the file or field."""


@dataclass(frozen=True)
class Declaration:
    """Metadata of a checkpoint.

    `architecture`: in the format's own word. `sites` (read) and `output_site` (written): sites such as
    `layers.L.resid_post`, empty if not declared. `model`: as the source names it, or empty. `folded`: what was folded
    into the weights (`pre_bias`, `input_scale`, `decoder_norm`, `gate`). `l0`: as claimed. `notes`: everything else.
    """

    architecture: str
    sites: tuple[str, ...] = ()
    output_site: str = ""
    model: str = ""
    folded: tuple[str, ...] = ()
    l0: float | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """A reader. `recognise` returns the reason why a path holds this format, or None, from names and headers alone;
    `read` returns the SAE and its declaration, or raises FormatError.
    """

    name: str
    recognise: Callable[[Path], str | None]
    read: Callable[[Path], tuple[SAE, Declaration]]


@dataclass(frozen=True)
class Loaded:
    """A loaded checkpoint: its format and the reason for it, the SAE, and its declaration."""

    format: str
    why: str
    sae: SAE
    declared: Declaration
