"""What a reader gives: an SAE in canonical form, and what its source declares of it."""

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
    """What a source says beside its numbers.

    `architecture` in the format's own word; `sites` read and `output_site` written as canonical names
    (`layers.L.resid_post`), empty where the source does not tell; `model` as the source names it, or empty; `folded`
    tells what was folded into the weights: `pre_bias`, `input_scale`, `decoder_norm`, `gate`; `notes` the rest.
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
    """A reader. `recognise` gives the reason why a path holds this format, from names and headers alone, or None;
    `read` raises FormatError.
    """

    name: str
    recognise: Callable[[Path], str | None]
    read: Callable[[Path], tuple[SAE, Declaration]]


@dataclass(frozen=True)
class Loaded:
    """A read checkpoint: which format, why it was taken for it, and what came of it."""

    format: str
    why: str
    sae: SAE
    declared: Declaration
