"""The bank's fixed shape, on which the compiled graph depends and by which the compile cache is keyed."""

from dataclasses import asdict, dataclass
from typing import Any

from rudder.sae_models.errors import UserError
from rudder.sae_models.hookpoints import FORM, POINTS, SITE, parse


@dataclass(frozen=True)
class Layout:
    """Sites in forward order, and the size of each resource.

    `rows`: row places per site. `slots`: requests with a program at once. `window`: tokens, the longest window of a
    sequence condition. `sequence_sites`: sites with sequence state, None: all. `capture_tokens`: tokens of a step whose
    residual can be read, None: all. `dictionaries`: (site, folder, SHA-256) of the bundles that the bank of their site
    holds whole. `bundles`: (name, folder, SHA-256) of all bundles: the worker loads them with the model, before the KV
    cache takes the memory that is left. `backend`: of the bank's arithmetic, as in the configuration.
    """

    sites: tuple[str, ...]
    rows: int = 256
    slots: int = 256
    stages: int = 1
    window: int = 32
    sequence_sites: tuple[str, ...] | None = None
    capture_tokens: int | None = None
    dictionaries: tuple[tuple[str, str, str], ...] = ()
    bundles: tuple[tuple[str, str, str], ...] = ()
    backend: str = "auto"

    def __post_init__(self) -> None:
        unknown = [site for site in self.sites if not SITE.fullmatch(site)]
        if unknown:
            raise UserError(f"sites: {unknown[0]!r} is not {FORM}")
        if len(set(self.sites)) < len(self.sites):
            raise UserError("sites: a site is named twice")
        for name in ("rows", "slots", "stages", "window"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: must be at least 1")
        unhooked = [site for site in self.sequence_sites or () if site not in self.sites]
        if unhooked:
            raise UserError(f"sequence_sites: {unhooked[0]!r} is not among the sites")
        object.__setattr__(self, "sites", tuple(sorted(self.sites, key=forward_order)))

    def keeps_sequences(self, site: str) -> bool:
        """Return whether a gate at `site` may have a sequence condition."""
        return self.sequence_sites is None or site in self.sequence_sites

    def additional_config(self, code: str) -> dict[str, Any]:
        """Return vLLM's `additional_config`, which its compile-cache key hashes; `code`: digest of the traced code."""
        return {"rudder": asdict(self) | {"code": code}}

    @staticmethod
    def from_additional_config(config: dict[str, Any]) -> "Layout":
        """Parse the output of `additional_config`."""
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config["rudder"].items()}
        del fields["code"]
        for name in ("dictionaries", "bundles"):
            fields[name] = tuple(map(tuple, fields[name]))
        return Layout(**fields)


def forward_order(site: str) -> tuple[int, int]:
    """Sort key: the order in which the forward pass reaches sites."""
    layer, point = parse(site)
    return layer, POINTS.index(point)
