"""The arithmetic of steering, and the static buffers it runs on.

    z = x . encoder + bias                 f = z if z > threshold else 0
    new = clip(scale * f + shift, lower, upper)
    x' = x + sum_rows (new - f) * decoder  where f > above and the gate is open
    x' = x' + weight * (mean - x')         where the gate is open

All of it in fp32 on every token, as a few dense operations: nothing depends on how many programs are in the batch,
nothing allocates state, nothing leaves the device. Shapes: T tokens, d width, K row places, E program entries.
"""

from math import inf

import numpy as np
import torch
from torch import Tensor, nn

from server.engine.layout import Layout
from server.steering import wire

TINY = 1e-12
# Parameters of an entry on a row, [E, len(EDIT), K].
EDIT = ("scale", "shift", "lower", "upper", "above", "relative", "trigger")
# `above` is inf: not even an activation that overflowed, of a row that a neighbour brought, moves anyone else's token.
IDENTITY_EDIT = (1.0, 0.0, -inf, inf, inf, 0.0, inf)
# Parameters of an entry as a whole, [E, len(ENTRY)], fp64 because sequence state must not depend on chunking.
ENTRY = (
    "weight", "blend_row", "restore", "cap", "gated", "token", "sequence", "score", "binarise", "binary",
    "decay", "gain", "offset", "floor", "window", "level", "level_rate", "min_tokens", "latch",
)  # fmt: skip
IDENTITY_ENTRY = (0.0, 0.0, 0.0, inf, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, -1e300, 0.0, 0.0, 0.0, 0.0, 0.0)
# What the host writes for every token of a step, [len(TOKEN), max tokens]: the entry in force, the request's slot,
# the batch index of its first token, its count of tokens so far (BOS excluded), its row in the capture buffer.
TOKEN = ("entry", "slot", "start", "count", "capture")


def activations(x: Tensor, encoder: Tensor, bias: Tensor, threshold: Tensor) -> Tensor:
    """f [T, K] of x [T, d]: JumpReLU in the row form that all SAE activations reduce to (arXiv 2407.14435)."""
    z = torch.addmm(bias, x, encoder.T)
    return torch.where(z > threshold, z, 0.0)


def edit(x: Tensor, f: Tensor, decoder: Tensor, edits: Tensor, entry: Tensor, is_open: Tensor) -> tuple[Tensor, Tensor]:
    """How far x [T, d] moves [T, d], and which rows moved it [T, K].

    f [T, K] activations, decoder [K, d], edits [T, len(EDIT), K] and entry [T, len(ENTRY)] the parameters in force at
    each token, is_open [T] the gate.
    """
    scale, shift, lower, upper, above, relative, _ = edits.unbind(1)
    weight, blend_row, restore, cap = entry[:, :4].float().unbind(1)
    norm = x.norm(dim=1, keepdim=True).clamp_min(TINY)
    unit = torch.where(relative > 0, norm, 1.0)
    new = torch.minimum(torch.maximum(scale * f + shift * unit, lower * unit), upper * unit)
    delta = torch.where((f > above) & is_open[:, None], new - f, 0.0)
    y = torch.addmm(x, delta, decoder)
    weight = torch.where(is_open, weight, 0.0)[:, None]
    blend_row = blend_row.long()
    y = y + weight * (decoder[blend_row] - y)
    y = y * torch.where(restore[:, None] > 0, norm / y.norm(dim=1, keepdim=True).clamp_min(TINY), 1.0)
    move = y - x
    move = move * (cap[:, None] * norm / move.norm(dim=1, keepdim=True).clamp_min(TINY)).clamp_max(1.0)
    places = torch.arange(f.shape[1], device=f.device)
    moved = (delta != 0) | ((places == blend_row[:, None]) & (weight > 0))
    return move, moved


def scan(decay: Tensor, shift: Tensor, floor: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compose s -> max(floor, decay * s + shift) over each request's tokens, [T] fp64 each; start [T] as in TOKEN.

    These maps are closed under composition, so one doubling scan serves share, moving average and CUSUM alike.
    """
    index = torch.arange(decay.shape[0], device=decay.device)
    for step in range(steps):
        earlier = index - (1 << step)
        within = earlier >= start
        earlier = earlier.clamp_min(0)
        decay0 = torch.where(within, decay[earlier], 1.0)
        shift0 = torch.where(within, shift[earlier], 0.0)
        floor0 = torch.where(within, floor[earlier], -1e300)
        decay, shift, floor = decay * decay0, decay * shift0 + shift, torch.maximum(floor, decay * floor0 + shift)
    return decay, shift, floor


def window_mean(u: Tensor, ring: Tensor, token: Tensor, window: Tensor) -> Tensor:
    """Mean of the last `window` scores [T]; ring [slots, W] holds the scores of earlier steps by count modulo W."""
    _, slot, start, count, _ = token.unbind(0)
    back = torch.arange(ring.shape[1], device=u.device)
    here = torch.arange(u.shape[0], device=u.device)[:, None] - back
    # The count, not the batch index, numbers scores: BOS stands in the batch but is not counted.
    number = count[:, None] - back
    earlier = ring[slot[:, None], number.remainder(ring.shape[1])]
    scores = torch.where(here >= start[:, None], u[here.clamp_min(0)], earlier)
    used = (number > 0) & (back < window[:, None])
    return torch.where(used, scores, 0.0).sum(1) / used.sum(1).clamp_min(1)


def sequence_condition(
    f: Tensor, entry: Tensor, token: Tensor, carry: Tensor, latched: Tensor, ring: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whether the condition holds at each token, and the state after it: (holds, state, alarms, score), [T] each.

    carry, latched [slots] and ring [slots, W] are the state before this step.
    """
    p = dict(zip(ENTRY, entry.unbind(1), strict=True))
    _, slot, start, count, _ = token.unbind(0)
    score = f.double().gather(1, p["score"].long()[:, None])[:, 0]
    score = torch.where(p["binarise"] > 0, (score > p["binary"]).double(), score)
    decay, shift, floor = scan(p["decay"], p["gain"] * score + p["offset"], p["floor"], start, steps)
    state = torch.maximum(floor, decay * carry[slot] + shift)
    statistic = torch.where(p["window"] > 0, window_mean(score, ring, token, p["window"]), state)
    alarm = (statistic > p["level"] + p["level_rate"] * count) & (count >= p["min_tokens"]) & (p["sequence"] > 0)
    seen = alarm.long().cumsum(0)
    alarms = seen - (seen - alarm.long())[start] + latched[slot]
    return torch.where(p["latch"] > 0, alarms > 0, alarm), state, alarms, score


class Sequences(nn.Module):
    """Per stage and slot, the state of the one gate a program may have; shared by all sites."""

    state: Tensor
    latched: Tensor
    ring: Tensor
    is_open: Tensor
    token_state: Tensor
    token_alarms: Tensor
    token_score: Tensor

    def __init__(self, layout: Layout, max_tokens: int, device: torch.device) -> None:
        super().__init__()
        slots = layout.slots + 1

        def buffer(name: str, *shape: int, dtype: torch.dtype) -> None:
            tensor = torch.zeros(layout.stages, *shape, dtype=dtype, device=device)
            self.register_buffer(name, tensor, persistent=False)

        buffer("state", slots, dtype=torch.float64)
        buffer("latched", slots, dtype=torch.int64)
        buffer("ring", slots, layout.window, dtype=torch.float64)
        buffer("is_open", max_tokens, dtype=torch.bool)
        buffer("token_state", max_tokens, dtype=torch.float64)
        buffer("token_alarms", max_tokens, dtype=torch.int64)
        buffer("token_score", max_tokens, dtype=torch.float64)


class SiteBank(nn.Module):
    """The bank of one site: row places, program entries, and what the last step saw there."""

    encoder: Tensor
    bias: Tensor
    threshold: Tensor
    decoder: Tensor
    edits: Tensor
    entries: Tensor
    token: Tensor
    active: Tensor
    moved: Tensor
    before: Tensor
    after: Tensor

    def __init__(
        self, layout: Layout, site: str, width: int, max_tokens: int, token: Tensor, sequences: Sequences
    ) -> None:
        super().__init__()
        self.site, self.width, self.stages = site, width, layout.stages
        self.keeps_sequences = layout.keeps_sequences(site)
        self.steps = (max_tokens - 1).bit_length()
        self.sequences = sequences
        rows, entries = layout.rows, 2 * (layout.slots + 1)

        def buffer(name: str, tensor: Tensor) -> None:
            self.register_buffer(name, tensor.to(token.device), persistent=False)

        buffer("encoder", torch.zeros(rows, width))
        buffer("bias", torch.zeros(rows))
        buffer("threshold", torch.full((rows,), inf))
        buffer("decoder", torch.zeros(rows, width))
        buffer("edits", torch.tensor(IDENTITY_EDIT)[:, None].repeat(layout.stages, entries, 1, rows))
        buffer("entries", torch.tensor(IDENTITY_ENTRY, dtype=torch.float64).repeat(layout.stages, entries, 1))
        self.register_buffer("token", token, persistent=False)
        buffer("active", torch.zeros(max_tokens, rows))
        buffer("moved", torch.zeros(layout.stages, max_tokens, rows, dtype=torch.bool))
        # Row 0 takes what nobody asked for.
        captured = 1 + (layout.capture_tokens or max_tokens)
        buffer("before", torch.zeros(captured, width))
        buffer("after", torch.zeros(captured, width))

    def forward(self, x: Tensor) -> Tensor:
        """x' - x [T, d] of x [T, d], both fp32, T the padded batch."""
        tokens = x.shape[0]
        token = self.token[:, :tokens].long()
        y, displacement = x, torch.zeros_like(x)
        for stage in range(self.stages):
            f = activations(y, self.encoder, self.bias, self.threshold)
            if stage == 0:
                self.active[:tokens].copy_(f)
            entry = self.entries[stage, token[0]]
            edits = self.edits[stage, token[0]]
            is_open = self.gate(stage, f, edits, entry, token)
            move, moved = edit(y, f, self.decoder, edits, entry, is_open)
            y = y + move
            displacement = displacement + move
            self.moved[stage, :tokens].copy_(moved)
        self.before.index_copy_(0, token[4], x)
        self.after.index_copy_(0, token[4], y)
        return displacement

    def gate(self, stage: int, f: Tensor, edits: Tensor, entry: Tensor, token: Tensor) -> Tensor:
        """Whether the program's gate is open at each token [T]; read here if this is the gate's site."""
        tokens = f.shape[0]
        sequences = self.sequences
        gated, conditional, in_sequence = entry[:, 4:7].unbind(1)
        holds = (conditional == 0) | (f > edits[:, 6]).any(1)
        if self.keeps_sequences:
            carry, latched, ring = sequences.state[stage], sequences.latched[stage], sequences.ring[stage]
            condition, state, alarms, score = sequence_condition(f, entry, token, carry, latched, ring, self.steps)
            holds = holds & ((in_sequence == 0) | condition)
            here = gated > 0
            for kept, new in (("token_state", state), ("token_alarms", alarms), ("token_score", score)):
                kept_buffer = getattr(sequences, kept)[stage, :tokens]
                kept_buffer.copy_(torch.where(here, new, kept_buffer))
        is_open = torch.where(gated > 0, holds, sequences.is_open[stage, :tokens])
        sequences.is_open[stage, :tokens].copy_(is_open)
        return is_open


def edit_parameters(program: wire.Site, places: list[int], rows: int, prompt: bool) -> Tensor:
    """[len(EDIT), rows] of a program at a site in one phase; `places` maps its rows to row places."""
    table = np.repeat(np.array(IDENTITY_EDIT, np.float32)[:, None], rows, 1)
    edits = [e for e in program.edits if (e.prompt if prompt else e.generated)]
    if edits:
        values = [(e.scale, e.shift, e.lower, e.upper, e.above, e.relative) for e in edits]
        table[:6, [places[e.row] for e in edits]] = np.array(values, np.float32).T
    for row, above in program.gate.triggers if program.gate else ():
        table[6, places[row]] = above
    return torch.from_numpy(table)


def entry_parameters(program: wire.Site, places: list[int], prompt: bool) -> Tensor:
    """[len(ENTRY)] fp64 of a program at a site in one phase."""
    p = dict(zip(ENTRY, IDENTITY_ENTRY, strict=True))
    p |= {"restore": float(program.restore_norm), "cap": program.max_displacement}
    blend = program.blend
    if blend and (blend.prompt if prompt else blend.generated):
        p |= {"weight": blend.weight, "blend_row": places[blend.row]}
    if program.gate:
        p |= {"gated": 1.0, "token": float(bool(program.gate.triggers))}
    if program.gate and program.gate.sequence:
        p |= sequence_parameters(program.gate.sequence, places)
    return torch.tensor([p[name] for name in ENTRY], dtype=torch.float64)


def sequence_parameters(s: wire.Sequence, places: list[int]) -> dict[str, float]:
    """The ENTRY fields of a sequence condition."""
    fields = ("decay", "gain", "offset", "floor", "window", "level", "level_rate", "min_tokens", "latch")
    p = {name: float(getattr(s, name)) for name in fields}
    binary = {} if s.binary is None else {"binarise": 1.0, "binary": s.binary}
    return p | binary | {"sequence": 1.0, "score": places[s.score]}
