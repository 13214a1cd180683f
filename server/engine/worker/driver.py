"""Drives the banks from the host: loads rows and entries of new requests, and writes token metadata before each step.

Works once per step, not per layer, and vectorised over the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from sys import maxsize

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rudder.sae_models.operations import TOKEN
from rudder.sae_models.sae import SAE, Candidates, Rows
from rudder.server.engine.ledger import Lease, Ledger
from rudder.server.engine.worker.bank import SiteBank
from rudder.server.engine.worker.transfer import to_device
from rudder.server.program import wire
from rudder.server.program.layout import Layout
from rudder.server.program.parameters import edit_parameters, entry_parameters

Ints = NDArray[np.int64]
START, COUNT, CAPTURE = map(TOKEN.index, ("start", "count", "capture"))


class Captured(IntEnum):
    """Tokens of a request whose residuals are captured."""

    NONE = 0
    GENERATED = 1
    ALL = 2


@dataclass
class RequestState:
    """A request with a payload, from its first step to its end.

    uncounted: positions of tokens that have entry 0: BOS, and excluded ones. start, length, offset: first position,
    tokens and batch index of its last step; saved_states: sequence states of that step's tokens, while the request is
    left out of later steps. The last four only for sequence conditions. capture_end: position after the last token
    whose residuals were captured, up to the last change of the batch.
    """

    handle: int
    request: wire.Request
    lease: Lease
    start: int = 0
    length: int = 0
    offset: int = 0
    saved_states: tuple[Tensor, Tensor, Tensor] | None = None
    capture_end: int = 0

    def __post_init__(self) -> None:
        gates = [site.gate for stage in self.request.stages for site in stage if site.gate]
        self.gated, self.in_sequence = bool(gates), any(gate.sequence for gate in gates)
        self.uncounted = np.array(self.request.uncounted, np.int64)

    def places(self, site: wire.Site) -> list[int]:
        """Row places of a site's rows."""
        return [self.lease.places[site.site, row] for row in site.rows]

    def uncounted_before(self, start: int, length: int) -> Ints:
        """Count the uncounted positions before each of start, ..., start + length."""
        return np.searchsorted(self.uncounted, np.arange(start, start + length + 1))

    def counted(self, start: int, length: int) -> Ints | range:
        """Return which of start, ..., start + length - 1 are counted, from 0."""
        if not len(self.uncounted) or start > self.uncounted[-1]:
            return range(length)
        return np.flatnonzero(np.diff(self.uncounted_before(start, length)) == 0)


class Batch:
    """The requests of a step in batch order, None for those without a payload, and what of them does not change.

    Steady decoding uses one batch for many steps.
    """

    def __init__(self, request_ids: Sequence[str], requests: Sequence[RequestState | None]) -> None:
        self.request_ids, self.requests = list(request_ids), list(requests)
        self.handles = np.array([r.handle if r else 0 for r in requests], np.int64)
        self.slot = np.array([r.lease.slot if r else 0 for r in requests], np.int64)
        self.prompt = np.array([r.request.prompt_tokens if r else 0 for r in requests], np.int64)
        self.uncounted = np.array([len(r.uncounted) if r else 0 for r in requests], np.int64)
        self.last_uncounted = np.array([r.uncounted[-1] if r and len(r.uncounted) else -1 for r in requests], np.int64)
        self.reports_prompt = np.array([bool(r and r.request.watch_prompt) for r in requests])
        self.captured = np.array([captured_tokens(r) for r in requests], np.int64)
        self.captures = bool(self.captured.any())
        self.capture_end = np.array([r.capture_end if r else 0 for r in requests], np.int64)
        self.edits = bool(self.slot.any())
        self.gated = any(r.gated for r in requests if r)
        self.in_sequence = [(index, r) for index, r in enumerate(requests) if r and r.in_sequence]

    def save_captures(self) -> None:
        """Note in the requests up to where their residuals have been captured, before another batch runs."""
        for request, end in zip(self.requests if self.captures else (), self.capture_end.tolist(), strict=False):
            if request:
                request.capture_end = end


@dataclass
class Step:
    """One step: its batch, and the first position and number of tokens of each request [R].

    capture_begin [R]: position of the first token whose residuals have not been captured before: what a preempted
    request computes again was reported. capture [tokens]: each token's index in the capture buffers, 0 for none.
    decode_steps: steps since this one in which the batch decoded one more token of each request. counts: the COUNT
    column on the device, [tokens]. uncounted [tokens]: BOS and excluded tokens, and uncounted_before [tokens]: how many
    of them the request has up to each token. excluded: batch indices of excluded tokens. next_uncounted: decode steps
    until a request decodes such a token, 0 where one does so in this step.
    """

    batch: Batch = field(default_factory=lambda: Batch((), ()))
    starts: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    lengths: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    capture: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    decode_steps: int = 0
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))

    def __post_init__(self) -> None:
        self.offsets = np.cumsum(self.lengths) - self.lengths
        self.capture_begin = self.batch.capture_end.copy()
        self.computes_again = bool((self.starts < self.capture_begin).any())
        self.tokens = int(self.lengths.sum())
        # One token of each request, all of them generated.
        self.decodes = bool((self.lengths == 1).all() and (self.starts >= self.batch.prompt).all())
        self.mark_uncounted()

    def mark_uncounted(self) -> None:
        """Find the tokens that have entry 0. Only requests that still have such tokens to run are looked at."""
        batch, excluded = self.batch, [np.zeros(0, np.int64)]
        self.uncounted, self.next_uncounted = np.zeros(self.tokens, bool), maxsize
        self.uncounted_before = np.repeat(batch.uncounted, self.lengths)
        for index in np.flatnonzero(self.starts <= batch.last_uncounted).tolist():
            state, start, offset = batch.requests[index], int(self.starts[index]), int(self.offsets[index])
            if state is None:
                continue
            before = state.uncounted_before(start, int(self.lengths[index]))
            tokens = slice(offset, offset + len(before) - 1)
            self.uncounted_before[tokens] = before[1:]
            self.uncounted[tokens] = np.diff(before) > 0
            read_as_0 = self.uncounted[tokens].copy()
            if start == 0 and state.request.excluded[:1] != (0,):
                # BOS, which is reported.
                read_as_0[0] = False
            excluded.append(offset + np.flatnonzero(read_as_0))
            self.next_uncounted = min(self.next_uncounted, int(state.uncounted[before[0]]) - start)
        self.excluded = np.concatenate(excluded)
        self.all_counted = not self.uncounted.any()

    def frozen(self) -> "Step":
        """Return the step as it is now. In steady decoding the driver carries it on."""
        # `copy.copy` takes as long as a gather.
        step = object.__new__(Step)
        vars(step).update(vars(self))
        return step

    @property
    def requests(self) -> list[RequestState | None]:
        """The requests in batch order; None for one without a payload."""
        return self.batch.requests

    def is_next_decode_step(self, starts: Ints, lengths: Ints) -> bool:
        """Whether these are the next tokens of its requests: then only their counts change, by one."""
        if self.computes_again or not self.decodes:
            # Of tokens that were captured before, the next ones may not have been.
            return False
        if self.decode_steps + 1 >= self.next_uncounted:
            # The entry of a token changes.
            return False
        return int(lengths.sum()) == len(lengths) and np.array_equal(starts, self.starts + 1)

    def unreported(self) -> Ints:
        """Count, for each request, the prompt tokens at the front of its part that are not reported."""
        prompt = np.clip(self.batch.prompt - self.starts, 0, self.lengths)
        return np.where(self.batch.reports_prompt, 0, prompt)


class Driver:
    """Keeps the banks of all sites in step with the requests in flight."""

    def __init__(self, layout: Layout, banks: Sequence[SiteBank]) -> None:
        self.layout, self.banks = layout, banks
        self.sequences, self.token = banks[0].sequences, banks[0].token
        self.ledger = Ledger(layout)
        self.saes: dict[str, SAE] = {}
        self.requests: dict[str, RequestState] = {}
        self.step = Step()
        # As last written to the device: tokens with metadata, and the longest request with a sequence condition.
        self.written_tokens = self.max_length = 0

    def load_sae(self, name: str, sae: SAE) -> None:
        """Make a bundle's latents available as rows."""
        self.saes[name] = sae

    def admit(self, request_id: str, handle: int, request: wire.Request) -> None:
        """Load the rows and entries of a new request.

        The V2 runner announces a preempted request a second time: it keeps its lease.
        """
        if request_id in self.requests:
            return
        lease = self.ledger.acquire(handle, request)
        state = self.requests[request_id] = RequestState(handle, request, lease)
        self.fill(lease)
        self.set_extents(lease)
        if lease.slot:
            self.write_entries(state)

    def set_extents(self, lease: Lease) -> None:
        """Write the extents of the row places in use to the banks of a lease's sites."""
        for site in {site for site, _ in lease.places}:
            self.banks[site].extent.fill_(self.ledger.extent(site))

    def fill(self, lease: Lease) -> None:
        """Load a lease's fresh row places, those of one bundle at one site together."""
        groups: dict[tuple[int, str], list[wire.Row]] = {}
        for site, row in lease.unfilled:
            groups.setdefault((site, row.bundle), []).append(row)
        for (site, bundle), rows in groups.items():
            numbers = np.array([(lease.places[site, row], row.latent) for row in rows], np.int64)
            places, latents = to_device(numbers.T.copy(), self.token.device)
            loaded = (
                self.saes[bundle].rows(latents) if bundle else raw_rows(rows, self.banks[site].width, self.token.device)
            )
            self.banks[site].fill(places, loaded.rows if isinstance(loaded, Candidates) else loaded, bundle, latents)

    def write_entries(self, state: RequestState) -> None:
        """Write the entries of a request's slot, for prompt and generated tokens, at every site that it uses."""
        device = self.token.device
        for stage, sites in enumerate(state.request.stages):
            for site in sites:
                bank, places = self.banks[site.site], state.places(site)
                for entries, prompt in entries_of(state.lease.slot, site):
                    edits = edit_parameters(site, places, self.layout.rows, prompt)
                    bank.edits[stage, entries].copy_(to_device(edits, device))
                    bank.entries[stage, entries].copy_(to_device(entry_parameters(site, places, prompt), device))

    def finish(self, request_id: str) -> None:
        """Release all that a finished or aborted request holds."""
        state = self.requests.pop(request_id, None)
        if state is None:
            return
        self.ledger.release(state.handle)
        self.set_extents(state.lease)
        slot = state.lease.slot
        for stage, sites in enumerate(state.request.stages if slot else ()):
            for site in sites:
                bank = self.banks[site.site]
                # Back to the identity, entry 0: the slot's next request writes entries only at the sites that it uses.
                bank.edits[stage, 2 * slot : 2 * slot + 2].copy_(bank.edits[stage, :1])
                bank.entries[stage, 2 * slot : 2 * slot + 2].copy_(bank.entries[stage, :1])

    def write_token_metadata(self, request_ids: Sequence[str], starts: Ints, lengths: Ints) -> None:
        """Write the metadata of a step's tokens before its forward pass; all three arguments are in batch order."""
        last, batch = self.step, self.step.batch
        if batch.gated:
            # A token whose program has no gate must not read that of the token which was here before it.
            self.sequences.is_open.fill_(True)
        if batch.request_ids != list(request_ids):
            batch.save_captures()
            batch = Batch(request_ids, [self.requests.get(request_id) for request_id in request_ids])
        self.update_sequence_state(batch, starts)
        if batch is last.batch and last.is_next_decode_step(starts, lengths):
            # Steady decoding: every other column is already as it should be.
            last.starts = starts
            last.decode_steps += 1
            last.counts.add_(1)
        else:
            self.step = self.write_tokens(Step(batch, starts, lengths))
        if batch.captures:
            np.maximum(batch.capture_end, starts + lengths, out=batch.capture_end)
        for index, state in batch.in_sequence:
            state.start, state.length = int(starts[index]), int(lengths[index])
            state.offset = int(self.step.offsets[index])
        self.set_max_length([state.length for _, state in batch.in_sequence])

    def set_max_length(self, lengths: list[int]) -> None:
        """Write the length of the longest request with a sequence condition, where it changed."""
        max_length = max(lengths, default=0)
        if max_length != self.max_length:
            self.sequences.max_length.fill_(max_length)
            self.max_length = max_length

    def write_tokens(self, step: Step) -> Step:
        """Write the TOKEN columns of a step, and the identity over what the last step wrote behind its tokens."""
        columns = token_columns(step)
        tokens = max(step.tokens, self.written_tokens)
        padded = np.zeros((len(TOKEN), tokens), np.int32)
        padded[:, : step.tokens] = columns
        # A padding token is a request of its own: the scan must not run on from the batch into it.
        padded[START, step.tokens :] = np.arange(step.tokens, tokens)
        self.token[:, :tokens].copy_(to_device(padded, self.token.device))
        self.written_tokens = step.tokens
        step.capture, step.counts = columns[CAPTURE], self.token[COUNT, : step.tokens]
        return step

    def update_sequence_state(self, batch: Batch, starts: Ints) -> None:
        """Bring the slots' sequence state up to the tokens before this step.

        The graph leaves a state for every token of a step, not one per slot: only now, when the next step says where it
        starts, is it known which of those tokens count. Rejected draft tokens do not, a preempted request starts at 0
        again, and one that the scheduler leaves out of this step must have its tokens' states saved before they are
        overwritten.
        """
        handles = {state.handle for _, state in batch.in_sequence}
        for _, state in self.step.batch.in_sequence:
            if state.handle not in handles and self.in_flight(state) and state.saved_states is None:
                states, alarms, scores = self.last_step_states(state)
                state.saved_states = states.clone(), alarms.clone(), scores.clone()
        for index, state in batch.in_sequence:
            self.restore_state(state, int(starts[index]))

    def in_flight(self, state: RequestState) -> bool:
        """Whether the request still holds its slot."""
        return state.handle in self.ledger.leases

    def last_step_states(self, state: RequestState) -> tuple[Tensor, Tensor, Tensor]:
        """Return states, alarms and scores [stages, length] of the request's tokens, if it was in the last step."""
        s, tokens = self.sequences, slice(state.offset, state.offset + state.length)
        return s.token_state[:, tokens], s.token_alarms[:, tokens], s.token_score[:, tokens]

    def restore_state(self, state: RequestState, start: int) -> None:
        """Write one request's sequence state as it was before position `start` into its slot."""
        saved_states, state.saved_states = state.saved_states, None
        count = state.request.counted_before(start)
        if not count:
            self.reset(state.lease.slot)
            return
        accepted = start - state.start
        if not 0 < accepted <= state.length:
            raise RuntimeError(f"request {state.handle}: its sequence state does not reach its next token")
        counted = state.counted(state.start, accepted)
        if not len(counted):
            # The graph writes no state at tokens of entry 0: the slot's is still that before them.
            return
        states, alarms, scores = saved_states or self.last_step_states(state)
        s, slot = self.sequences, state.lease.slot
        # Of more tokens than the ring holds, only the last ones: an index that occurs twice has no defined winner.
        scored = counted[-self.layout.window :]
        first, last = int(scored[0]), int(scored[-1])
        s.state[:, slot] = states[:, last]
        s.latched[:, slot] = alarms[:, last]
        counts = torch.arange(count - len(scored) + 1, count + 1, device=s.ring.device)
        consecutive = last - first < len(scored)
        index = slice(first, last + 1) if consecutive else to_device(np.asarray(scored), s.ring.device)
        s.ring[:, slot, counts.remainder(self.layout.window)] = scores[:, index]

    def reset(self, slot: int) -> None:
        """Clear a slot's sequence state."""
        self.sequences.state[:, slot] = 0.0
        self.sequences.latched[:, slot] = 0
        self.sequences.ring[:, slot] = 0.0


def token_columns(step: Step) -> Ints:
    """Compute the TOKEN columns [len(TOKEN), tokens] of a step."""
    batch, lengths = step.batch, step.lengths
    per_request = batch.slot, batch.prompt, batch.captured, step.capture_begin, step.starts, step.offsets
    slot, prompt, captured, capture_begin, first, start = np.repeat(np.stack(per_request), lengths, axis=1)
    position = np.arange(step.tokens) - start + first
    generated = position >= prompt
    entry = np.where(step.uncounted, 0, 2 * slot + generated)
    wanted = (captured == Captured.ALL) | ((captured == Captured.GENERATED) & generated)
    is_captured = wanted & (position >= capture_begin)
    capture = np.where(is_captured, np.cumsum(is_captured), 0)
    count = position + 1 - step.uncounted_before
    columns = {"entry": entry, "slot": slot, "start": start, "count": count, "capture": capture}
    return np.stack([columns[name] for name in TOKEN])


def captured_tokens(state: RequestState | None) -> Captured:
    """Tokens of a request whose residuals are read after the step, for its captures or its top-k latents."""
    if state is None or not state.request.reads:
        return Captured.NONE
    return Captured.ALL if state.request.watch_prompt or state.request.capture else Captured.GENERATED


def entries_of(slot: int, site: wire.Site) -> tuple[tuple[slice, bool], ...]:
    """Return a slot's (entries, whether of prompt tokens); both in one slice where the program edits them alike."""
    if not site.phases_differ():
        return ((slice(2 * slot, 2 * slot + 2), True),)
    return (slice(2 * slot, 2 * slot + 1), True), (slice(2 * slot + 1, 2 * slot + 2), False)


def raw_rows(rows: Sequence[wire.Row], width: int, device: torch.device) -> Rows:
    """Return rows that carry their own vectors."""
    encoder = np.stack([raw_vector(row.encoder, width) for row in rows])
    decoder = np.stack([raw_vector(row.decoder, width) for row in rows])
    bias, threshold = np.array([(row.bias, row.threshold) for row in rows], np.float32).T
    return Rows(*(to_device(values, device) for values in (encoder, bias, threshold, decoder)))


def raw_vector(data: bytes, width: int) -> NDArray[np.float32]:
    """Decode a little-endian float32 vector; zeros if there are no bytes."""
    return np.frombuffer(data, "<f4") if data else np.zeros(width, np.float32)
