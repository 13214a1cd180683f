"""Reads the banks' buffers after a forward pass into the step's telemetry frame, without waiting for the pass.

`Reader.read` lets the device gather the values and copy them to the host, behind the pass and before the next one;
`PendingFrame.frame` builds the frame when they are there.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rudder.sae_models.sae import SAE
from rudder.sae_models.sparse.screening import ScreeningDictionary, top_k_latents
from rudder.server.engine.telemetry.frame import PINNED, REJECTED, Array, Capture, Frame
from rudder.server.engine.worker import transfer
from rudder.server.engine.worker.bank import SiteBank
from rudder.server.engine.worker.columns import (
    GATES,
    SLOT_STATES,
    TOKEN_STATES,
    Column,
    activation_column,
    edits_per_token,
    flag_column,
    flags_per_token,
    statistic_column,
)
from rudder.server.engine.worker.driver import RequestState, Step
from rudder.server.engine.worker.transfer import Event, HostCopy, to_device

# A column of a frame, and a number where it is read in several parts.
Name = tuple[str, int]


@dataclass(frozen=True)
class Gather:
    """A column of one composition of the batch, and where its values are: (flat buffer, indices into it)."""

    column: Column
    sources: tuple[tuple[Tensor, Tensor], ...]
    # Whether the values [n] are the column as it is.
    complete: bool

    def values(self) -> Tensor:
        """Gather the values [n] on the device."""
        (buffer, index), *others = self.sources
        if not others:
            return buffer.index_select(0, index)
        values = buffer.new_empty(len(self.column.index))
        parts = values.split([count for _, count in self.column.buffers])
        for (buffer, index), part in zip(self.sources, parts, strict=True):
            torch.index_select(buffer, 0, index, out=part)
        return values

    def filled(self, values: Array) -> Array:
        """Return the column of these values, 0 where there are none."""
        if self.complete:
            return values
        column = np.zeros(self.column.size, values.dtype)
        column[self.column.target] = values
        return column


@dataclass(frozen=True)
class Readable:
    """A dictionary that is read whole, and the numbers of the sites that it reads."""

    screen: ScreeningDictionary | SAE
    sites: list[int]


@dataclass(frozen=True)
class TopRead:
    """What the top-k latents of a step are computed from.

    readers: (request, its tokens' indices among the captured ones, how many of them are not reported). residuals: of
    the captured tokens, [n, d] float32 by site number, there when `event` has occurred. unread: indices of captured
    tokens that are excluded.
    """

    readers: Sequence[tuple[RequestState, Array, int]]
    dictionaries: Mapping[int, Readable]
    residuals: Mapping[int, Tensor]
    unread: Array
    event: Event
    stream: "torch.cuda.Stream | None"

    def columns(self) -> tuple[bytes, bytes]:
        """Compute the columns (latents, values), each dictionary once for all requests of the step.

        The number of candidates is not known before, so the host waits: on a stream of its own, not for the next step.
        """
        max_k = max(state.request.top_k for state, *_ in self.readers)
        self.event.synchronize()
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            top = {
                site: strongest(readable.screen, [self.residuals[s] for s in readable.sites], max_k, self.unread)
                for site, readable in self.dictionaries.items()
            }
        parts = [
            [values[indices[unreported:], : state.request.top_k].tobytes() for values in top[site]]
            for state, indices, unreported in self.readers
            for site in state.request.top_k_sites
        ]
        return b"".join(latents for latents, _ in parts), b"".join(values for _, values in parts)


@dataclass(frozen=True)
class PendingFrame:
    """The frame of a step whose values are on their way to the host. The banks and the batch may go on meanwhile.

    captures: (handle, site number) of captured residuals. pinned: numbers of the sites with pinned rows.
    """

    released: bytes
    step: Step = field(default_factory=Step)
    continues: bool = False
    gathers: Mapping[str, Gather] = field(default_factory=dict)
    values: HostCopy[Name] = field(default_factory=lambda: HostCopy({}))
    captures: Sequence[tuple[int, int]] = ()
    pinned: Sequence[int] = ()
    top: TopRead | None = None

    def frame(self, sequence: int) -> Frame:
        """Wait for the values and build the frame."""
        step, arrays = self.step, self.values.arrays()
        if not step.tokens:
            return Frame(sequence, released=self.released)
        columns = {name: self.gathers[name].filled(arrays[name, 0]) for name in self.gathers}
        empty = np.zeros(0)
        top_latents, top_values = self.top.columns() if self.top else (b"", b"")
        return Frame(
            sequence,
            self.continues,
            handles=b"" if self.continues else packed(step.batch.handles, "<i8"),
            starts=b"" if self.continues else packed(step.starts, "<i4"),
            lengths=b"" if self.continues else packed(step.lengths, "<i4"),
            flags=packed(columns.get("flags", empty), "u1"),
            statistics=packed(columns.get("statistics", empty), "<f8"),
            activations=packed(columns.get("activations", empty), "<f4"),
            top_values=top_values,
            top_latents=top_latents,
            captures=tuple(
                Capture(handle, site, arrays["before", number].tobytes(), arrays["after", number].tobytes())
                for number, (handle, site) in enumerate(self.captures)
            ),
            pinned=pinned_totals(step, [arrays["pinned", site] for site in self.pinned]).tobytes(),
            released=self.released,
            rejected=rejected_records(step, columns.get("rejected", empty)).tobytes(),
        )


class Reader:
    """Reads the buffers of all sites."""

    def __init__(self, banks: Sequence[SiteBank]) -> None:
        self.banks, self.device = banks, banks[0].token.device
        self.dictionaries: dict[int, Readable] = {}
        # Row places by site number, on the device.
        self.pinned: dict[int, Tensor] = {}
        self.key: tuple[object, ...] = ()
        self.gathers: dict[str, Gather] = {}
        # The step of the last frame, and how many decode steps it had then.
        self.last_frame: tuple[Step, int] = Step(), -1
        self.stream = torch.cuda.Stream(self.device, priority=-1) if self.device.type == "cuda" else None

    def pin(self, places: Mapping[int, Sequence[int]]) -> None:
        """Total these row places, by site number, over all requests."""
        self.pinned = {site: to_device(np.array(numbers, np.int64), self.device) for site, numbers in places.items()}

    def read(self, step: Step, released: Sequence[int]) -> PendingFrame:
        """Begin to read a step whose forward pass runs; a step without tokens only releases."""
        if not step.tokens:
            return PendingFrame(packed(released, "<i8"))
        self.blank_excluded(step)
        gathers = self.gathers_of(step)
        # Compared with the last frame, not with the last step: steps before the channel opens have no frame.
        last_step, decode_steps = self.last_frame
        continues = step is last_step and step.decode_steps == decode_steps + 1
        self.last_frame = step, step.decode_steps
        readers = capturing_requests(step)
        values: dict[Name, Tensor] = {(name, 0): gather.values() for name, gather in gathers.items()}
        values |= {("pinned", site): self.pinned_activations(site, step) for site in self.pinned}
        captures = self.read_captures(readers, values)
        return PendingFrame(
            packed(released, "<i8"), step.frozen(), continues, gathers, HostCopy(values), captures, tuple(self.pinned),
            self.read_top(step, readers),
        )  # fmt: skip

    def blank_excluded(self, step: Step) -> None:
        """Set the activations of excluded tokens to 0, in a buffer that nothing but this reader reads."""
        if len(step.excluded):
            tokens = to_device(step.excluded, self.device)
            for bank in self.banks:
                bank.activations.index_fill_(0, tokens, 0.0)

    def gathers_of(self, step: Step) -> dict[str, Gather]:
        """The columns that have values in this composition, by name, computed anew when it changed."""
        # A step that decodes has one token of each request, all of them reported.
        parts = () if step.decodes and step.all_counted else (step.lengths, step.unreported(), step.uncounted)
        key = (step.batch, *(part.tobytes() for part in parts))
        if key != self.key:
            (max_tokens, places), slots = self.banks[0].activations.shape, self.banks[0].sequences.state.shape[1]
            flags = flag_column(step, places, max_tokens)
            columns = {
                "activations": activation_column(step, places),
                "flags": flags,
                "rejected": flags.of_sites(),
                "statistics": statistic_column(step, max_tokens, slots),
            }
            self.gathers = {name: self.gather(name, column) for name, column in columns.items() if column.size}
            self.key = key
        return self.gathers

    def gather(self, name: str, column: Column) -> Gather:
        """Copy a column's indices to the device."""
        indices = to_device(column.index, self.device).split([count for _, count in column.buffers])
        buffers = [self.buffer(name, number).view(-1) for number, _ in column.buffers]
        complete = np.array_equal(column.target, np.arange(column.size))
        return Gather(column, tuple(zip(buffers, indices, strict=True)), complete)

    def buffer(self, name: str, number: int) -> Tensor:
        """Return a buffer by its number."""
        sequences = self.banks[0].sequences
        shared = {GATES: sequences.is_open, TOKEN_STATES: sequences.token_state, SLOT_STATES: sequences.state}
        if number in shared:
            return shared[number]
        bank = self.banks[number]
        buffer: Tensor = {"activations": bank.activations, "flags": bank.edited, "rejected": bank.rejected}[name]
        return buffer

    def pinned_activations(self, site: int, step: Step) -> Tensor:
        """Gather the activations of a site's pinned rows [tokens, pinned rows]."""
        return self.banks[site].activations[: step.tokens].index_select(1, self.pinned[site])

    def read_captures(
        self, readers: Sequence[tuple[RequestState, Array, int]], values: dict[Name, Tensor]
    ) -> list[tuple[int, int]]:
        """Gather the residuals of the requests that capture them; return their (handle, site number)."""
        captures: list[tuple[int, int]] = []
        for state, indices, _ in readers:
            if not state.request.capture:
                continue
            index = to_device(indices[indices > 0], self.device)
            for site, bank in enumerate(self.banks):
                values["before", len(captures)] = bank.before.index_select(0, index)
                values["after", len(captures)] = bank.after.index_select(0, index)
                captures.append((state.handle, site))
        return captures

    def read_top(self, step: Step, readers: Sequence[tuple[RequestState, Array, int]]) -> TopRead | None:
        """Copy, on the device, the residuals whose top-k latents are to be computed."""
        sites = sorted({site for state, *_ in readers for site in state.request.top_k_sites})
        if not sites:
            return None
        captured = slice(0, 1 + int(step.capture.max()))
        dictionaries = {site: self.dictionaries[site] for site in sites}
        residuals = {
            site: self.banks[site].before[captured].clone()
            for site in {site for readable in dictionaries.values() for site in readable.sites}
        }
        event = transfer.record_event(self.device)
        return TopRead(readers, dictionaries, residuals, step.capture[step.excluded], event, self.stream)


def strongest(
    screen: ScreeningDictionary | SAE, residuals: Sequence[Tensor], k: int, unread: Array
) -> tuple[Array, Array]:
    """(latents, values) [n, k] of the captured tokens; a routed dictionary reads the residuals [n, d] of several sites.

    Index 0, at which tokens are written that nobody captures, has none; nor have the indices `unread`, of excluded
    tokens, nor a token that is not finite, of which screening would take every latent for a candidate.
    """
    x = residuals[0] if len(residuals) == 1 else torch.stack(list(residuals), -2)
    known = x.isfinite().flatten(1).all(1).cpu().numpy()
    known[[0, *unread.tolist()]] = False
    latents, values = np.zeros((len(x), k), np.int32), np.zeros((len(x), k), np.float32)
    if known.any():
        index = np.flatnonzero(known)
        latents[index], values[index] = top_k_latents(screen, x[to_device(index, x.device)], k)
    return latents, values


def rejected_records(step: Step, flags: Array) -> Array:
    """The column of rejected edits, int64 [edits rejected, len(REJECTED)], from their flags in the column `flags`."""
    records = [np.zeros((0, len(REJECTED)), np.int64)]
    if not flags.any():
        return records[0]
    first = 0
    for state, start, length in zip(step.requests, step.starts, step.lengths, strict=True):
        if state:
            end = first + length * flags_per_token(state)
            token, edit = flags[first:end].reshape(length, -1)[:, : edits_per_token(state)].nonzero()
            columns = {"handle": np.full_like(token, state.handle), "position": start + token, "edit": edit}
            records.append(np.stack([columns[name] for name in REJECTED], 1))
            first = end
    return np.concatenate(records).astype("<i8")


def pinned_totals(step: Step, activations: Sequence[Array]) -> Array:
    """Totals [pinned rows, len(PINNED)] of the pinned rows over the step, from each site's [tokens, pinned rows].

    Without the tokens at position 0, excluded ones, and those whose residuals are not finite.
    """
    counted = np.ones(step.tokens, bool)
    counted[step.offsets[step.starts == 0]] = False
    counted[step.excluded] = False
    parts = [np.zeros((0, len(PINNED)))]
    for values in activations:
        # A sum that is once infinite stays so.
        f = values[counted & np.isfinite(values).all(1)]
        columns: dict[str, Any] = {
            "active_tokens": (f > 0).sum(0),
            "tokens": np.full(f.shape[1], len(f)),
            "sum": f.sum(0),
            "maximum": f.max(0, initial=0),
        }
        parts.append(np.stack([columns[name] for name in PINNED], 1))
    return np.concatenate(parts)


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
