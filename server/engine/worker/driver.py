"""The worker's half of the bank: fills rows and entries as requests come, tells every token its entry before a step,
and reads the step's telemetry after it. Per step, never per layer; vectorised over the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rudder.sae_models.sae import SAE, Candidates, Rows
from rudder.server.engine.ledger import Lease, Ledger
from rudder.server.engine.worker.bank import TOKEN, SiteBank, edit_parameters, entry_parameters
from rudder.server.program import wire
from rudder.server.program.layout import Layout

Ints = NDArray[np.int64]
COUNT = TOKEN.index("count")


@dataclass
class Live:
    """A request that the worker has seen. `start`, `length` and `offset` of its last step, and the states of that
    step's tokens when it sits out the next, are for sequences only.
    """

    handle: int
    request: wire.Request
    lease: Lease
    start: int = 0
    length: int = 0
    offset: int = 0
    kept: tuple[Tensor, Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        gates = [site.gate for stage in self.request.stages for site in stage if site.gate]
        self.gated, self.in_sequence = bool(gates), any(gate.sequence for gate in gates)

    def places(self, site: wire.Site) -> list[int]:
        """Row places of a site's rows."""
        return [self.lease.places[site.site, row] for row in site.rows]


class Batch:
    """The requests of a step in row order, and per-request columns; steady decoding reuses it step after step."""

    def __init__(self, request_ids: Sequence[str], live: Sequence[Live | None]) -> None:
        self.request_ids, self.live = list(request_ids), list(live)
        self.handles = np.array([r.handle if r else 0 for r in live], np.int64)
        self.slot = np.array([r.lease.slot if r else 0 for r in live], np.int64)
        self.prompt = np.array([r.request.prompt_tokens if r else 0 for r in live], np.int64)
        self.bos = np.array([bool(r and r.request.bos) for r in live])
        self.reported = np.array([bool(r and r.request.watch_prompt) for r in live])
        # 0: captures nothing, 1: generated tokens, 2: all tokens.
        self.reads = np.array([reading(r) for r in live], np.int64)
        self.reads_any = bool(self.reads.any())
        self.gated = any(r.gated for r in live if r)
        self.in_sequence = [(row, r) for row, r in enumerate(live) if r and r.in_sequence]


@dataclass
class Step:
    """One step: its batch, the first position and number of tokens of each request, and rows in the capture buffer."""

    batch: Batch = field(default_factory=lambda: Batch((), ()))
    starts: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    lengths: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    capture: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    # How often the same requests have gone on decoding since.
    gone_on: int = 0
    # On the device: how many tokens of its request came with each token.
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32))

    def __post_init__(self) -> None:
        self.offsets = np.cumsum(self.lengths) - self.lengths
        self.tokens = int(self.lengths.sum())
        # One token of each request, all of them generated.
        self.decodes = bool((self.lengths == 1).all() and (self.starts >= self.batch.prompt).all())

    @property
    def live(self) -> list[Live | None]:
        """The requests in row order; None for one without a payload."""
        return self.batch.live

    def goes_on(self, starts: Ints, lengths: Ints) -> bool:
        """Whether these are its requests' next tokens: all that changes is how many came before."""
        return self.decodes and int(lengths.sum()) == len(lengths) and np.array_equal(starts, self.starts + 1)

    def unreported(self) -> Ints:
        """Prompt tokens at the front of each request's part that it does not want reported."""
        cut = np.clip(self.batch.prompt - self.starts, 0, self.lengths)
        return np.where(self.batch.reported, 0, cut)


class Driver:
    """Keeps the banks of all sites in step with the requests in flight."""

    def __init__(self, layout: Layout, banks: Sequence[SiteBank]) -> None:
        self.layout, self.banks = layout, banks
        self.sequences, self.token = banks[0].sequences, banks[0].token
        self.ledger = Ledger(layout)
        self.saes: dict[str, SAE] = {}
        self.live: dict[str, Live] = {}
        self.step = Step()
        self.extent = self.longest = 0

    def load_sae(self, name: str, sae: SAE) -> None:
        """Make a bundle's latents available as rows."""
        self.saes[name] = sae

    def admit(self, request_id: str, handle: int, request: wire.Request) -> None:
        """Fill what a new request needs. A request that comes again (preempted, V2 runner) keeps what it has."""
        if request_id in self.live:
            return
        lease = self.ledger.acquire(handle, request)
        live = self.live[request_id] = Live(handle, request, lease)
        self.fill(lease)
        self.tell_used(lease)
        if lease.slot:
            self.write_entries(live)

    def tell_used(self, lease: Lease) -> None:
        """Tell the banks of a lease's sites how far their row places are in use."""
        for site in {site for site, _ in lease.places}:
            self.banks[site].used.fill_(self.ledger.extent(site))

    def fill(self, lease: Lease) -> None:
        """Load a lease's fresh row places, those of a bundle at a site in one go."""
        groups: dict[tuple[int, str], list[wire.Row]] = {}
        for site, row in lease.unfilled:
            groups.setdefault((site, row.bundle), []).append(row)
        for (site, bundle), rows in groups.items():
            places = torch.tensor([lease.places[site, row] for row in rows])
            latents = torch.tensor([row.latent for row in rows])
            found = self.saes[bundle].rows(latents) if bundle else raw_rows(rows, self.banks[site].width)
            self.banks[site].fill(places, found.rows if isinstance(found, Candidates) else found, bundle, latents)

    def write_entries(self, live: Live) -> None:
        """Write a request's prompt and generated entries of every site, and forget its slot's former state."""
        for stage, sites in enumerate(live.request.stages):
            for site in sites:
                bank, places = self.banks[site.site], live.places(site)
                for entries, prompt in entries_of(live.lease.slot, site):
                    edits = edit_parameters(site, places, self.layout.rows, prompt)
                    bank.edits[stage, entries].copy_(edits, non_blocking=True)
                    bank.entries[stage, entries].copy_(entry_parameters(site, places, prompt), non_blocking=True)

    def finish(self, request_id: str) -> None:
        """Give back all that a finished or aborted request holds."""
        live = self.live.pop(request_id, None)
        if live is None:
            return
        self.ledger.release(live.handle)
        self.tell_used(live.lease)
        slot = live.lease.slot
        for stage, sites in enumerate(live.request.stages if slot else ()):
            for site in sites:
                bank = self.banks[site.site]
                # Entry 0 is the identity: whoever takes the slot next must find nothing at sites it does not use.
                bank.edits[stage, 2 * slot : 2 * slot + 2].copy_(bank.edits[stage, :1])
                bank.entries[stage, 2 * slot : 2 * slot + 2].copy_(bank.entries[stage, :1])

    def place(self, request_ids: Sequence[str], starts: Ints, lengths: Ints) -> None:
        """Before a forward pass: tell each token its entry. Requests in row order, positions from `starts`."""
        last, batch = self.step, self.step.batch
        if batch.gated:
            self.sequences.is_open.fill_(True)
        if batch.request_ids != list(request_ids):
            batch = Batch(request_ids, [self.live.get(request_id) for request_id in request_ids])
        self.carry_sequences(batch, starts)
        if batch is last.batch and last.goes_on(starts, lengths):
            last.starts = starts
            last.gone_on += 1
            last.counts.add_(1)
        else:
            self.step = self.write_tokens(Step(batch, starts, lengths))
        for row, request in batch.in_sequence:
            request.start, request.length = int(starts[row]), int(lengths[row])
            request.offset = int(self.step.offsets[row])
        self.tell_longest([request.length for _, request in batch.in_sequence])

    def tell_longest(self, lengths: list[int]) -> None:
        """Tell the banks how many tokens the longest part of a request with a sequence condition has."""
        longest = max(lengths, default=0)
        if longest != self.longest:
            self.sequences.longest.fill_(longest)
            self.longest = longest

    def write_tokens(self, step: Step) -> Step:
        """Write the TOKEN columns of a step and make padding harmless."""
        columns = token_columns(step)
        extent = max(step.tokens, self.extent)
        padded = np.zeros((len(columns), extent), np.int32)
        padded[:, : step.tokens] = columns
        padded[2, step.tokens :] = np.arange(step.tokens, extent)
        self.token[:, :extent].copy_(to_device(padded, self.token.device))
        self.extent = step.tokens
        step.capture, step.counts = columns[4], self.token[COUNT, : step.tokens]
        return step

    def carry_sequences(self, batch: Batch, starts: Ints) -> None:
        """Move the sequence state of the tokens before this step into the slots.

        The last token that counts is the one before the next start: a rejected draft leaves no trace, and a request
        that begins again at 0 starts afresh. One that sits this step out keeps its tokens' states until it returns.
        """
        now = {request.handle for _, request in batch.in_sequence}
        for _, request in self.step.batch.in_sequence:
            if request.handle not in now and self.live_now(request) and request.kept is None:
                states, alarms, scores = self.last_step_of(request)
                request.kept = states.clone(), alarms.clone(), scores.clone()
        for row, request in batch.in_sequence:
            self.carry(request, int(starts[row]))

    def live_now(self, request: Live) -> bool:
        """Whether the request still holds its slot."""
        return request.handle in self.ledger.leases

    def last_step_of(self, request: Live) -> tuple[Tensor, Tensor, Tensor]:
        """States, alarms and scores [stages, length] of the request's tokens in the last step, if it was in it."""
        s, tokens = self.sequences, slice(request.offset, request.offset + request.length)
        return s.token_state[:, tokens], s.token_alarms[:, tokens], s.token_score[:, tokens]

    def carry(self, request: Live, begin: int) -> None:
        """Put one request's state as it was before position `begin` into its slot."""
        kept, request.kept = request.kept, None
        # BOS is not counted, so nothing has been before the token behind it either.
        if begin <= request.request.bos:
            self.reset(request.lease.slot)
            return
        ran = begin - request.start
        if not 0 < ran <= request.length:
            raise RuntimeError(f"request {request.handle}: its sequence state does not reach its next token")
        states, alarms, scores = kept or self.last_step_of(request)
        s, slot = self.sequences, request.lease.slot
        s.state[:, slot] = states[:, ran - 1]
        s.latched[:, slot] = alarms[:, ran - 1]
        last = min(ran, self.layout.window)
        counts = torch.arange(begin - last + 1, begin + 1, device=s.ring.device) - int(request.request.bos)
        s.ring[:, slot, counts.remainder(self.layout.window)] = scores[:, ran - last : ran]

    def reset(self, slot: int) -> None:
        """Forget a slot's sequence state."""
        self.sequences.state[:, slot] = 0.0
        self.sequences.latched[:, slot] = 0
        self.sequences.ring[:, slot] = 0.0


def token_columns(step: Step) -> Ints:
    """The TOKEN columns [5, tokens] of a step."""
    batch, lengths = step.batch, step.lengths
    slot, prompt, bos, reads, first, start = np.repeat(
        np.stack([batch.slot, batch.prompt, batch.bos, batch.reads, step.starts, step.offsets]), lengths, axis=1
    )
    position = np.arange(step.tokens) - start + first
    entry = np.where((bos > 0) & (position == 0), 0, 2 * slot + (position >= prompt))
    read = (reads == 2) | ((reads == 1) & (position >= prompt))
    capture = np.where(read, np.cumsum(read), 0)
    return np.stack([entry, slot, start, position + 1 - bos, capture])


def reading(live: Live | None) -> int:
    """0: captures nothing, 1: generated tokens, 2: all tokens."""
    if live is None or not live.request.reads:
        return 0
    return 2 if live.request.watch_prompt or live.request.capture else 1


def entries_of(slot: int, site: wire.Site) -> tuple[tuple[slice, bool], ...]:
    """A slot's entries for prompt tokens and for generated ones: both at once where the program is the same."""
    if not site.phases_differ():
        return ((slice(2 * slot, 2 * slot + 2), True),)
    return (slice(2 * slot, 2 * slot + 1), True), (slice(2 * slot + 1, 2 * slot + 2), False)


def raw_rows(rows: Sequence[wire.Row], width: int) -> Rows:
    """Rows that carry their vectors."""
    encoder = torch.stack([raw_vector(row.encoder, width) for row in rows])
    decoder = torch.stack([raw_vector(row.decoder, width) for row in rows])
    bias, threshold = torch.tensor([row.bias for row in rows]), torch.tensor([row.threshold for row in rows])
    return Rows(encoder, bias, threshold, decoder)


def raw_vector(data: bytes, width: int) -> Tensor:
    """A little-endian fp32 vector; no bytes: zeros."""
    return torch.from_numpy(np.frombuffer(data, "<f4").copy()) if data else torch.zeros(width)


def to_device(array: NDArray[np.int32], device: torch.device) -> Tensor:
    """Copy to the device without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
