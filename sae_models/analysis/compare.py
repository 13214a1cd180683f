"""Match the latents of two SAEs (arXiv 2501.16615), to port policies from one to the other.

Latents are matched one to one so as to maximise the sum of the mean cosines of encoder and decoder rows. A pair is
shared where both cosines are 0.7 or more.
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
from rudder.sae_models.optional import import_optional
from rudder.sae_models.sae import SAE

SHARED = 0.7
# Pairs with a mean cosine below this are never matched. It is below SHARED, so no shared pair is lost. The pairs above
# it form small connected groups, which are matched separately: memory stays bounded whatever the number of latents.
FLOOR = 0.5
BLOCK = 2048
BINS = 20


@dataclass(frozen=True)
class Match:
    """Matched pairs: latent `a` [n] of the first SAE and `b` [n] of the second, with cosines of encoder and decoder
    rows; `nearest` [F]: the largest mean cosine of each latent of the first with any of the second.
    """

    a: Tensor
    b: Tensor
    encoder: Tensor
    decoder: Tensor
    nearest: Tensor

    @property
    def shared(self) -> Tensor:
        """Mask [n] of the pairs that agree in both encoder and decoder."""
        return (self.encoder >= SHARED) & (self.decoder >= SHARED)


class Report(msgspec.Struct, frozen=True):
    """The result of a comparison, as the command prints it in JSON.

    `shared_share`: share of the smaller SAE's latents. `histogram`: counts of `nearest` in BINS equal bins of [-1, 1].
    `mapping`: (latent of the first, latent of the second, encoder cosine, decoder cosine) of each shared pair.
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


def match(first: SAE, second: SAE) -> Match:
    """Return the one-to-one assignment that maximises the sum of mean cosines over pairs above FLOOR.

    Memory grows with the number of pairs above FLOOR, not with F1 * F2. ValueError: the SAEs' widths differ.
    """
    if first.width != second.width or first.decoder.shape[1] != second.decoder.shape[1]:
        raise UserError(f"compare: widths {first.width} and {second.width}: the SAEs are not of one site")
    rows, others = (tuple(normalize(m.float(), dim=1) for m in (s.encoder, s.decoder)) for s in (first, second))
    a, b, cosines, nearest = _candidates(rows, others)
    a, b = _assign(a, b, cosines, first.latents, second.latents)
    encoder, decoder = ((row[a] * other[b]).sum(1) for row, other in zip(rows, others, strict=True))
    return Match(a, b, encoder, decoder, nearest)


def _candidates(rows: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the pairs (a, b) above FLOOR with their mean cosines, and the largest of each latent of the first SAE.

    `rows` and `others` are the unit (encoder, decoder) rows of the first and the second SAE.
    """
    candidates, nearest = [], []
    latents = len(rows[0])
    for start in tqdm(range(0, latents, BLOCK), desc="compare", unit="block", disable=latents <= BLOCK):
        block = slice(start, start + BLOCK)
        mean = (rows[0][block] @ others[0].T + rows[1][block] @ others[1].T) / 2
        a, b = (mean > FLOOR).nonzero(as_tuple=True)
        candidates.append((a + start, b, mean[a, b]))
        nearest.append(mean.amax(1))
    all_a, all_b, cosines = (torch.cat(parts) for parts in zip(*candidates, strict=True))
    return all_a, all_b, cosines, torch.cat(nearest).clamp(max=1.0)


def _assign(a: Tensor, b: Tensor, cosines: Tensor, first: int, second: int) -> tuple[Tensor, Tensor]:
    """Match each connected group of candidate pairs separately; together these are the optimum over all pairs.

    `first` and `second` are the numbers of latents of the two SAEs.
    """
    i, j, cosine = a.numpy(), b.numpy(), cosines.double().numpy()
    nodes = first + second
    sparse = import_optional("scipy.sparse", "comparing SAEs")
    graph = sparse.coo_matrix((np.ones(len(i)), (i, first + j)), shape=(nodes, nodes))
    _, group = import_optional("scipy.sparse.csgraph", "comparing SAEs").connected_components(graph, directed=False)
    order = np.argsort(group[i], kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(group[i][order])) + 1)
    pairs = np.concatenate([_assign_group(i[members], j[members], cosine[members]) for members in groups], 1)
    return torch.from_numpy(pairs[0]), torch.from_numpy(pairs[1])


def _assign_group(a: NDArray[np.int64], b: NDArray[np.int64], cosine: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the Hungarian assignment of one group [2, pairs], without pairs that are not candidates."""
    rows, i = np.unique(a, return_inverse=True)
    columns, j = np.unique(b, return_inverse=True)
    gain = np.zeros((len(rows), len(columns)))
    gain[i, j] = cosine
    i, j = import_optional("scipy.optimize", "comparing SAEs").linear_sum_assignment(gain, maximize=True)
    is_candidate = gain[i, j] > 0
    return np.stack([rows[i[is_candidate]], columns[j[is_candidate]]])


def compare(first: Path, second: Path) -> Report:
    """Compare two SAEs on disk: bundles, or checkpoints in published formats."""
    one, other = read(first), read(second)
    matches = match(one, other)
    shared = matches.shared
    columns = (matches.a, matches.b, matches.encoder, matches.decoder)
    mapping = zip(*(column[shared].tolist() for column in columns), strict=True)
    return Report(
        one=str(first),
        other=str(second),
        latents=(one.latents, other.latents),
        matched=len(matches.a),
        shared=int(shared.sum()),
        shared_share=int(shared.sum()) / min(one.latents, other.latents),
        mean_nearest=float(matches.nearest.mean()),
        histogram=tuple(matches.nearest.histc(BINS, -1, 1).long().tolist()),
        mapping=tuple(sorted(mapping)),
    )


def read(path: Path) -> SAE:
    """Read the SAE of a bundle, or of a checkpoint in any published format."""
    if not (path / bundle.MANIFEST).is_file():
        return load(path).sae
    opened = bundle.load(path)
    opened.catalogue.close()
    return opened.sae


def format_report(report: Report) -> str:
    """Format a comparison for a terminal."""
    of = " and ".join(f"{latents:,}" for latents in report.latents)
    lines = [
        f"{report.shared:,} latents are shared ({report.shared_share:.1%}) of {of}; {report.matched:,} have a partner",
        f"mean largest cosine {report.mean_nearest:.3f}; latents of the first by largest cosine:",
    ]
    highest = max(report.histogram)
    for index, count in enumerate(report.histogram):
        if count:
            low, high = (2 * edge / BINS - 1 for edge in (index, index + 1))
            lines.append(f"  {low:5.1f} to {high:4.1f}  {count:7,}  {'#' * round(40 * count / highest)}")
    return "\n".join(lines)
