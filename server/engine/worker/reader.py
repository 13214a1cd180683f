"""Reads the banks' buffers after a forward pass into the step's telemetry frame.

Frames are read for every token of every request, so nothing here loops over requests in steady decoding: where each
value of a column is in the buffers depends only on the composition of the batch, and is computed once for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rudder.sae_models.sae import SAE
from rudder.sae_models.sparse.screening import ScreeningDictionary, top_k_latents
from rudder.server.engine.telemetry.frame import PINNED, REJECTED, Array, Capture, Frame
from rudder.server.engine.worker.bank import SiteBank
from rudder.server.engine.worker.driver import Ints, RequestState, Step, to_device
from rudder.server.program import wire

# By (site number, stage): (indices into the buffer, indices into the column), one pair of arrays per request.
IndexParts = dict[tuple[int, int], list[tuple[Array, Array]]]


# Site number of the buffer of open gates, which all sites share.
GATES = -1


@dataclass(frozen=True)
class ColumnIndex:
    """Where a column's values are: `index` into the flat buffer of a site and stage, to be written at `target`.

    Site GATES: the buffer of open gates.
    """

    site: int
    stage: int
    index: Array
    target: Array | slice


@dataclass(frozen=True)
class ColumnIndices:
    """The indices and sizes of the columns for one composition of the batch, `key`."""

    key: tuple[object, ...]
    activations: tuple[ColumnIndex, ...]
    activations_size: int
    flags: tuple[ColumnIndex, ...]
    flags_size: int
    statistics: "StatisticIndices"


class StatisticIndices(NamedTuple):
    """Where the values of the `statistics` column are: by (stage, token) or, where the step counts none of the
    request's tokens, by (stage, slot). `unchanged`: places of the latter in the column.
    """

    stages: Array
    tokens: Array
    slots: Array
    unchanged: Array


@dataclass(frozen=True)
class Readable:
    """A dictionary that is read whole, and the numbers of the sites that it reads."""

    screen: ScreeningDictionary | SAE
    sites: list[int]


class Reader:
    """Reads the buffers of all sites. `pinned`: row places by site number, summed over all requests."""

    def __init__(self, banks: Sequence[SiteBank]) -> None:
        self.banks = banks
        self.dictionaries: dict[int, Readable] = {}
        self.pinned: dict[int, list[int]] = {}
        self.indices = ColumnIndices((), (), 0, (), 0, statistic_indices(Step()))
        # The count of rejections in the banks after the last frame.
        self.rejections = 0
        # The step of the last frame, and how many decode steps it had then.
        self.last_frame: tuple[Step, int] = Step(), -1

    def frame(self, sequence: int, step: Step, released: Sequence[int]) -> Frame:
        """Read the frame of a step whose forward pass has run; a step without tokens only releases."""
        if not step.tokens:
            return Frame(sequence, released=packed(released, "<i8"))
        self.blank_excluded(step)
        indices = self.indices_of(step)
        top_latents, top_values = self.top(step)
        # Compared with the last frame, not with the last step: steps before the channel opens have no frame.
        last_step, decode_steps = self.last_frame
        continues = step is last_step and step.decode_steps == decode_steps + 1
        self.last_frame = step, step.decode_steps
        return Frame(
            sequence,
            continues,
            handles=b"" if continues else packed(step.batch.handles, "<i8"),
            starts=b"" if continues else packed(step.starts, "<i4"),
            lengths=b"" if continues else packed(step.lengths, "<i4"),
            flags=self.flags(indices, step).tobytes(),
            statistics=self.statistics(indices),
            activations=self.activations(indices, step).tobytes(),
            top_values=top_values,
            top_latents=top_latents,
            captures=tuple(self.captures(step)),
            pinned=self.totals(step).tobytes(),
            released=packed(released, "<i8"),
            rejected=self.rejected(step).tobytes(),
        )

    def blank_excluded(self, step: Step) -> None:
        """Set the activations of excluded tokens to 0, in a buffer that nothing but this reader reads."""
        if len(step.excluded):
            for bank in self.banks:
                bank.activations[to_device(step.excluded, bank.activations.device)] = 0.0

    def indices_of(self, step: Step) -> ColumnIndices:
        """The indices for this composition, computed anew when it changed."""
        # A step that decodes has one token of each request, all of them reported.
        parts = () if step.decodes and step.all_counted else (step.lengths, step.unreported(), step.uncounted)
        key = (step.batch, *(part.tobytes() for part in parts))
        if key != self.indices.key:
            places = self.banks[0].activations.shape[1]
            self.indices = ColumnIndices(
                key, *activation_indices(step, places), *flag_indices(step, places), statistic_indices(step)
            )
        return self.indices

    def activations(self, indices: ColumnIndices, step: Step) -> Array:
        """The column of watched rows' activations, float32."""
        column = np.empty(indices.activations_size, "<f4")
        for part in indices.activations:
            values = to_host(self.banks[part.site].activations[: step.tokens])
            column[part.target] = values.reshape(-1).take(part.index)
        return column

    def flags(self, indices: ColumnIndices, step: Step) -> Array:
        """The column of edited tokens and open gates, bool."""
        # Of tokens at which no gate is evaluated, nothing is written.
        column = np.zeros(indices.flags_size, bool)
        for part in indices.flags:
            buffer = self.banks[0].sequences.is_open if part.site == GATES else self.banks[part.site].edited
            column[part.target] = to_host(buffer[part.stage, : step.tokens]).reshape(-1).take(part.index)
        return column

    def rejected(self, step: Step) -> Array:
        """The column of rejected edits, int64 [edits rejected, len(REJECTED)]."""
        before, self.rejections = self.rejections, self.count_rejections(step)
        records: list[Array] = []
        if self.rejections == before:
            return np.zeros((0, len(REJECTED)), "<i8")
        for state, start, offset, length in zip(step.requests, step.starts, step.offsets, step.lengths, strict=True):
            if state:
                records += self.rejected_of(state, int(start), slice(offset, offset + length))
        return np.concatenate(records).astype("<i8")

    def rejected_of(self, state: RequestState, start: int, tokens: slice) -> list[Array]:
        """The records of one request, whose tokens in the batch begin at position `start`."""
        records, number = [], 0
        for stage, sites in enumerate(state.request.stages):
            for site in sites:
                places = edited_places(state, site)
                flags = to_host(self.banks[site.site].rejected[stage, tokens])[:, places]
                token, edit = flags.nonzero()
                handles = np.full_like(token, state.handle)
                columns = {"handle": handles, "position": start + token, "edit": number + edit}
                records.append(np.stack([columns[name] for name in REJECTED], 1))
                number += len(places)
        return records

    def count_rejections(self, step: Step) -> int:
        """The banks' count of rejections; not read where no request of the batch has an edit."""
        return int(self.banks[0].sequences.rejections) if step.batch.edits else self.rejections

    def statistics(self, indices: ColumnIndices) -> bytes:
        """The column of sequence conditions' statistics, float64."""
        stages, tokens, slots, unchanged = indices.statistics
        if not len(stages):
            return b""
        sequences = self.banks[0].sequences
        values = to_host(sequences.token_state[:, : int(tokens.max()) + 1])[stages, tokens]
        if len(unchanged):
            values[unchanged] = to_host(sequences.state)[stages[unchanged], slots[unchanged]]
        return values.astype("<f8").tobytes()

    def top(self, step: Step) -> tuple[bytes, bytes]:
        """The columns (latents, values) of the top-k latents of each token, over the whole dictionary.

        Each dictionary is encoded once for all requests of the step.
        """
        readers = capturing_requests(step)
        if not readers:
            return b"", b""
        sites = sorted({site for state, *_ in readers for site in state.request.top_k_sites})
        max_k = max(state.request.top_k for state, *_ in readers)
        captured, unread = slice(0, 1 + int(step.capture.max())), step.capture[step.excluded]
        top = {site: self.strongest(self.dictionaries[site], captured, max_k, unread) for site in sites}
        parts = [
            [values[indices[unreported:], : state.request.top_k].tobytes() for values in top[site]]
            for state, indices, unreported in readers
            for site in state.request.top_k_sites
        ]
        return b"".join(latents for latents, _ in parts), b"".join(values for _, values in parts)

    def strongest(self, dictionary: Readable, captured: slice, k: int, unread: Ints) -> tuple[Array, Array]:
        """(latents, values) [n, k] of the captured tokens; a routed dictionary reads several sites at once.

        Index 0, at which tokens are written that nobody captures, has none; nor have the indices `unread`, of excluded
        tokens, nor a token that is not finite, of which screening would take every latent for a candidate.
        """
        residuals = [self.banks[site].before[captured] for site in dictionary.sites]
        x = residuals[0] if len(residuals) == 1 else torch.stack(residuals, -2)
        known = x.isfinite().flatten(1).all(1)
        known[0] = False
        if len(unread):
            known[to_device(unread, known.device)] = False
        latents, values = np.zeros((len(x), k), np.int32), np.zeros((len(x), k), np.float32)
        if known.any():
            index = to_host(known)
            latents[index], values[index] = top_k_latents(dictionary.screen, x[known], k)
        return latents, values

    def captures(self, step: Step) -> list[Capture]:
        """Residuals of the requests that capture them."""
        captures = []
        for state, indices, _ in capturing_requests(step):
            for site, bank in enumerate(self.banks if state.request.capture else ()):
                index = torch.from_numpy(indices[indices > 0])
                before, after = (to_host(t[index]).tobytes() for t in (bank.before, bank.after))
                captures.append(Capture(state.handle, site, before, after))
        return captures

    def totals(self, step: Step) -> NDArray[np.float64]:
        """Totals of the pinned rows over the step [pinned rows, len(PINNED)].

        Without the tokens at position 0, excluded ones, and those whose residuals are not finite.
        """
        if not self.pinned:
            return np.zeros((0, len(PINNED)))
        counted = np.ones(step.tokens, bool)
        counted[step.offsets[step.starts == 0]] = False
        counted[step.excluded] = False
        parts = []
        for site, places in self.pinned.items():
            f = to_host(self.banks[site].activations[: step.tokens])[:, places][counted]
            # A sum that is once infinite stays so.
            f = f[np.isfinite(f).all(1)]
            columns = {
                "active_tokens": (f > 0).sum(0),
                "tokens": np.full(len(places), len(f)),
                "sum": f.sum(0),
                "maximum": f.max(0, initial=0),
            }
            parts.append(np.stack([columns[name] for name in PINNED], 1))
        return np.concatenate(parts)


def activation_indices(step: Step, places_per_bank: int) -> tuple[tuple[ColumnIndex, ...], int]:
    """Indices and size of the `activations` column: per request, [tokens reported, rows watched over its sites]."""
    parts: IndexParts = {}
    size = 0
    firsts, ends = step.offsets + step.unreported(), step.offsets + step.lengths
    for state, first, end in zip(step.requests, firsts, ends, strict=True):
        if state is None:
            continue
        tokens = np.arange(first, end)
        sites = [site for site in state.request.stages[0] if site.watch]
        width, before = sum(len(site.watch) for site in sites), 0
        for site in sites:
            # Outside the list below: looking up places for each row would cost a step of 64 requests with 64 rows tens
            # of milliseconds.
            places, watched = state.places(site), len(site.watch)
            watched_places = np.array([places[row] for row in site.watch], np.int64)
            target = size + np.arange(len(tokens))[:, None] * width + before + np.arange(watched)
            index = tokens[:, None] * places_per_bank + watched_places
            parts.setdefault((site.site, 0), []).append((index.reshape(-1), target.reshape(-1)))
            before += watched
        size += len(tokens) * width
    return joined(parts), size


def flag_indices(step: Step, places_per_bank: int) -> tuple[tuple[ColumnIndex, ...], int]:
    """Indices and size of the `flags` column: per request, [tokens, edits + gates].

    The edits of each site are followed by its blend; the gates come behind all edits.
    """
    parts: IndexParts = {}
    size = 0
    for state, first, length in zip(step.requests, step.offsets, step.lengths, strict=True):
        if state is None:
            continue
        gates = state.request.gates()
        stages = enumerate(state.request.stages)
        edited = [(stage, site, edited_places(state, site)) for stage, sites in stages for site in sites]
        width, before = sum(len(places) for _, _, places in edited) + len(gates), 0
        tokens = np.arange(length)[:, None]
        for stage, site, places in edited:
            index = (first + tokens) * places_per_bank + places
            target = size + tokens * width + before + np.arange(len(places))
            parts.setdefault((site.site, stage), []).append((index.reshape(-1), target.reshape(-1)))
            before += len(places)
        # No gate is evaluated at BOS and at excluded positions.
        evaluated = np.flatnonzero(~step.uncounted[first : first + length])
        for number, (stage, _) in enumerate(gates, before):
            parts.setdefault((GATES, stage), []).append((first + evaluated, size + evaluated * width + number))
        size += length * width
    return joined(parts), int(size)


def edited_places(state: RequestState, site: wire.Site) -> Ints:
    """Row places of a site's edits, then of its blend."""
    rows = [edit.row for edit in site.edits] + ([site.blend.row] if site.blend else [])
    places = state.places(site)
    return np.array([places[row] for row in rows], np.int64)


def statistic_indices(step: Step) -> StatisticIndices:
    """Indices of the `statistics` column: each gate with a sequence condition at its request's last counted token."""
    records = []
    for index, state in step.batch.in_sequence:
        first, length = int(step.offsets[index]), int(step.lengths[index])
        counted = np.flatnonzero(~step.uncounted[first : first + length])
        last = first + int(counted[-1]) if len(counted) else first
        gates = [stage for stage, gate in state.request.gates() if gate.sequence]
        records += [(stage, last, state.lease.slot, not len(counted)) for stage in gates]
    stages, tokens, slots, unchanged = np.array(records, np.int64).reshape(-1, 4).T
    return StatisticIndices(stages, tokens, slots, unchanged.nonzero()[0])


def joined(parts: IndexParts) -> tuple[ColumnIndex, ...]:
    """Concatenate the parts of each buffer."""
    pairs = {buffer: [np.concatenate(arrays) for arrays in zip(*pairs, strict=True)] for buffer, pairs in parts.items()}
    return tuple(ColumnIndex(*buffer, index, as_slice(target)) for buffer, (index, target) in pairs.items())


def as_slice(target: Array) -> Array | slice:
    """The same indices as a slice, which is quicker, where they are consecutive: the usual case of one site."""
    consecutive = len(target) > 0 and bool((np.diff(target) == 1).all())
    return slice(int(target[0]), int(target[-1]) + 1) if consecutive else target


def capturing_requests(step: Step) -> list[tuple[RequestState, Array, int]]:
    """The requests that read residuals, their tokens' indices in the capture buffers, and how many are not reported.

    Index 0: nobody captures the token. Behind the unreported ones, it was captured and reported before its request was
    preempted, and what is reported now is not read.
    """
    if not step.batch.captures:
        return []
    return [
        (state, step.capture[offset : offset + length], int(unreported))
        for state, offset, length, unreported in zip(
            step.requests, step.offsets, step.lengths, step.unreported(), strict=True
        )
        if state and state.request.reads
    ]


def packed(values: object, dtype: str) -> bytes:
    """Encode values as a little-endian column."""
    return np.asarray(values, dtype).tobytes()


def to_host(tensor: Tensor) -> Array:
    """Copy a tensor's values to the host; on a CPU, view them."""
    array: Array = tensor.cpu().numpy()
    return array
