"""Resolve the rows of a program to the contents of row places."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil, sqrt
from types import MappingProxyType

import msgspec
import numpy as np
from numpy.typing import NDArray

from rudder.server.program import wire
from rudder.server.program.errors import MAX_MAGNITUDE, ProgramError, number, require
from rudder.server.program.layout import Layout
from rudder.v1 import program_pb2

Floats = NDArray[np.float32]
# (bundle, latent) pairs that a program must not edit.
LockedRows = frozenset[tuple[str, int]]
NO_LOCKED_ROWS: LockedRows = frozenset()
ReservedRows = Mapping[int, frozenset[wire.Row]]
NO_RESERVED_ROWS: ReservedRows = MappingProxyType({})
NO_KEPT_PLACES: Mapping[int, int] = MappingProxyType({})
# Cosine from which two directions count as parallel: an edit along one moves the other.
PARALLEL = 0.5
# Latents that are compared at once.
COMPARED = 4096


@dataclass(frozen=True, eq=False)
class Dictionary:
    """A bundle's latents as programs can refer to them: max_activation and decoder_norm fp32 [F], mean fp32 [d].

    max_activation and mean (of the residual) are None if not measured. `watched_only`, if not empty, is the reason why
    the latents cannot be edited; `whole_only`, the reason why they have no rows. `vectors`: returns encoder and decoder
    of a latent, fp32 [d] each, or those of a slice of latents, [n, d] each.
    """

    name: str
    site: str
    sha256: str
    latents: int
    max_activation: Floats | None
    decoder_norm: Floats
    mean: Floats | None
    vectors: Callable[[int | slice], Iterable[Floats]]
    watched_only: str = ""
    whole_only: str = ""


@dataclass(frozen=True, eq=False)
class Registry:
    """The sites and dictionaries that programs can refer to, and the width of the residual stream.

    `step_tokens`: most tokens of one step, as the engine is configured.
    `request_share`: share of a site's row places, beside the reserved ones, that one request may hold.
    `vocabulary`: `token_model.vocabulary_sha256` of the served tokenizer; empty while it is not known.
    """

    layout: Layout
    width: int
    dictionaries: dict[str, Dictionary]
    max_edits: int = 256
    step_tokens: int = 2**31
    request_share: float = 1.0
    max_name_chars: int = 128
    vocabulary: str = ""


@dataclass(frozen=True)
class Resolved:
    """A resolved row. `reads`: it has an activation. `norm`: of its decoder, 0 without one. `maximum`: its maximum
    activation, 0 if not measured. `watched_only`: the reason why it cannot be edited, or empty.
    """

    row: wire.Row
    name: str
    reads: bool
    norm: float = 0.0
    maximum: float = 0.0
    watched_only: str = ""


def site_number(site: str, registry: Registry, field: str) -> int:
    """Return the number of a site in the layout; raises ProgramError SITE_UNKNOWN."""
    known = registry.layout.sites
    require(site in known, field, f"{site!r} is not one of {', '.join(known)}", "SITE_UNKNOWN")
    return known.index(site)


def resolve(row: program_pb2.Row, site: str, registry: Registry, field: str) -> Resolved:
    """Resolve a row message at `site`. Raises ProgramError."""
    match row.WhichOneof("row"):
        case "feature":
            return resolve_feature(row.feature, site, registry, f"{field}.feature")
        case "vector":
            values, norm = direction(row.vector.values, registry.width, f"{field}.vector.values")
            name = checked_name(row.vector.name, registry, f"{field}.vector.name")
            return Resolved(wire.Row(decoder=values), f"vector {name}".rstrip(), reads=False, norm=norm)
        case "probe":
            weights, _ = direction(row.probe.weights, registry.width, f"{field}.probe.weights")
            bias = number(row.probe.bias, f"{field}.probe.bias")
            name = checked_name(row.probe.name, registry, f"{field}.probe.name")
            return Resolved(wire.Row(encoder=weights, bias=bias), f"probe {name}".rstrip(), reads=True)
    raise ProgramError(field, "names no feature, vector or probe")


def checked_name(name: str, registry: "Registry", field: str) -> str:
    """Return the name of a vector or probe, which attestation and reports repeat. Raises ProgramError if it is long."""
    maximum = registry.max_name_chars
    require(len(name) <= maximum, field, f"has {len(name)} characters, at most {maximum}")
    return name


def resolve_feature(feature: program_pb2.Feature, site: str, registry: Registry, field: str) -> Resolved:
    """Resolve the row of a latent."""
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
    """Return the dictionary `name`; without a name, the first that is served at the site."""
    if name:
        require(name in registry.dictionaries, field, f"no bundle {name!r} is served", "FEATURE_UNKNOWN")
        dictionary = registry.dictionaries[name]
        require(dictionary.site == site, field, f"{name} reads {dictionary.site}, not {site}")
        return dictionary
    candidates = [d for d in registry.dictionaries.values() if d.site == site]
    require(candidates, field, f"no bundle is served at {site}", "FEATURE_UNKNOWN")
    return candidates[0]


def blend_target(blend: program_pb2.Blend, site: str, registry: Registry, field: str) -> Resolved:
    """Resolve the row whose decoder is the target of a blend."""
    if blend.WhichOneof("target") == "vector":
        values, _ = direction(blend.vector.values, registry.width, f"{field}.vector.values")
        name = checked_name(blend.vector.name, registry, f"{field}.vector.name")
        return Resolved(wire.Row(decoder=values), f"vector {name}".rstrip(), reads=False)
    dictionary = find_dictionary(blend.bundle, site, registry, f"{field}.bundle")
    if dictionary.mean is None:
        raise ProgramError(f"{field}.bundle", f"the mean residual of {dictionary.name} was never measured")
    mean, _ = direction(dictionary.mean, registry.width, f"{field}.bundle")
    return Resolved(wire.Row(decoder=mean), f"mean of {dictionary.name}", reads=False)


def append_row(rows: dict[wire.Row, int], row: wire.Row) -> int:
    """Append a row and return its number. Equal rows get places of their own, so that their edits are counted apart."""
    while row in rows:
        row = msgspec.structs.replace(row, copy=row.copy + 1)
    return rows.setdefault(row, len(rows))


def direction(values: Iterable[float], width: int, field: str) -> tuple[bytes, float]:
    """Convert a vector of length `width` to little-endian fp32, and return it with its norm, which is not 0."""
    array = np.asarray(values, "<f4")
    require(len(array) == width, field, f"has {len(array)} values, the residual stream {width}")
    require(np.isfinite(array).all(), field, "has a value that is not finite")
    norm = sqrt(float(np.square(array, dtype=np.float64).sum()))
    require(norm > 0, field, "is zero")
    require(norm <= MAX_MAGNITUDE, field, f"its norm {norm:g} is larger than {MAX_MAGNITUDE:g}")
    return array.tobytes(), norm


def row_directions(rows: Iterable[wire.Row], registry: Registry) -> Floats:
    """Return the encoders and decoders of rows, divided by their lengths, fp32 [n, d], without those of length 0."""
    vectors = [vector for row in rows for vector in vectors_of(row, registry)]
    stacked = np.stack(vectors).astype(np.float64) if vectors else np.zeros((0, registry.width))
    lengths = np.linalg.norm(stacked, axis=1, keepdims=True)
    return np.asarray(stacked[lengths[:, 0] > 0] / lengths[lengths > 0][:, None], np.float32)


def parallel_latents(directions: Floats, registry: Registry) -> LockedRows:
    """Return the latents of all dictionaries that are parallel to one of `directions` [n, d], of length 1."""
    if not len(directions):
        return NO_LOCKED_ROWS
    served = registry.dictionaries.values()
    return frozenset((known.name, i) for known in served for i in parallel_in(known, directions))


def parallel_in(dictionary: Dictionary, directions: Floats) -> Iterator[int]:
    """Yield the latents of a dictionary whose encoder or decoder is parallel to one of `directions`."""
    for begin in range(0, dictionary.latents, COMPARED):
        for vectors in dictionary.vectors(slice(begin, begin + COMPARED)):
            # A transcoder may write to a wider or narrower stream.
            if vectors.shape[1] == directions.shape[1]:
                longest, lengths = np.abs(vectors @ directions.T).max(1), np.linalg.norm(vectors, axis=1)
                yield from (begin + np.flatnonzero((longest > 0) & (longest >= PARALLEL * lengths))).tolist()


def vectors_of(row: wire.Row, registry: Registry) -> Iterator[Floats]:
    """Yield encoder and decoder of a row, as far as it has them."""
    if row.bundle:
        yield from registry.dictionaries[row.bundle].vectors(row.latent)
    for data in (row.encoder, row.decoder):
        if data:
            yield np.frombuffer(data, "<f4")


def check_capacity(
    stages: Iterable[Iterable[wire.Site]],
    registry: Registry,
    field: str,
    reserved: ReservedRows = NO_RESERVED_ROWS,
    share: float = 1.0,
    kept: Mapping[int, int] = NO_KEPT_PLACES,
) -> None:
    """Raise ProgramError if the stages need more distinct rows at a site than it has places beside those reserved.

    Such a request could never be admitted. `reserved`: rows by site number. `share`: of the places beside those, what
    the stages may hold: one request must not hold all of them for as long as it likes. `kept`: places by site number
    that requests leave free.
    """
    needed: dict[int, set[wire.Row]] = {}
    for site in (site for stage in stages for site in stage):
        needed.setdefault(site.site, set()).update(site.rows)
    for at, rows in needed.items():
        places = registry.layout.rows - kept.get(at, 0)
        held = reserved.get(at, frozenset())
        # Not a union with `reserved`: policies may reserve many rows, and this runs for every call.
        total = len(held) + len(rows - held)
        name = registry.layout.sites[at]
        require(total <= places, field, f"{total} distinct rows at {name}, which has {places} places")
        own, most = total - len(held), ceil(share * (places - len(held)))
        require(own <= most, field, f"{own} distinct rows at {name}, where one request may hold {most}")


def check_capture(request: wire.Request, registry: Registry, field: str) -> None:
    """Raise ProgramError if a step of the request may have more tokens to capture than the engine has room for.

    All of the prompt may run in one step. Generated tokens come one by one, and what a preempted request computes again
    is not captured again.
    """
    room = registry.layout.capture_tokens
    if room is None or not request.reads or not (request.watch_prompt or request.capture):
        return
    tokens = min(request.prompt_tokens, registry.step_tokens)
    problem = f"a step may read {tokens} tokens of the prompt, engine.capture_tokens has room for {room}"
    require(tokens <= room, field, problem)
