"""The bank's fixed shape: what the compiled graph depends on and the compile cache is keyed by."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rudder.sae_models import edit as formula
from rudder.sae_models import sae
from rudder.sae_models.errors import UserError
from rudder.sae_models.hookpoints import FORM, POINTS, SITE, parse

WORKER = Path(__file__).parents[1] / "engine/worker"
TRACED = (WORKER / "bank.py", WORKER / "hooks.py", Path(formula.__file__), Path(sae.__file__))


@dataclass(frozen=True)
class Layout:
    """Sites in the order the forward pass reaches them, and the size of each resource.

    `dictionaries`: (site, folder, SHA-256) of the bundles that the bank of their site keeps whole.
    """

    sites: tuple[str, ...]
    rows: int = 256
    slots: int = 256
    stages: int = 1
    window: int = 32
    sequence_sites: tuple[str, ...] | None = None
    capture_tokens: int | None = None
    dictionaries: tuple[tuple[str, str, str], ...] = ()

    def __post_init__(self) -> None:
        unknown = [site for site in self.sites if not SITE.fullmatch(site)]
        if unknown:
            raise UserError(f"sites: {unknown[0]!r} is not {FORM}")
        if len(set(self.sites)) < len(self.sites):
            raise UserError("sites: a site is named twice")
        for name in ("rows", "slots", "stages", "window"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: must be at least 1")
        stray = [site for site in self.sequence_sites or () if site not in self.sites]
        if stray:
            raise UserError(f"sequence_sites: {stray[0]!r} is not among the sites")
        object.__setattr__(self, "sites", tuple(sorted(self.sites, key=depth)))

    def keeps_sequences(self, site: str) -> bool:
        """Whether a gate with a sequence condition can be read at `site`."""
        return self.sequence_sites is None or site in self.sequence_sites

    def additional_config(self) -> dict[str, Any]:
        """For vLLM's `additional_config`, which its compile-cache key hashes; the code's own digest is part of it."""
        return {"rudder": asdict(self) | {"code": code_digest()}}

    @staticmethod
    def from_additional_config(config: dict[str, Any]) -> "Layout":
        """Inverse of `additional_config`, in the worker."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config["rudder"].items()}
        del fields["code"]
        fields["dictionaries"] = tuple(map(tuple, fields["dictionaries"]))
        return Layout(**fields)


def depth(site: str) -> tuple[int, int]:
    """Order in which the forward pass reaches a site."""
    layer, point = parse(site)
    return layer, POINTS.index(point)


def code_digest() -> str:
    """Hash of the code that is traced into the graph: a change of it must not meet an old artifact."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in TRACED)).hexdigest()[:16]
