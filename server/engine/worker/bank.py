"""The bank of a site: the buffers on which the steering formula (`sae_models/edit.py`) runs inside the model.

The graph does not depend on how many programs are in the batch, allocates no state and never synchronises with the
host; a captured CUDA graph replays on these same buffers. Shapes: T tokens, d width, K row places, E entries, S stages.
"""

import importlib
import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from math import inf
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from rudder.sae_models.edit import MAX_VALUE, Product, bounded_edit, by_name, entry_group, sequence_condition
from rudder.sae_models.errors import UserError
from rudder.sae_models.hookpoints import parse
from rudder.sae_models.operations import EDIT, GATE, IDENTITY_EDIT, IDENTITY_ENTRY, TOKEN
from rudder.sae_models.sae import SAE, Normalisation, Rows, activations
from rudder.sae_models.sae import gain as input_gain
from rudder.server.program.layout import Layout

TRIGGER = EDIT.index("trigger")
# Hook points whose vector is added to the residual stream, which is normalised only behind the sum.
BRANCHES = ("attn_out", "mlp_out")
# Limit on the input of an MLP, whose output grows with its square where it is gated.
MAX_MLP_INPUT = 2.0**16
NO_DICTIONARIES: Mapping[str, SAE] = MappingProxyType({})


# torch.library.custom_op wraps an operator in several layers of Python, which cost a CPU as much as a small product.
LIBRARY = torch.library.Library("rudder", "FRAGMENT")


def cpu_operator(compute: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register `compute` as an operator that a compiled graph calls on a CPU; `fake` returns empty results."""
    name = compute.__name__
    LIBRARY.define(name + torch.library.infer_schema(compute, mutates_args=()))
    LIBRARY.impl(name, compute, "CPU")
    torch.library.register_fake(f"rudder::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.rudder, name).default


def product_within_extent(a: Tensor, b: Tensor, extent: Tensor, inner: bool) -> Tensor:
    """a @ b [n, m] on a CPU, over the first `extent` [] row places, which are the inner dimension or b's columns.

    Columns behind the extent are 0. A dense product over mostly empty row places would cost a CPU more than all the
    rest of the bank; reading `extent` on the host costs nothing there.
    """
    places = int(extent)
    if inner:
        return a[:, :places] @ b[:places] if a.any() else a.new_zeros(len(a), b.shape[1])
    product = a.new_zeros(len(a), b.shape[1])
    torch.matmul(a, b[:, :places], out=product[:, :places])
    return product


extent_product = cpu_operator(product_within_extent, lambda a, b, _extent, _inner: a.new_empty(a.shape[0], b.shape[1]))


def condition_within_length(
    f: Tensor, entry: Tensor, token: Tensor, state: Tensor, latched: Tensor, ring: Tensor, max_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sequence_condition` on a CPU, with only as many scan steps as `max_length` [] tokens need.

    0: no program of the batch has a sequence condition, and none is evaluated.
    """
    tokens, length = len(f), int(max_length)
    if not length:
        zero = entry.new_zeros(tokens)
        return torch.zeros(tokens, dtype=torch.bool), zero, latched.new_zeros(tokens), zero.clone()
    return sequence_condition(f, entry, token, state, latched, ring, (length - 1).bit_length())


def empty_condition(
    f: Tensor, entry: Tensor, _token: Tensor, _state: Tensor, latched: Tensor, _ring: Tensor, _max_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty results in the shapes of `condition_within_length`."""
    tokens = f.shape[0]
    holds = f.new_empty(tokens, dtype=torch.bool)
    return holds, entry.new_empty(tokens), latched.new_empty(tokens), entry.new_empty(tokens)


length_bounded_condition = cpu_operator(condition_within_length, empty_condition)


def write_stage(buffer: Tensor, stage: int, values: Tensor) -> None:
    """Write values [T, ...] of this step's tokens to buffer [S, max tokens, ...], in place.

    A compiled graph writes by index: where several stages assign to slices of one buffer, Inductor (PyTorch 2.13)
    writes the whole buffer anew in every step, and on a CPU with AVX-512 does so in C++ that does not compile if the
    values are masks.
    """
    if not torch.compiler.is_compiling():
        buffer[stage, : len(values)].copy_(values)
        return
    tokens = torch.arange(len(values), device=buffer.device)
    buffer.index_put_((torch.full_like(tokens, stage), tokens), values)


def value_limit(layout: Layout, site: str, dtype: torch.dtype) -> float:
    """Return the limit on the values that leave a site of a model in `dtype`.

    Behind all edits of a token the residual stream stays within half of what `dtype` can represent: a quarter where
    the stream itself is edited, and a quarter for the edits of all branches together. The model has the other half.
    """
    stream = min(MAX_VALUE, torch.finfo(dtype).max / 4)
    _, point = parse(site)
    if point == "mlp_in":
        return min(stream, MAX_MLP_INPUT)
    branches = sum(parse(other)[1] in BRANCHES for other in layout.sites)
    return stream / branches if point in BRANCHES else stream


def runs_triton(backend: str, device: torch.device) -> bool:
    """Return whether the bank runs as Triton kernels (`kernels.py`) on a device, rather than as PyTorch operations.

    Registers their operator. UserError: `backend` is "triton", which is not installed or does not run on the device.
    """
    installed = find_spec("triton") is not None
    runs = installed and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
    if backend == "triton" and not runs:
        lacking = f"Triton does not run on {device.type}" if installed else "Triton is not installed"
        raise UserError(f"engine.bank_backend: {lacking}")
    if backend == "torch" or not runs:
        return False
    importlib.import_module("rudder.server.engine.worker.kernels")
    return True


class Sequences(nn.Module):
    """Sequence state of each stage and slot, for the one gate that a program may have; shared by all sites.

    state [S, slots], latched [S, slots] and ring [S, slots, window] are as they were before the step; is_open and the
    token_* buffers [S, max tokens] as they are after each of its tokens. max_length []: most tokens in this step of one
    request with a sequence condition; 0: there is no such request.
    """

    state: Tensor
    latched: Tensor
    ring: Tensor
    is_open: Tensor
    token_state: Tensor
    token_alarms: Tensor
    token_score: Tensor
    max_length: Tensor

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
        self.register_buffer("max_length", torch.zeros((), dtype=torch.int64, device=device), persistent=False)


class SiteBank(nn.Module):
    """The bank of one site: its rows, the entries of all slots, and what the last step read there.

    encoder, decoder [K, d], bias, threshold [K]: the rows. edits [S, E, len(EDIT), K] and entries [S, E, len(ENTRY)].
    token [len(TOKEN), max tokens]: shared by all sites. extent []: one more than the highest row place in use.
    activations [max tokens, K] before any edit, NaN of a token that is not finite; edited, rejected [S, max tokens, K]:
    rows that edited a token, and rows whose edit was rejected with all others of the token; before, after
    [capture tokens, d]: residuals around the edits. limit: on the values that leave the site.
    """

    encoder: Tensor
    bias: Tensor
    threshold: Tensor
    decoder: Tensor
    edits: Tensor
    entries: Tensor
    token: Tensor
    extent: Tensor
    normalisation: Tensor
    column: Tensor
    activations: Tensor
    edited: Tensor
    rejected: Tensor
    before: Tensor
    after: Tensor
    layer_input: Tensor
    factor: Tensor

    def __init__(
        self,
        layout: Layout,
        site: str,
        width: int,
        max_tokens: int,
        token: Tensor,
        sequences: Sequences,
        dictionaries: Mapping[str, SAE] = NO_DICTIONARIES,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`dictionaries`: SAEs of this site whose activations need more than a row (a selection, a normalisation).

        `dtype`: of the model, whose range the edited values must not leave.
        """
        super().__init__()
        self.limit = value_limit(layout, site, dtype)
        self.site, self.width, self.stages = site, width, layout.stages
        self.on_cpu = token.device.type == "cpu"
        self.by_kernels = runs_triton(layout.backend, token.device)
        self.keeps_sequences = layout.keeps_sequences(site)
        self.scan_steps = (max_tokens - 1).bit_length()
        self.sequences = sequences
        rows, entries = layout.rows, 2 * (layout.slots + 1)

        def buffer(name: str, tensor: Tensor) -> None:
            self.register_buffer(name, tensor.to(token.device), persistent=False)

        self.register_dictionaries(dictionaries, rows)
        buffer("extent", torch.zeros((), dtype=torch.int64))
        buffer("encoder", torch.zeros(rows, width))
        buffer("bias", torch.zeros(rows))
        buffer("threshold", torch.full((rows,), inf))
        buffer("decoder", torch.zeros(rows, width))
        buffer("edits", torch.tensor(IDENTITY_EDIT)[:, None].repeat(layout.stages, entries, 1, rows))
        buffer("entries", torch.tensor(IDENTITY_ENTRY, dtype=torch.float64).repeat(layout.stages, entries, 1))
        self.register_buffer("token", token, persistent=False)
        buffer("activations", torch.zeros(max_tokens, rows))
        for flags in ("edited", "rejected"):
            buffer(flags, torch.zeros(layout.stages, max_tokens, rows, dtype=torch.bool))
        # The graph writes the residuals of every token, so that it does not depend on what is captured: tokens that no
        # request captures all write to index 0.
        captured = 1 + (layout.capture_tokens or max_tokens)
        buffer("before", torch.zeros(captured, width))
        buffer("after", torch.zeros(captured, width))

    def register_dictionaries(self, dictionaries: Mapping[str, SAE], rows: int) -> None:
        """Hold whole SAEs: each row place then has a normalisation, and a column in their concatenated activations."""
        self.dictionaries = tuple(dictionaries.values())
        sizes = [sae.latents for sae in self.dictionaries]
        self.first_columns = dict(zip(dictionaries, (sum(sizes[:i]) for i in range(len(sizes))), strict=True))
        self.normalisations = tuple({sae.normalisation for sae in self.dictionaries} - {Normalisation.NONE})
        device = self.sequences.state.device
        self.register_buffer("normalisation", torch.zeros(rows, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("column", torch.full((rows,), -1, device=device), persistent=False)

    def allocate_layer_input(self) -> None:
        """Allocate a buffer [max tokens, d] for the layer's input: a site behind the attention branch adds to it."""
        shape = len(self.activations), self.width
        self.register_buffer("layer_input", self.activations.new_zeros(shape), persistent=False)

    def reject(self, tokens: Tensor) -> None:
        """Count the edits of tokens [T], bool, as rejected: what the model made of them is not finite."""
        edited, rejected = self.edited[:, : len(tokens)], self.rejected[:, : len(tokens)]
        lost = edited & tokens[:, None]
        rejected.logical_or_(lost)
        edited.logical_and_(~lost)

    def fill(self, places: Tensor, rows: Rows, name: str, latents: Tensor) -> None:
        """Load row places [n] with latents [n] of the bundle `name`, or with a client's own rows if it is empty.

        All tensors are on the bank's device.
        """
        for buffer, value in zip((self.encoder, self.bias, self.threshold, self.decoder), rows, strict=True):
            buffer.index_copy_(0, places, value)
        if not self.dictionaries:
            return
        sae = dict(zip(self.first_columns, self.dictionaries, strict=True)).get(name)
        kind = sae.normalisation if sae else Normalisation.NONE
        number = 1 + self.normalisations.index(kind) if kind in self.normalisations else 0
        self.normalisation.index_fill_(0, places, number)
        if sae is not None and not sae.exact:
            self.column.index_copy_(0, places, self.first_columns[name] + latents)
        else:
            self.column.index_fill_(0, places, -1)

    def gains(self, x: Tensor) -> Tensor | None:
        """Factor of each normalisation on its rows' input [T, kinds], the first 1; None where it is 1 for all rows."""
        if not self.normalisations:
            return None
        return torch.cat([torch.ones_like(x[:, :1]), *(input_gain(x, kind) for kind in self.normalisations)], 1)

    def encode(self, x: Tensor, gain: Tensor | None) -> Tensor:
        """Activations f [T, K] of x [T, d].

        With a selection such as TopK, other latents decide whether a latent is active: its activation is taken from an
        encode of its whole dictionary.
        """
        rows = Rows(self.encoder, self.bias, self.threshold, self.decoder)
        f, encoded = activations(x, rows, gain, self.product(inner=False)), self.encoded(x)
        return f if encoded is None else torch.where(self.column >= 0, encoded[:, self.column.clamp_min(0)], f)

    def encoded(self, x: Tensor) -> Tensor | None:
        """Activations [T, F] of the site's whole dictionaries; None where no row takes its own from there."""
        if all(sae.exact for sae in self.dictionaries):
            return None
        return torch.cat([sae.encode(x) for sae in self.dictionaries], 1)

    def product(self, *, inner: bool) -> Product:
        """The matrix product in which row places are the inner dimension, or else the last."""
        if not self.on_cpu:
            return torch.matmul
        return lambda a, b: extent_product(a, b, self.extent, inner)

    def forward(self, x: Tensor) -> Tensor:
        """Displacement x' - x [T, d] of x [T, d], both float32; T includes the padding of the batch."""
        move_stage = self.move_by_kernels if self.by_kernels else self.move_by_formula
        displacement = move_stage(0, x)
        for stage in range(1, self.stages):
            displacement = displacement + move_stage(stage, x + displacement)
        return displacement

    def move_by_formula(self, stage: int, x: Tensor) -> Tensor:
        """Displacement [T, d] by one stage, whose input is x [T, d], as PyTorch operations."""
        tokens = x.shape[0]
        token = self.token[:, :tokens].long()
        columns = by_name(token, TOKEN, 0)
        gains = self.gains(x)
        gain = None if gains is None else gains[:, self.normalisation]
        read = self.encode(x, gain)
        # What cannot be read is reported as such.
        f = torch.where(read.isnan(), 0.0, read)
        entry = self.entries[stage, columns["entry"]]
        edits = self.edits[stage, columns["entry"]]
        is_open = self.gate(stage, f, edits, entry, token)
        move, edited, rejected = bounded_edit(
            x, read, self.decoder, edits, entry, is_open, gain, self.product(inner=True), self.limit
        )
        write_stage(self.edited, stage, edited)
        write_stage(self.rejected, stage, rejected)
        if stage == 0:
            self.activations[:tokens].copy_(read)
            self.before.index_copy_(0, columns["capture"], x)
        if stage == self.stages - 1:
            self.after.index_copy_(0, columns["capture"], x + move)
        return move

    def move_by_kernels(self, stage: int, x: Tensor) -> Tensor:
        """Displacement [T, d] by one stage, whose input is x [T, d], as Triton kernels."""
        s = self.sequences
        move: Tensor = torch.ops.rudder.steer_stage.default(
            x, self.encoder, self.bias, self.threshold, self.decoder, self.edits, self.entries, self.token,
            self.extent, self.activations, self.edited, self.rejected, self.before, self.after, s.state, s.latched,
            s.ring, s.is_open, s.token_state, s.token_alarms, s.token_score, s.max_length,
            self.normalisation, self.column, self.gains(x), self.encoded(x), self.limit, stage, self.keeps_sequences,
        )  # fmt: skip
        return move

    def gate(self, stage: int, f: Tensor, edits: Tensor, entry: Tensor, token: Tensor) -> Tensor:
        """Whether the program's gate is open at each token [T].

        A gate is evaluated at its own site; the sites behind it in the forward pass read the result from `sequences`.
        """
        tokens = f.shape[0]
        sequences = self.sequences
        p = by_name(entry_group(entry, GATE), GATE)
        holds = (p["triggers"] == 0) | (f > edits[:, TRIGGER]).any(1)
        here = p["gated"] > 0
        if self.keeps_sequences:
            before = sequences.state[stage], sequences.latched[stage], sequences.ring[stage]
            condition, state, alarms, score = self.condition(f, entry, token, *before)
            holds = holds & ((p["sequence"] == 0) | condition)
            for name, value in (("token_state", state), ("token_alarms", alarms), ("token_score", score)):
                buffer = getattr(sequences, name)
                write_stage(buffer, stage, torch.where(here, value, buffer[stage, :tokens]))
        is_open = torch.where(here, holds, sequences.is_open[stage, :tokens])
        write_stage(sequences.is_open, stage, is_open)
        return is_open

    def condition(
        self, f: Tensor, entry: Tensor, token: Tensor, state: Tensor, latched: Tensor, ring: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`sequence_condition`, with as many scan steps as this step needs on a CPU, as any step may need elsewhere."""
        if not self.on_cpu:
            return sequence_condition(f, entry, token, state, latched, ring, self.scan_steps)
        max_length = self.sequences.max_length
        result: tuple[Tensor, Tensor, Tensor, Tensor] = length_bounded_condition(
            f, entry, token, state, latched, ring, max_length
        )
        return result
