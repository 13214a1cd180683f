"""Which latents of two SAEs are the same (arXiv 2501.16615), and how to carry policies from one to the other.

Latents are matched one to one so that the mean cosine of encoder and decoder rows is largest in sum. A pair is shared
where both cosines are 0.7 or more.
"""

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from rudder.sae_models.bundle import bundle
from rudder.sae_models.errors import UserError
from rudder.sae_models.formats import load
from rudder.sae_models.optional import extra
from rudder.sae_models.sae import SAE

SHARED = 0.7
# Pairs whose mean cosine is below this are never matched. It is below SHARED, so no shared pair is lost to it; the
# pairs above it fall into small groups, each matched by itself, so that the whole fits in memory at any width.
FLOOR = 0.5
BLOCK = 2048
BINS = 20


@dataclass(frozen=True)
class Match:
    """Partners: latent `a` [n] of the one SAE and `b` [n] of the other, with the cosines of encoder and decoder rows;
    and `nearest` [F], the largest mean cosine of each latent of the one with any of the other.
    """

    a: Tensor
    b: Tensor
    encoder: Tensor
    decoder: Tensor
    nearest: Tensor

    @property
    def shared(self) -> Tensor:
        """Which pairs [n] agree in encoder and decoder both."""
        return (self.encoder >= SHARED) & (self.decoder >= SHARED)


class Report(msgspec.Struct, frozen=True):
    """A comparison as it is told. `shared_share` is of the smaller SAE's latents; `histogram` counts `nearest` in BINS
    equal bins of [-1, 1]; a pair of `mapping` is (latent of the one, latent of the other, encoder cosine, decoder
    cosine), shared pairs alone.
    """

    one: str
    other: str
    latents: tuple[int, int]
    matched: int
    shared: int
    shared_share: float
    mean_nearest: float
    histogram: tuple[int, ...]
    mapping: tuple[tuple[int, int, float, float], ...]


def match(one: SAE, other: SAE) -> Match:
    """The one-to-one assignment that maximises the sum of mean cosines over pairs above FLOOR.

    Memory grows with the pairs above FLOOR, not with the product of the widths. ValueError: widths differ.
    """
    if one.width != other.width or one.decoder.shape[1] != other.decoder.shape[1]:
        raise UserError(f"compare: widths {one.width} and {other.width}: the SAEs are not of one site")
    ours, theirs = (tuple(normalize(m.float(), dim=1) for m in (s.encoder, s.decoder)) for s in (one, other))
    rows, columns, cosines, nearest = _candidates(ours, theirs)
    a, b = _assigned(rows, columns, cosines, one.latents, other.latents)
    encoder, decoder = ((mine[a] * its[b]).sum(1) for mine, its in zip(ours, theirs, strict=True))
    return Match(a, b, encoder, decoder, nearest)


def _candidates(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The pairs above FLOOR and their mean cosines, and the largest of each of our latents."""
    found, nearest = [], []
    latents = len(ours[0])
    for first in tqdm(range(0, latents, BLOCK), desc="compare", unit="block", disable=latents <= BLOCK):
        here = slice(first, first + BLOCK)
        mean = (ours[0][here] @ theirs[0].T + ours[1][here] @ theirs[1].T) / 2
        row, column = (mean > FLOOR).nonzero(as_tuple=True)
        found.append((row + first, column, mean[row, column]))
        nearest.append(mean.amax(1))
    rows, columns, cosines = (torch.cat(parts) for parts in zip(*found, strict=True))
    return rows, columns, cosines, torch.cat(nearest).clamp(max=1.0)


def _assigned(rows: Tensor, columns: Tensor, cosines: Tensor, ours: int, theirs: int) -> tuple[Tensor, Tensor]:
    """The best assignment of each connected group of candidates by itself, which is the best of all."""
    row, column, cosine = rows.numpy(), columns.numpy(), cosines.double().numpy()
    sparse = extra("scipy.sparse", "comparing SAEs")
    graph = sparse.coo_matrix((np.ones(len(row)), (row, ours + column)), shape=(ours + theirs, ours + theirs))
    _, group = extra("scipy.sparse.csgraph", "comparing SAEs").connected_components(graph, directed=False)
    order = np.argsort(group[row], kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(group[row][order])) + 1)
    pairs = np.concatenate([_best(row[members], column[members], cosine[members]) for members in groups], 1)
    return torch.from_numpy(pairs[0]), torch.from_numpy(pairs[1])


def _best(row: NDArray[np.int64], column: NDArray[np.int64], cosine: NDArray[np.float64]) -> NDArray[np.int64]:
    """Hungarian assignment of one group [2, pairs]; who is left without a candidate stays without a partner."""
    ours, i = np.unique(row, return_inverse=True)
    theirs, j = np.unique(column, return_inverse=True)
    gain = np.zeros((len(ours), len(theirs)))
    gain[i, j] = cosine
    a, b = extra("scipy.optimize", "comparing SAEs").linear_sum_assignment(gain, maximize=True)
    kept = gain[a, b] > 0
    return np.stack([ours[a[kept]], theirs[b[kept]]])


def report(one: Path, other: Path) -> Report:
    """Compares two SAEs on disk."""
    first, second = read(one), read(other)
    found = match(first, second)
    shared = found.shared
    columns = (found.a, found.b, found.encoder, found.decoder)
    mapping = zip(*(column[shared].tolist() for column in columns), strict=True)
    return Report(
        one=str(one),
        other=str(other),
        latents=(first.latents, second.latents),
        matched=len(found.a),
        shared=int(shared.sum()),
        shared_share=int(shared.sum()) / min(first.latents, second.latents),
        mean_nearest=float(found.nearest.mean()),
        histogram=tuple(found.nearest.histc(BINS, -1, 1).long().tolist()),
        mapping=tuple(sorted(mapping)),
    )


def read(path: Path) -> SAE:
    """The SAE of a bundle, or of a checkpoint in any published format."""
    if not (path / bundle.MANIFEST).is_file():
        return load.load(path).sae
    opened = bundle.load(path)
    opened.catalogue.close()
    return opened.sae


def told(found: Report) -> str:
    """A comparison for a person to read."""
    of = " and ".join(f"{latents:,}" for latents in found.latents)
    lines = [
        f"{found.shared:,} latents are shared ({found.shared_share:.1%}) of {of}; {found.matched:,} have a partner",
        f"mean largest cosine {found.mean_nearest:.3f}; how many latents of the first are how near:",
    ]
    most = max(found.histogram)
    for index, count in enumerate(found.histogram):
        if count:
            low, high = (2 * edge / BINS - 1 for edge in (index, index + 1))
            lines.append(f"  {low:5.1f} to {high:4.1f}  {count:7,}  {'#' * round(40 * count / most)}")
    return "\n".join(lines)
