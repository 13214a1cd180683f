"""What the vectors of a program could do together, compared with what the locked rows span.

Row by row, nothing is parallel to a locked row of which each vector has a part. So what is compared is the largest
cosine between a combination of the program's vectors and a combination of locked rows: that of the smallest principal
angle between the two spaces (Björck and Golub, 1973).
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from rudder.server.program import wire
from rudder.server.program.rows import PARALLEL, Floats, Registry, vectors_of

Doubles = NDArray[np.float64]
# Of the longest, below which a singular value is rounding of float32.
TOLERANCE = 1e-8


def basis(vectors: Floats | Doubles) -> Doubles:
    """Return an orthonormal basis [k, d] of what vectors [n, d] span; those of length 0 span nothing."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    units: Doubles = vectors[lengths > 0].astype(np.float64) / lengths[lengths > 0][:, None]
    if not len(units):
        return units
    _, sizes, rows = np.linalg.svd(units, full_matrices=False)
    return np.asarray(rows[sizes > TOLERANCE * sizes[0]])


def reaches(writes: Doubles, locked: Doubles) -> bool:
    """Return whether a combination of `writes` [m, d] lies in the span of the basis `locked` [k, d] too far.

    Too far: its cosine to that span squared exceeds what a random direction has there, k / d, by a share PARALLEL^2 of
    the rest. For one locked row, this is about a cosine of PARALLEL.
    """
    if not len(writes) or not len(locked):
        return False
    cosine = np.linalg.norm(basis(writes) @ locked.T, 2)
    by_chance = len(locked) / locked.shape[1]
    return bool(cosine**2 >= by_chance + PARALLEL**2 * (1 - by_chance) - TOLERANCE)


def writes_of(sites: Sequence[wire.Site], registry: Registry, phase: str) -> Doubles:
    """Return what a program can combine at tokens of a phase, [m, d]: its own vectors, and what its latents add.

    Vectors at several sites count together: they add up in the residual stream. Latents have their numbers from the
    operator's dictionary, and count with what they add where none is active: one sum for each site and unit.
    """
    found = [write.astype(np.float64) for site in sites for write in writes_at(site, registry, phase)]
    return np.stack(found or [np.zeros(registry.width)])


def writes_at(site: wire.Site, registry: Registry, phase: str) -> Iterator[NDArray[np.floating]]:
    """Yield the writes of one site."""
    parts: tuple[wire.Edit | wire.Blend, ...] = (*site.edits, site.blend) if site.blend else site.edits
    rows = [site.rows[part.row] for part in parts if getattr(part, phase)]
    yield from (np.frombuffer(row.decoder, "<f4") for row in rows if not row.bundle and is_clients(row, registry))
    for relative in (False, True):
        edits = [edit for edit in site.edits if edit.relative is relative and getattr(edit, phase)]
        latents = [(edit, site.rows[edit.row]) for edit in edits if site.rows[edit.row].bundle]
        yield sum((added(edit) * decoder_of(row, registry) for edit, row in latents), np.zeros(registry.width))


def is_clients(row: wire.Row, registry: Registry) -> bool:
    """Return whether a vector is a client's, and not the mean of a bundle, which a blend names."""
    means = (known.mean for known in registry.dictionaries.values() if known.mean is not None)
    return all(row.decoder != np.asarray(mean, "<f4").tobytes() for mean in means)


def added(edit: wire.Edit) -> float:
    """Return what an edit adds to the activation of a latent that is not active."""
    return min(max(edit.shift, edit.lower), edit.upper) if edit.above < 0 else 0.0


def decoder_of(row: wire.Row, registry: Registry) -> Floats:
    """Return the decoder of a latent."""
    *_, decoder = vectors_of(row, registry)
    return decoder
