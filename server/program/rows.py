"""From a program's rows to what a row place is filled with."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import sqrt

import msgspec
import numpy as np
from numpy.typing import NDArray

from rudder.server.program import wire
from rudder.server.program.errors import LARGEST, ProgramError, number, require
from rudder.server.program.layout import Layout
from rudder.v1 import program_pb2

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Dictionary:
    """What compiling needs of a bundle: max_activation and decoder_norm fp32 [F], mean residual fp32 [d].

    max_activation and mean are None where nobody measured them. `watched_only`, if not empty, tells why its latents
    cannot be edited; `whole_only`, why they have no rows at all.
    """

    name: str
    site: str
    sha256: str
    latents: int
    max_activation: Floats | None
    decoder_norm: Floats
    mean: Floats | None
    watched_only: str = ""
    whole_only: str = ""


@dataclass(frozen=True, eq=False)
class Registry:
    """What programs can refer to. `locked`: (bundle, latent) pairs that requests must not edit."""

    layout: Layout
    width: int
    dictionaries: dict[str, Dictionary]
    max_edits: int = 256
    locked: frozenset[tuple[str, int]] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Resolved:
    """A row that exists. `norm`: of its direction, 0 without one; `maximum`: its largest activation, if known;
    `watched_only`: why it cannot be edited.
    """

    row: wire.Row
    name: str
    reads: bool
    norm: float = 0.0
    maximum: float = 0.0
    watched_only: str = ""


def site_number(site: str, registry: Registry, field: str) -> int:
    """Place of a site in the layout."""
    known = registry.layout.sites
    require(site in known, field, f"{site!r} is not one of {', '.join(known)}", "SITE_UNKNOWN")
    return known.index(site)


def resolve(row: program_pb2.Row, site: str, registry: Registry, field: str) -> Resolved:
    """The row that `row` means at `site`."""
    match row.WhichOneof("row"):
        case "feature":
            return resolve_feature(row.feature, site, registry, f"{field}.feature")
        case "vector":
            values, norm = direction(row.vector.values, registry.width, f"{field}.vector.values")
            return Resolved(wire.Row(decoder=values), f"vector {row.vector.name}".rstrip(), reads=False, norm=norm)
        case "probe":
            weights, _ = direction(row.probe.weights, registry.width, f"{field}.probe.weights")
            bias = number(row.probe.bias, f"{field}.probe.bias")
            return Resolved(wire.Row(encoder=weights, bias=bias), f"probe {row.probe.name}".rstrip(), reads=True)
    raise ProgramError(field, "names no feature, vector or probe")


def resolve_feature(feature: program_pb2.Feature, site: str, registry: Registry, field: str) -> Resolved:
    """The row of a latent."""
    dictionary = find_dictionary(feature.bundle, site, registry, f"{field}.bundle")
    known = feature.index < dictionary.latents
    problem = f"{dictionary.name} has latents 0 to {dictionary.latents - 1}, not {feature.index}"
    require(known, f"{field}.index", problem, "FEATURE_UNKNOWN")
    require(not dictionary.whole_only, field, dictionary.whole_only)
    return Resolved(
        wire.Row(bundle=dictionary.name, latent=feature.index),
        f"feature {feature.index} of {dictionary.name}",
        reads=True,
        norm=float(dictionary.decoder_norm[feature.index]),
        maximum=0.0 if dictionary.max_activation is None else float(dictionary.max_activation[feature.index]),
        watched_only=dictionary.watched_only,
    )


def find_dictionary(name: str, site: str, registry: Registry, field: str) -> Dictionary:
    """The bundle with this name, or without one the only bundle at the site."""
    if name:
        require(name in registry.dictionaries, field, f"no bundle {name!r} is served", "FEATURE_UNKNOWN")
        found = registry.dictionaries[name]
        require(found.site == site, field, f"{name} reads {found.site}, not {site}")
        return found
    here = [d for d in registry.dictionaries.values() if d.site == site]
    require(here, field, f"no bundle is served at {site}", "FEATURE_UNKNOWN")
    require(len(here) == 1, field, f"one of {', '.join(d.name for d in here)} must be named")
    return here[0]


def blend_target(blend: program_pb2.Blend, site: str, registry: Registry, field: str) -> Resolved:
    """The row whose decoder a blend goes to."""
    if blend.WhichOneof("target") == "vector":
        values, _ = direction(blend.vector.values, registry.width, f"{field}.vector.values")
        return Resolved(wire.Row(decoder=values), f"vector {blend.vector.name}".rstrip(), reads=False)
    dictionary = find_dictionary(blend.bundle, site, registry, f"{field}.bundle")
    if dictionary.mean is None:
        raise ProgramError(f"{field}.bundle", f"the mean residual of {dictionary.name} was never measured")
    mean, _ = direction(dictionary.mean, registry.width, f"{field}.bundle")
    return Resolved(wire.Row(decoder=mean), f"mean of {dictionary.name}", reads=False)


def own_place(rows: dict[wire.Row, int], row: wire.Row) -> int:
    """Number of a new row equal to `row`, whatever `rows` holds already."""
    while row in rows:
        row = msgspec.structs.replace(row, copy=row.copy + 1)
    return rows.setdefault(row, len(rows))


def direction(values: Iterable[float], width: int, field: str) -> tuple[bytes, float]:
    """A vector of the site's width as little-endian fp32, and its norm, which is not 0."""
    array = np.asarray(values, "<f4")
    require(len(array) == width, field, f"has {len(array)} values, the residual stream {width}")
    require(np.isfinite(array).all(), field, "has a value that is not finite")
    norm = sqrt(float(np.square(array, dtype=np.float64).sum()))
    require(norm > 0, field, "is zero")
    require(norm <= LARGEST, field, f"its norm {norm:g} is larger than {LARGEST:g}")
    return array.tobytes(), norm


def check_capacity(stages: Iterable[Iterable[wire.Site]], registry: Registry, field: str) -> None:
    """Refuse what could never be admitted: more distinct rows at a site than it has places."""
    held: dict[int, set[wire.Row]] = {}
    for site in (site for stage in stages for site in stage):
        held.setdefault(site.site, set()).update(site.rows)
    for at, rows in held.items():
        name, places = registry.layout.sites[at], registry.layout.rows
        require(len(rows) <= places, field, f"{len(rows)} distinct rows at {name}, which has {places} places")
