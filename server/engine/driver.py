"""The worker's half of the bank: fills rows and entries as requests come, tells every token its entry before a step,
and reads the step's telemetry after it. Per step, never per layer; vectorised over the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_models.sae import SAE
from server.engine.bank import SiteBank, edit_parameters, entry_parameters
from server.engine.ledger import Ledger, Lease
from server.engine.layout import Layout
from server.steering import wire

Ints = NDArray[np.int64]


@dataclass
class Live:
    """A request that the worker has seen: what it asked for and where it stood in the last step that ran it."""

    handle: int
    request: wire.Request
    lease: Lease
    start: int = 0
    length: int = 0
    offset: int = 0
    # States, alarms and scores of its last step's tokens, once another step without it has overwritten them.
    kept: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def in_sequence(self) -> bool:
        """Whether it has a sequence condition, whose state must be carried."""
        return any(s.gate and s.gate.sequence for stage in self.request.stages for s in stage)

    def places(self, site: wire.Site) -> list[int]:
        """Row places of a site's rows."""
        return [self.lease.places[site.site, row] for row in site.rows]


@dataclass
class Step:
    """One step's batch: requests in row order, tokens in batch order."""

    live: list[Live | None] = field(default_factory=list)
    starts: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    lengths: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    capture: Ints = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def offsets(self) -> Ints:
        """Batch index of each request's first token."""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def tokens(self) -> int:
        """Tokens of the step, padding not counted."""
        return int(self.lengths.sum())


class Driver:
    """Keeps the banks of all sites in step with the requests in flight."""

    def __init__(self, layout: Layout, banks: Sequence[SiteBank]) -> None:
        self.layout, self.banks = layout, banks
        self.sequences, self.token = banks[0].sequences, banks[0].token
        self.ledger = Ledger(layout)
        self.saes: dict[str, SAE] = {}
        self.live: dict[str, Live] = {}
        self.step = Step()
        self.extent = 0

    def load_sae(self, name: str, sae: SAE) -> None:
        """Make a bundle's latents available as rows."""
        self.saes[name] = sae

    def admit(self, request_id: str, handle: int, request: wire.Request) -> None:
        """Fill what a new request needs. A request that comes again (preempted, V2 runner) keeps what it has."""
        if request_id in self.live:
            return
        lease = self.ledger.acquire(handle, request)
        live = self.live[request_id] = Live(handle, request, lease)
        for site, row in lease.fresh:
            self.fill(self.banks[site], lease.places[site, row], row)
        if lease.slot:
            self.write_entries(live)

    def fill(self, bank: SiteBank, place: int, row: wire.Row) -> None:
        """Load a row place from its bundle or from the raw vectors."""
        if row.bundle:
            rows = self.saes[row.bundle].rows(torch.tensor([row.latent]))
            encoder, bias, threshold, decoder = (t[0] for t in (rows.encoder, rows.bias, rows.threshold, rows.decoder))
        else:
            encoder, decoder = raw_vector(row.encoder, bank.width), raw_vector(row.decoder, bank.width)
            bias, threshold = torch.tensor(row.bias), torch.tensor(row.threshold)
        bank.encoder[place].copy_(encoder, non_blocking=True)
        bank.bias[place].copy_(bias, non_blocking=True)
        bank.threshold[place].copy_(threshold, non_blocking=True)
        bank.decoder[place].copy_(decoder, non_blocking=True)

    def write_entries(self, live: Live) -> None:
        """Write a request's prompt and generated entries of every site, and forget its slot's former state."""
        slot = live.lease.slot
        for stage, sites in enumerate(live.request.stages):
            for site in sites:
                bank, places = self.banks[site.site], live.places(site)
                for phase in (0, 1):
                    edits = edit_parameters(site, places, self.layout.rows, prompt=phase == 0)
                    bank.edits[stage, 2 * slot + phase].copy_(edits, non_blocking=True)
                    entry = entry_parameters(site, places, prompt=phase == 0)
                    bank.entries[stage, 2 * slot + phase].copy_(entry, non_blocking=True)

    def finish(self, request_id: str) -> None:
        """Give back all that a finished or aborted request holds."""
        live = self.live.pop(request_id, None)
        if live is None:
            return
        self.ledger.release(live.handle)
        slot = live.lease.slot
        for stage, sites in enumerate(live.request.stages if slot else ()):
            for site in sites:
                bank = self.banks[site.site]
                # Entry 0 is the identity: whoever takes the slot next must find nothing at sites it does not use.
                bank.edits[stage, 2 * slot : 2 * slot + 2].copy_(bank.edits[stage, :1])
                bank.entries[stage, 2 * slot : 2 * slot + 2].copy_(bank.entries[stage, :1])

    def place(self, request_ids: Sequence[str], starts: Ints, lengths: Ints) -> None:
        """Before a forward pass: tell each token its entry. Requests in row order, positions from `starts`."""
        live = [self.live.get(request_id) for request_id in request_ids]
        step = Step(live, starts.astype(np.int64), lengths.astype(np.int64))
        self.carry_sequences(step)
        tokens = token_columns(step)
        step.capture = tokens[4]
        for request, start, length, offset in zip(live, step.starts, step.lengths, step.offsets, strict=True):
            if request:
                request.start, request.length, request.offset = int(start), int(length), int(offset)
        extent = max(tokens.shape[1], self.extent)
        padded = np.zeros((len(tokens), extent), np.int32)
        padded[:, : tokens.shape[1]] = tokens
        padded[2, tokens.shape[1] :] = np.arange(tokens.shape[1], extent)
        self.token[:, :extent].copy_(to_device(padded, self.token.device))
        self.sequences.is_open.fill_(True)
        self.step, self.extent = step, tokens.shape[1]

    def carry_sequences(self, step: Step) -> None:
        """Move the sequence state of the last step's tokens into the slots.

        The last token that counts is the one before the next start: a rejected draft leaves no trace, and a request that
        begins again at 0 starts afresh.
        """
        coming = {id(request) for request in step.live}
        for request in filter(None, self.step.live):
            if request.in_sequence and id(request) not in coming and self.live_now(request):
                states, alarms, scores = (part.clone() for part in self.last_step_of(request))
                request.kept = states, alarms, scores
        for request, begin in zip(step.live, step.starts, strict=True):
            if request and request.in_sequence:
                self.carry(request, int(begin))

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
    lengths, offsets = step.lengths, step.offsets
    slot = per_token([r.lease.slot if r else 0 for r in step.live], lengths)
    prompt = per_token([r.request.prompt_tokens if r else 0 for r in step.live], lengths)
    bos = per_token([r.request.bos if r else 0 for r in step.live], lengths)
    reads = per_token([reading(r) for r in step.live], lengths)
    start = np.repeat(offsets, lengths)
    position = np.arange(step.tokens) - start + np.repeat(step.starts, lengths)
    entry = np.where((bos > 0) & (position == 0), 0, 2 * slot + (position >= prompt))
    read = (reads == 2) | ((reads == 1) & (position >= prompt))
    capture = np.where(read, np.cumsum(read), 0)
    return np.stack([entry, slot, start, position + 1 - bos, capture])


def reading(live: Live | None) -> int:
    """0: captures nothing, 1: generated tokens, 2: all tokens."""
    if live is None or not live.request.reads:
        return 0
    return 2 if live.request.watch_prompt or live.request.capture else 1


def per_token(values: Sequence[int], lengths: Ints) -> Ints:
    """A per-request value repeated for each of its tokens."""
    return np.repeat(np.asarray(values, np.int64), lengths)


def raw_vector(data: bytes, width: int) -> Tensor:
    """A little-endian fp32 vector; no bytes: zeros."""
    return torch.from_numpy(np.frombuffer(data, "<f4").copy()) if data else torch.zeros(width)


def to_device(array: NDArray[np.int32], device: torch.device) -> Tensor:
    """Copy to the device without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
