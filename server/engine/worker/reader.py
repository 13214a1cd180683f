"""After a forward pass: from the banks' buffers to the step's telemetry frame."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rudder.sae_models.sae import SAE
from rudder.sae_models.sparse.screening import ScreeningDictionary, top_k_latents
from rudder.server.engine.telemetry.frame import Array, Capture, Frame
from rudder.server.engine.worker.bank import SiteBank
from rudder.server.engine.worker.driver import Live, Step


@dataclass(frozen=True)
class Gather:
    """Where a column's values lie: `index` into the flat values of buffer `source`, to be put at `target`."""

    source: int
    index: Array
    target: Array | slice


@dataclass(frozen=True)
class Columns:
    """The gathers of a batch composition; steady decoding reuses them step after step."""

    key: tuple[object, ...]
    active: tuple[Gather, ...]
    active_size: int
    moved: tuple[Gather, ...]
    moved_size: int


@dataclass(frozen=True)
class Readable:
    """A dictionary that can be read whole, and the numbers of the sites that it reads."""

    screen: ScreeningDictionary | SAE
    sites: list[int]


class Reader:
    """Reads the buffers of all sites; `pinned` rows [(site, place)] are summed over all requests."""

    def __init__(self, banks: Sequence[SiteBank]) -> None:
        self.banks = banks
        self.dictionaries: dict[int, Readable] = {}
        self.pinned: dict[int, list[int]] = {}
        self.columns = Columns((), (), 0, (), 0)
        self.told: tuple[Step, int] = Step(), -1

    def frame(self, sequence: int, step: Step, released: Sequence[int]) -> Frame:
        """The frame of a step whose forward pass has run."""
        if not step.tokens:
            return Frame(sequence, released=packed(released, "<i8"))
        columns = self.columns_of(step)
        top_latents, top_values = self.top(step)
        goes_on = step is self.told[0] and step.gone_on == self.told[1] + 1
        self.told = step, step.gone_on
        return Frame(
            sequence,
            goes_on,
            handles=b"" if goes_on else packed(step.batch.handles, "<i8"),
            starts=b"" if goes_on else packed(step.starts, "<i4"),
            lengths=b"" if goes_on else packed(step.lengths, "<i4"),
            moved=self.moved(columns, step).tobytes(),
            active=self.active(columns, step).tobytes(),
            top_values=top_values,
            top_latents=top_latents,
            captures=tuple(self.captures(step)),
            pinned=self.totals(step).tobytes(),
            released=packed(released, "<i8"),
        )

    def columns_of(self, step: Step) -> Columns:
        """The gathers for this composition, made anew when it changed."""
        # A step that decodes has one token of each request, all of them reported.
        key = (step.batch, None if step.decodes else (step.lengths.tobytes(), step.unreported().tobytes()))
        if key != self.columns.key:
            rows, stages = self.banks[0].active.shape[1], self.banks[0].stages
            active, active_size = watch_gathers(step, rows)
            moved, moved_size = moved_gathers(step, stages, rows)
            self.columns = Columns(key, active, active_size, moved, moved_size)
        return self.columns

    def active(self, columns: Columns, step: Step) -> Array:
        """fp32: activations of watched rows."""
        column = np.empty(columns.active_size, "<f4")
        for gather in columns.active:
            values = to_host(self.banks[gather.source].active[: step.tokens])
            column[gather.target] = values.reshape(-1).take(gather.index)
        return column

    def moved(self, columns: Columns, step: Step) -> Array:
        """int32: tokens that each edit touched in this step."""
        column = np.empty(columns.moved_size, "<i4")
        for gather in columns.moved:
            bank = self.banks[gather.source // self.banks[0].stages]
            flags = to_host(bank.moved[gather.source % bank.stages, : step.tokens])
            counts = flags if step.decodes else np.add.reduceat(flags, step.offsets, axis=0, dtype=np.int32)
            column[gather.target] = counts.reshape(-1).take(gather.index)
        return column

    def top(self, step: Step) -> tuple[bytes, bytes]:
        """The strongest latents of each token that asked, by the whole dictionary: (latents, values).

        One encode per site for all requests of the step.
        """
        readers = captured(step)
        if not readers:
            return b"", b""
        wanted = sorted({site for request, _ in readers for site in request.request.top_k_sites})
        most = max(request.request.top_k for request, _ in readers)
        captured_rows = slice(1, 1 + int(step.capture.max()))
        found = {site: self.strongest(self.dictionaries[site], captured_rows, most) for site in wanted}
        parts = [
            [found[site][column][rows - 1, : request.request.top_k].tobytes() for column in (0, 1)]
            for request, rows in readers
            for site in request.request.top_k_sites
        ]
        return b"".join(part[0] for part in parts), b"".join(part[1] for part in parts)

    def strongest(self, dictionary: Readable, rows: slice, k: int) -> tuple[Array, Array]:
        """(latents, values) [n, k] of the captured tokens; a routed dictionary reads several sites at once."""
        read = [self.banks[site].before[rows] for site in dictionary.sites]
        return top_k_latents(dictionary.screen, read[0] if len(read) == 1 else torch.stack(read, -2), k)

    def captures(self, step: Step) -> list[Capture]:
        """Residuals of the requests that asked for them."""
        found = []
        for request, rows in captured(step):
            for site, bank in enumerate(self.banks if request.request.capture else ()):
                index = torch.from_numpy(rows)
                before, after = (to_host(t[index]).tobytes() for t in (bank.before, bank.after))
                found.append(Capture(request.handle, site, before, after))
        return found

    def totals(self, step: Step) -> NDArray[np.float64]:
        """[pinned rows, 4]: active tokens, tokens, sum and maximum over the step, position 0 left out."""
        if not self.pinned:
            return np.zeros((0, 4))
        counted = np.ones(step.tokens, bool)
        counted[step.offsets[step.starts == 0]] = False
        parts = []
        for site, places in self.pinned.items():
            f = to_host(self.banks[site].active[: step.tokens])[:, places][counted]
            parts.append(np.stack([(f > 0).sum(0), np.full(len(places), len(f)), f.sum(0), f.max(0, initial=0)], 1))
        return np.concatenate(parts)


def watch_gathers(step: Step, places_of_bank: int) -> tuple[tuple[Gather, ...], int]:
    """Gathers of the `active` column: per request, [tokens reported, rows watched over its sites]."""
    parts: dict[int, list[tuple[Array, Array]]] = {}
    size = 0
    firsts, ends = step.offsets + step.unreported(), step.offsets + step.lengths
    for request, first, end in zip(step.live, firsts, ends, strict=True):
        if request is None:
            continue
        tokens = np.arange(first, end)
        sites = [site for site in request.request.stages[0] if site.watch]
        width, before = sum(len(site.watch) for site in sites), 0
        for site in sites:
            # Looked up once: a step with 64 requests of 64 rows must not cost tens of milliseconds.
            places, rows = request.places(site), len(site.watch)
            taken = np.array([places[row] for row in site.watch], np.int64)
            target = size + np.arange(len(tokens))[:, None] * width + before + np.arange(rows)
            index = tokens[:, None] * places_of_bank + taken
            parts.setdefault(site.site, []).append((index.reshape(-1), target.reshape(-1)))
            before += rows
        size += len(tokens) * width
    return joined(parts), size


def moved_gathers(step: Step, stages: int, places_of_bank: int) -> tuple[tuple[Gather, ...], int]:
    """Gathers of the `moved` column: per request, one count for each edit, then one for the blend, of each site."""
    parts: dict[int, list[tuple[Array, Array]]] = {}
    size = 0
    for number, request in enumerate(step.live):
        if request is None:
            continue
        for stage, sites in enumerate(request.request.stages):
            for site in sites:
                rows = [e.row for e in site.edits] + ([site.blend.row] if site.blend else [])
                held = request.places(site)
                places = np.array([held[row] for row in rows], np.int64)
                target = np.arange(size, size + len(rows))
                parts.setdefault(site.site * stages + stage, []).append((number * places_of_bank + places, target))
                size += len(rows)
    return joined(parts), size


def joined(parts: dict[int, list[tuple[Array, Array]]]) -> tuple[Gather, ...]:
    """One gather per source."""
    pairs = {source: [np.concatenate(column) for column in zip(*found, strict=True)] for source, found in parts.items()}
    return tuple(Gather(source, index, as_slice(target)) for source, (index, target) in pairs.items())


def as_slice(target: Array) -> Array | slice:
    """The same places, as a slice where they follow each other: the usual case of one site."""
    follows = len(target) > 0 and bool((np.diff(target) == 1).all())
    return slice(int(target[0]), int(target[-1]) + 1) if follows else target


def captured(step: Step) -> list[tuple[Live, Array]]:
    """The requests that read residuals, and their rows of the capture buffer in this step."""
    found = []
    if not step.batch.reads_any:
        return []
    for request, offset, length in zip(step.live, step.offsets, step.lengths, strict=True):
        if request and request.request.reads:
            rows = step.capture[offset : offset + length]
            found.append((request, rows[rows > 0]))
    return found


def packed(values: object, dtype: str) -> bytes:
    """Values as a little-endian column."""
    return np.asarray(values, dtype).tobytes()


def to_host(tensor: Tensor) -> Array:
    """A tensor's values on the host; free on CPU."""
    array: Array = tensor.cpu().numpy()
    return array
