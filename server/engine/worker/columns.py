"""Where the values of a frame's columns are in the banks' buffers, for one composition of the batch.

Frames are read for every token of every request, so nothing loops over requests in steady decoding: the indices are
computed once for a composition, and from then on a column is one gather from each buffer.
"""

from dataclasses import dataclass

import numpy as np

from rudder.server.engine.telemetry.frame import Array
from rudder.server.engine.worker.driver import Ints, RequestState, Step
from rudder.server.program import wire

# Buffers that all sites share, beside those of the sites by their numbers: open gates of tokens, and sequence states of
# tokens and of slots.
GATES, TOKEN_STATES, SLOT_STATES = -1, -2, -3
# By buffer: (indices into it, indices into the column), one pair of arrays per request.
IndexParts = dict[int, list[tuple[Array, Array]]]


@dataclass(frozen=True)
class Column:
    """Where a column's values are: at `index` [n] of flat buffers, to be written at `target` of the column's `size`.

    buffers: (buffer, how many of `index` are into it), in the order of `index`: those of the sites first.
    """

    buffers: tuple[tuple[int, int], ...]
    index: Ints
    target: Ints
    size: int

    def of_sites(self) -> "Column":
        """Return the column with the values of sites' buffers alone."""
        buffers = tuple((buffer, values) for buffer, values in self.buffers if buffer >= 0)
        count = sum(values for _, values in buffers)
        return Column(buffers, self.index[:count], self.target[:count], self.size)


def joined(parts: IndexParts, size: int) -> Column:
    """Concatenate the parts of all buffers."""
    order = sorted(parts, reverse=True)
    buffers = tuple((buffer, sum(len(index) for index, _ in parts[buffer])) for buffer in order)
    # The first, so that there is one.
    pairs = [(np.zeros(0, np.int64), np.zeros(0, np.int64)), *(pair for buffer in order for pair in parts[buffer])]
    index, target = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    return Column(buffers, index, target, int(size))


def activation_column(step: Step, places_per_bank: int) -> Column:
    """The `activations` column: per request, [tokens reported, rows watched over its sites]."""
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
            parts.setdefault(site.site, []).append((index.reshape(-1), target.reshape(-1)))
            before += watched
        size += len(tokens) * width
    return joined(parts, size)


def flag_column(step: Step, places_per_bank: int, max_tokens: int) -> Column:
    """The `flags` column: per request, [tokens, edits + gates].

    The edits of each site are followed by its blend; the gates come behind all edits.
    """
    parts: IndexParts = {}
    size = 0
    for state, first, length in zip(step.requests, step.offsets, step.lengths, strict=True):
        if state is None:
            continue
        gates = state.request.gates()
        stages = enumerate(state.request.stages)
        edited = [(stage, site.site, edited_places(state, site)) for stage, sites in stages for site in sites]
        width, before = flags_per_token(state), 0
        tokens = np.arange(length)[:, None]
        for stage, site, places in edited:
            index = (stage * max_tokens + first + tokens) * places_per_bank + places
            target = size + tokens * width + before + np.arange(len(places))
            parts.setdefault(site, []).append((index.reshape(-1), target.reshape(-1)))
            before += len(places)
        # No gate is evaluated at BOS and at excluded positions.
        evaluated = np.flatnonzero(~step.uncounted[first : first + length])
        for number, (stage, _) in enumerate(gates, before):
            index, target = stage * max_tokens + first + evaluated, size + evaluated * width + number
            parts.setdefault(GATES, []).append((index, target))
        size += length * width
    return joined(parts, size)


def statistic_column(step: Step, max_tokens: int, slots: int) -> Column:
    """The `statistics` column: the state of each gate with a sequence condition at its request's last counted token.

    Where the step counts none of its tokens, it is that of the slot.
    """
    parts: IndexParts = {}
    size = 0
    for number, state in step.batch.in_sequence:
        first, length = int(step.offsets[number]), int(step.lengths[number])
        counted = np.flatnonzero(~step.uncounted[first : first + length])
        gates = np.array([stage for stage, gate in state.request.gates() if gate.sequence])
        buffer = TOKEN_STATES if len(counted) else SLOT_STATES
        index = gates * max_tokens + first + counted[-1] if len(counted) else gates * slots + state.lease.slot
        parts.setdefault(buffer, []).append((index, size + np.arange(len(gates))))
        size += len(gates)
    return joined(parts, size)


def edited_places(state: RequestState, site: wire.Site) -> Ints:
    """Row places of a site's edits, then of its blend."""
    rows = [edit.row for edit in site.edits] + ([site.blend.row] if site.blend else [])
    places = state.places(site)
    return np.array([places[row] for row in rows], np.int64)


def edits_per_token(state: RequestState) -> int:
    """Edits and blends of a request."""
    return sum(len(site.edits) + bool(site.blend) for stage in state.request.stages for site in stage)


def flags_per_token(state: RequestState) -> int:
    """Flags of a token of a request: its edits and blends, then its gates."""
    return edits_per_token(state) + len(state.request.gates())
