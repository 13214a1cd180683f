"""The static buffers that the formula of steering (sae_models.formula) runs on inside the engine.

Nothing here depends on how many programs are in the batch, allocates state or leaves the device.
Shapes: T tokens, d width, K row places, E program entries.
"""

from collections.abc import Callable, Mapping
from math import inf
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rudder.sae_models.edit import ENTRY, IDENTITY_EDIT, IDENTITY_ENTRY, Product, edit, sequence_condition
from rudder.sae_models.sae import SAE, Normalisation, Rows, activations
from rudder.sae_models.sae import gain as input_gain
from rudder.server.program import wire
from rudder.server.program.layout import Layout

# What the host writes for every token of a step, [len(TOKEN), max tokens]: the entry in force, the request's slot,
# the batch index of its first token, its count of tokens so far (BOS excluded), its row in the capture buffer.
TOKEN = ("entry", "slot", "start", "count", "capture")
NO_DICTIONARIES: Mapping[str, SAE] = MappingProxyType({})


# torch.library.custom_op wraps an operator in several layers of Python, which cost a CPU as much as a small product.
LIBRARY = torch.library.Library("rudder", "FRAGMENT")


def cpu_operator(compute: Callable[..., Any], shapes: Callable[..., Any]) -> Any:
    """A function as an operator that a compiled graph calls on a CPU; `shapes` makes empty results."""
    name = compute.__name__
    LIBRARY.define(name + torch.library.infer_schema(compute, mutates_args=()))
    LIBRARY.impl(name, compute, "CPU")
    torch.library.register_fake(f"rudder::{name}", shapes, lib=LIBRARY)
    return getattr(torch.ops.rudder, name).default


def product_of_used(a: Tensor, b: Tensor, used: Tensor, inner: bool) -> Tensor:
    """a @ b [n, m] on a CPU, over the first `used` [] of their inner dimension, or else of b's columns, the others 0.

    A dense product of mostly empty row places costs a CPU more than all the rest of the bank.
    """
    rows = int(used)
    if inner:
        return a[:, :rows] @ b[:rows] if a.any() else a.new_zeros(len(a), b.shape[1])
    product = a.new_zeros(len(a), b.shape[1])
    torch.matmul(a, b[:, :rows], out=product[:, :rows])
    return product


used_product = cpu_operator(product_of_used, lambda a, b, _used, _inner: a.new_empty(a.shape[0], b.shape[1]))


def condition_of_used(
    f: Tensor, entry: Tensor, token: Tensor, carry: Tensor, latched: Tensor, ring: Tensor, longest: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sequence_condition` on a CPU, with no more steps than the `longest` [] part of a request needs that has one in
    its program; 0: nothing, since no program of the batch has one.
    """
    tokens, most = len(f), int(longest)
    if not most:
        zero = entry.new_zeros(tokens)
        return torch.zeros(tokens, dtype=torch.bool), zero, latched.new_zeros(tokens), zero.clone()
    return sequence_condition(f, entry, token, carry, latched, ring, (most - 1).bit_length())


def no_condition(
    f: Tensor, entry: Tensor, _token: Tensor, _carry: Tensor, latched: Tensor, _ring: Tensor, _longest: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The shapes of `condition_of_used`."""
    tokens = f.shape[0]
    holds = f.new_empty(tokens, dtype=torch.bool)
    return holds, entry.new_empty(tokens), latched.new_empty(tokens), entry.new_empty(tokens)


used_condition = cpu_operator(condition_of_used, no_condition)


class Sequences(nn.Module):
    """Per stage and slot, the state of the one gate a program may have; shared by all sites.

    `longest`: tokens of the longest part of a request of this step that has a sequence condition; 0: none has.
    """

    state: Tensor
    latched: Tensor
    ring: Tensor
    is_open: Tensor
    token_state: Tensor
    token_alarms: Tensor
    token_score: Tensor
    longest: Tensor

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
        self.is_open.fill_(True)
        buffer("token_state", max_tokens, dtype=torch.float64)
        buffer("token_alarms", max_tokens, dtype=torch.int64)
        buffer("token_score", max_tokens, dtype=torch.float64)
        self.register_buffer("longest", torch.zeros((), dtype=torch.int64, device=device), persistent=False)


class SiteBank(nn.Module):
    """The bank of one site: row places, program entries, and what the last step saw there."""

    encoder: Tensor
    bias: Tensor
    threshold: Tensor
    decoder: Tensor
    edits: Tensor
    entries: Tensor
    token: Tensor
    used: Tensor
    normalisation: Tensor
    column: Tensor
    active: Tensor
    moved: Tensor
    before: Tensor
    after: Tensor
    given: Tensor

    def __init__(
        self,
        layout: Layout,
        site: str,
        width: int,
        max_tokens: int,
        token: Tensor,
        sequences: Sequences,
        dictionaries: Mapping[str, SAE] = NO_DICTIONARIES,
    ) -> None:
        """`dictionaries`: those read here whose activations do not follow from a row alone, or are normalised."""
        super().__init__()
        self.site, self.width, self.stages = site, width, layout.stages
        self.on_cpu = token.device.type == "cpu"
        self.keeps_sequences = layout.keeps_sequences(site)
        self.steps = (max_tokens - 1).bit_length()
        self.sequences = sequences
        rows, entries = layout.rows, 2 * (layout.slots + 1)

        def buffer(name: str, tensor: Tensor) -> None:
            self.register_buffer(name, tensor.to(token.device), persistent=False)

        self.hold(dictionaries, rows)
        buffer("used", torch.zeros((), dtype=torch.int64))
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

    def hold(self, dictionaries: Mapping[str, SAE], rows: int) -> None:
        """Keep dictionaries whole: each row place then also has a normalisation and a column in all of them."""
        self.dictionaries = tuple(dictionaries.values())
        sizes = [sae.latents for sae in self.dictionaries]
        self.columns = dict(zip(dictionaries, (sum(sizes[:i]) for i in range(len(sizes))), strict=True))
        self.normalisations = tuple({sae.normalisation for sae in self.dictionaries} - {Normalisation.NONE})
        self.register_buffer("normalisation", torch.zeros(rows, dtype=torch.int64), persistent=False)
        self.register_buffer("column", torch.full((rows,), -1), persistent=False)

    def keep_given(self) -> None:
        """Make room for what the layer was given [max tokens, d]: the site reads it together with what came since."""
        self.register_buffer("given", self.active.new_zeros(len(self.active), self.width), persistent=False)

    def fill(self, places: Tensor, rows: Rows, name: str, latents: Tensor) -> None:
        """Load row places [n] with the latents [n] of bundle `name`, or with raw rows where it is empty."""
        places = places.to(self.encoder.device, non_blocking=True)
        for buffer, value in zip((self.encoder, self.bias, self.threshold, self.decoder), rows, strict=True):
            buffer.index_copy_(0, places, value.to(buffer.device, non_blocking=True))
        if not self.dictionaries:
            return
        sae = dict(zip(self.columns, self.dictionaries, strict=True)).get(name)
        kind = sae.normalisation if sae else Normalisation.NONE
        self.normalisation[places] = 1 + self.normalisations.index(kind) if kind in self.normalisations else 0
        whole = sae is not None and not sae.exact
        self.column[places] = self.columns[name] + latents.to(places.device) if whole else -1

    def gain(self, x: Tensor) -> Tensor | None:
        """What each row's input is multiplied by [T, K]; None: by 1."""
        if not self.normalisations:
            return None
        gains = [torch.ones_like(x[:, :1]), *(input_gain(x, kind) for kind in self.normalisations)]
        return torch.cat(gains, 1)[:, self.normalisation]

    def read(self, x: Tensor, gain: Tensor | None) -> Tensor:
        """f [T, K] of x [T, d]. A latent that others can displace has its column of its whole dictionary's encode."""
        rows = Rows(self.encoder, self.bias, self.threshold, self.decoder)
        f = activations(x, rows, gain, self.product(inner=False))
        if all(sae.exact for sae in self.dictionaries):
            return f
        encoded = torch.cat([sae.encode(x) for sae in self.dictionaries], 1)
        return torch.where(self.column >= 0, encoded[:, self.column.clamp_min(0)], f)

    def product(self, *, inner: bool) -> Product:
        """The product over the rows' dimension, which is the inner one or else the last."""
        if not self.on_cpu:
            return torch.matmul
        return lambda a, b: used_product(a, b, self.used, inner)

    def forward(self, x: Tensor) -> Tensor:
        """x' - x [T, d] of x [T, d], both fp32, T the padded batch."""
        tokens = x.shape[0]
        token = self.token[:, :tokens].long()
        y, displacement = x, torch.zeros_like(x)
        for stage in range(self.stages):
            gain = self.gain(y)
            f = self.read(y, gain)
            if stage == 0:
                self.active[:tokens].copy_(f)
            entry = self.entries[stage, token[0]]
            edits = self.edits[stage, token[0]]
            is_open = self.gate(stage, f, edits, entry, token)
            move, moved = edit(y, f, self.decoder, edits, entry, is_open, gain, self.product(inner=True))
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
            condition, state, alarms, score = self.condition(f, entry, token, carry, latched, ring)
            holds = holds & ((in_sequence == 0) | condition)
            here = gated > 0
            for kept, new in (("token_state", state), ("token_alarms", alarms), ("token_score", score)):
                kept_buffer = getattr(sequences, kept)[stage, :tokens]
                kept_buffer.copy_(torch.where(here, new, kept_buffer))
        is_open = torch.where(gated > 0, holds, sequences.is_open[stage, :tokens])
        sequences.is_open[stage, :tokens].copy_(is_open)
        return is_open

    def condition(
        self, f: Tensor, entry: Tensor, token: Tensor, carry: Tensor, latched: Tensor, ring: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`sequence_condition` of all that may be needed, or on a CPU of what is."""
        if not self.on_cpu:
            return sequence_condition(f, entry, token, carry, latched, ring, self.steps)
        longest = self.sequences.longest
        found: tuple[Tensor, Tensor, Tensor, Tensor] = used_condition(f, entry, token, carry, latched, ring, longest)
        return found


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
