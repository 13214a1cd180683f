"""The steering formula of `sae_models/edit.py` for one stage of a site as two Triton kernels, or three where gates may
have a sequence condition.

`products` computes x . encoder, `conditions` the sequence conditions of the requests that have one, and `edits` all
else, one program per token: an idle token reads its activations and writes zeros. No kernel waits for the host, and no
grid depends on values, so that a CUDA graph can capture them. Shapes: T tokens, d width, K row places, E entries, S
stages.
"""

# Triton's language has no types; its constants are written in capitals, as in its documentation.
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
# ruff: noqa: N803

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rudder.sae_models.edit import TINY
from rudder.sae_models.operations import EDIT, ENTRY, TOKEN


def positions(names: Sequence[str], *wanted: str) -> list[tl.constexpr]:
    """Return the positions of `wanted` in `names`, as constants of a kernel."""
    return [tl.constexpr(names.index(name)) for name in wanted]


EDITS, ENTRIES, SMALLEST = tl.constexpr(len(EDIT)), tl.constexpr(len(ENTRY)), tl.constexpr(TINY)
TOKEN_ENTRY, TOKEN_SLOT, TOKEN_START, TOKEN_COUNT, TOKEN_CAPTURE = positions(TOKEN, *TOKEN)
SCALE, SHIFT, LOWER, UPPER, ABOVE, RELATIVE, TRIGGER = positions(EDIT, *EDIT)
WEIGHT, BLEND_ROW, RESTORE, CAP, GATED, TRIGGERS, SEQUENCE = positions(
    ENTRY, "weight", "blend_row", "restore", "cap", "gated", "triggers", "sequence"
)
SCORE, BINARISE, BINARY, DECAY, GAIN, OFFSET, FLOOR = positions(
    ENTRY, "score", "binarise", "binary", "decay", "gain", "offset", "floor"
)
WINDOW, LEVEL, LEVEL_RATE, MIN_TOKENS, LATCH = positions(ENTRY, "window", "level", "level_rate", "min_tokens", "latch")

# A tile of `products`, and its width in x. Split products fill a GPU where a decode step has few tiles; they are summed
# in a fixed order.
TILE_TOKENS, TILE_ROWS, TILE_WIDTH = 32, 32, 64
MAX_SPLITS, TILES, MAX_PARTIAL = 16, 128, 1 << 22
# Row places and scores that a program looks at together.
BLOCK_ROWS, BLOCK_SCORES = 256, 128


@triton.jit
def larger(a, b):
    """Return the larger of two numbers, NaN if one is."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def smaller(a, b):
    """Return the smaller of two numbers, NaN if one is."""
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def norm_of(x):
    """Return the norm of x [d] in float64, at least TINY."""
    wide = x.to(tl.float64)
    return larger(tl.sqrt(tl.sum(wide * wide, 0)), SMALLEST)


@triton.jit
def gain_of(gains, normalisation, t, places, inside, KINDS: tl.constexpr):
    """Return the factor on the input of row places at token t."""
    return tl.load(gains + t * KINDS + tl.load(normalisation + places, mask=inside, other=0))


@triton.jit
def activation(
    partial, bias, threshold, gains, normalisation, encoded, column, t, places, inside, tokens, splits,
    ROWS: tl.constexpr, KINDS: tl.constexpr, LATENTS: tl.constexpr,
):  # fmt: skip
    """Return activations f of row places at token t, 0 outside; NaN where x is not finite."""
    z = places.to(tl.float32) * 0.0
    for split in range(splits):
        z += tl.load(partial + (split * tokens + t) * ROWS + places, mask=inside, other=0.0)
    if KINDS:
        z = z * gain_of(gains, normalisation, t, places, inside, KINDS)
    z = z + tl.load(bias + places, mask=inside, other=0.0)
    f = tl.where(z <= tl.load(threshold + places, mask=inside, other=float("inf")), 0.0, z)
    if LATENTS:
        latent = tl.load(column + places, mask=inside, other=-1)
        f = tl.where(latent >= 0, tl.load(encoded + t * LATENTS + latent, mask=latent >= 0, other=0.0), f)
    return f


@triton.jit
def number(f):
    """Return f as edits, gates and conditions take it: 0 where it is NaN."""
    return tl.where(f == f, f, 0.0)


@triton.jit(do_not_specialize=["tokens", "chunk"])
def products(
    x, encoder, token, extent, partial, tokens, chunk, max_tokens,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr,
    TILE_TOKENS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_WIDTH: tl.constexpr,
):  # fmt: skip
    """Compute one tile of x . encoder over one part of the width.

    Left out where no row place is in use, and behind the first stage where no token has a program.
    """
    t = tl.program_id(0).to(tl.int64) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    rows = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    split = tl.program_id(2).to(tl.int64)
    present = t < tokens
    needed = tl.program_id(1) * TILE_ROWS < tl.load(extent)
    if not FIRST:
        needed = needed & (tl.max(tl.load(token + TOKEN_ENTRY * max_tokens + t, mask=present, other=0), 0) > 0)
    if needed:
        total = tl.zeros([TILE_TOKENS, TILE_ROWS], tl.float32)
        begin = split * chunk
        for first in range(begin, tl.minimum(begin + chunk, WIDTH), TILE_WIDTH):
            columns = first + tl.arange(0, TILE_WIDTH)
            a = tl.load(
                x + t[:, None] * WIDTH + columns[None, :],
                mask=present[:, None] & (columns < WIDTH)[None, :],
                other=0.0,
            )
            b = tl.load(
                encoder + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :],
                mask=(rows < ROWS)[:, None] & (columns < WIDTH)[None, :],
                other=0.0,
            )
            total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
        out = partial + (split * tokens + t)[:, None] * ROWS + rows[None, :]
        tl.store(out, total, mask=present[:, None] & (rows < ROWS)[None, :])


@triton.jit
def window_mean(recent, ring, compact, count, window, WINDOW_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Return the mean of the last `window` scores of a request, of which this step computed compact + 1."""
    total = tl.zeros([BLOCK], tl.float64)
    number = tl.zeros([BLOCK], tl.float64)
    for first in range(0, window, BLOCK):
        back = first + tl.arange(0, BLOCK)
        used = (back < window) & (back < count)
        here = used & (back <= compact)
        before = used & (back > compact)
        total += tl.load(recent + compact - back, mask=here, other=0.0)
        # A count behind the ring's first round is positive: of `count - back` only used ones are read.
        total += tl.load(ring + (count - back) % WINDOW_SIZE, mask=before, other=0.0)
        number += used.to(tl.float64)
    return tl.sum(total, 0) / larger(tl.sum(number, 0), 1.0)


@triton.jit(do_not_specialize=["tokens", "splits"])
def conditions(
    partial, bias, threshold, gains, normalisation, encoded, column, entries, token, max_length,
    state, latched, ring, scores, is_open, token_state, token_alarms, token_score,
    tokens, splits, max_tokens, entry_count, slots, stage,
    ROWS: tl.constexpr, KINDS: tl.constexpr, LATENTS: tl.constexpr, WINDOW_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Evaluate the sequence condition of one request, token by token: the program of its first token runs on over all.

    Writes to is_open whether the condition holds; `edits` adds the triggers. A slot's two entries have one condition.
    """
    first = tl.program_id(0).to(tl.int64)
    slot = tl.load(token + TOKEN_SLOT * max_tokens + first).to(tl.int64)
    p = entries + (stage * entry_count + 2 * slot) * ENTRIES
    begins = tl.load(token + TOKEN_START * max_tokens + first) == first
    if begins & (tl.load(max_length) > 0) & (tl.load(p + SEQUENCE) > 0):
        window, latch = tl.load(p + WINDOW).to(tl.int32), tl.load(p + LATCH)
        value = tl.load(state + stage * slots + slot)
        alarms = tl.load(latched + stage * slots + slot)
        of_slot = ring + (stage * slots + slot) * WINDOW_SIZE
        place, compact, t = tl.load(p + SCORE).to(tl.int64), -1, first
        running = first >= 0
        while running:
            if tl.load(token + TOKEN_ENTRY * max_tokens + t) > 0:
                compact += 1
                count = tl.load(token + TOKEN_COUNT * max_tokens + t)
                f = activation(
                    partial, bias, threshold, gains, normalisation, encoded, column, t, place, place < ROWS, tokens,
                    splits, ROWS, KINDS, LATENTS,
                )  # fmt: skip
                u = number(f).to(tl.float64)
                if tl.load(p + BINARISE) > 0:
                    u = (u > tl.load(p + BINARY)).to(tl.float64)
                moved = tl.load(p + DECAY) * value + (tl.load(p + GAIN) * u + tl.load(p + OFFSET))
                value = larger(tl.load(p + FLOOR), moved)
                statistic = value
                if window > 0:
                    tl.store(scores + first + compact, u)
                    # The loads of other threads must see it.
                    tl.debug_barrier()
                    statistic = window_mean(scores + first, of_slot, compact, count, window, WINDOW_SIZE, BLOCK)
                exceeds = statistic > tl.load(p + LEVEL) + tl.load(p + LEVEL_RATE) * count.to(tl.float64)
                alarm = exceeds & (count.to(tl.float64) >= tl.load(p + MIN_TOKENS))
                alarms += alarm.to(tl.int64)
                holds = tl.where(latch > 0, alarms > 0, alarm)
                tl.store(is_open + stage * max_tokens + t, holds.to(tl.uint8))
                tl.store(token_state + stage * max_tokens + t, statistic)
                tl.store(token_alarms + stage * max_tokens + t, alarms)
                tl.store(token_score + stage * max_tokens + t, u)
            t += 1
            following = tl.load(token + TOKEN_START * max_tokens + t, mask=t < tokens, other=-1)
            running = following == first


@triton.jit(do_not_specialize=["tokens", "splits"])
def edits(
    x, move, partial, bias, threshold, gains, normalisation, encoded, column, decoder, parameters, entries, token,
    extent, activations, edited, rejected, is_open, before, after,
    limit, tokens, splits, max_tokens, entry_count, stage,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, KINDS: tl.constexpr, LATENTS: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Edit one token: read its activations and its entry, evaluate its gate, write its displacement and flags."""
    t = tl.program_id(0).to(tl.int64)
    entry = tl.load(token + TOKEN_ENTRY * max_tokens + t).to(tl.int64)
    used = tl.load(extent).to(tl.int32)
    p = entries + (stage * entry_count + entry) * ENTRIES
    own = parameters + (stage * entry_count + entry) * EDITS * ROWS
    flags = (stage * max_tokens + t) * ROWS
    weight = tl.load(p + WEIGHT).to(tl.float32)
    blend_row = tl.load(p + BLEND_ROW).to(tl.int64)
    blended = tl.where(weight > 0, blend_row, -1)
    triggered, eligible = 0, 0
    for first in range(0, ROWS, BLOCK_ROWS):
        places = first + tl.arange(0, BLOCK_ROWS)
        inside = places < ROWS
        f = tl.zeros([BLOCK_ROWS], tl.float32)
        lost = tl.zeros([BLOCK_ROWS], tl.uint8)
        if first < used:
            # Behind the first stage, `products` may have left out a token of entry 0, whose f is not used.
            f = activation(
                partial, bias, threshold, gains, normalisation, encoded, column, t, places, inside & (places < used),
                tokens, splits, ROWS, KINDS, LATENTS,
            )  # fmt: skip
            if entry > 0:
                trigger = tl.load(own + TRIGGER * ROWS + places, mask=inside, other=float("inf"))
                above = tl.load(own + ABOVE * ROWS + places, mask=inside, other=float("inf"))
                triggered += tl.sum((number(f) > trigger).to(tl.int32), 0)
                eligible += tl.sum((number(f) > above).to(tl.int32), 0)
                lost = ((f != f) & ((above < float("inf")) | (places == blended))).to(tl.uint8)
        if FIRST:
            tl.store(activations + t * ROWS + places, f, mask=inside)
        tl.store(edited + flags + places, tl.zeros([BLOCK_ROWS], tl.uint8), mask=inside)
        tl.store(rejected + flags + places, lost, mask=inside)

    opened = tl.load(is_open + stage * max_tokens + t) != 0
    if tl.load(p + GATED) > 0:
        in_sequence = (tl.load(p + SEQUENCE) == 0) | opened
        opened = in_sequence & ((tl.load(p + TRIGGERS) == 0) | (triggered > 0))
        tl.store(is_open + stage * max_tokens + t, opened.to(tl.uint8))

    columns = tl.arange(0, BLOCK_WIDTH)
    present = columns < WIDTH
    displacement = tl.zeros([BLOCK_WIDTH], tl.float32)
    if (entry > 0) & opened & ((eligible > 0) | (weight != 0)):
        here = tl.load(x + t * WIDTH + columns, mask=present, other=0.0)
        norm = norm_of(here)
        total = tl.zeros([BLOCK_WIDTH], tl.float32)
        for first in range(0, used, BLOCK_ROWS):
            places = first + tl.arange(0, BLOCK_ROWS)
            inside = (places < ROWS) & (places < used)
            f = activation(
                partial, bias, threshold, gains, normalisation, encoded, column, t, places, inside, tokens, splits,
                ROWS, KINDS, LATENTS,
            )  # fmt: skip
            f = number(f)
            gain = tl.full([BLOCK_ROWS], 1.0, tl.float32)
            if KINDS:
                gain = gain_of(gains, normalisation, t, places, inside, KINDS)
            relative = tl.load(own + RELATIVE * ROWS + places, mask=inside, other=0.0)
            unit = tl.where(relative > 0, norm.to(tl.float32) * gain, 1.0)
            new = tl.load(own + SCALE * ROWS + places, mask=inside, other=0.0) * f
            new = new + tl.load(own + SHIFT * ROWS + places, mask=inside, other=0.0) * unit
            new = larger(new, tl.load(own + LOWER * ROWS + places, mask=inside, other=0.0) * unit)
            new = smaller(new, tl.load(own + UPPER * ROWS + places, mask=inside, other=0.0) * unit)
            above = tl.load(own + ABOVE * ROWS + places, mask=inside, other=float("inf"))
            delta = tl.where(f > above, new - f, 0.0)
            changes = delta != 0
            requested = changes | (places == blended)
            tl.store(edited + flags + places, requested.to(tl.uint8), mask=inside)
            step = delta / gain
            row = -1
            for _ in range(tl.sum(changes.to(tl.int32), 0)):
                row = tl.min(tl.where(changes & (places > row), places, ROWS), 0)
                amount = tl.sum(tl.where(places == row, step, 0.0), 0)
                at = decoder + row.to(tl.int64) * WIDTH + columns
                total += amount * tl.load(at, mask=present, other=0.0)
        y = here + total
        if weight != 0:
            y = y + weight * (tl.load(decoder + blend_row * WIDTH + columns, mask=present, other=0.0) - y)
        if tl.load(p + RESTORE) > 0:
            y = y * (norm / norm_of(y)).to(tl.float32)
        displacement = y - here
        # As in the formula, the cap is rounded to float32.
        cap = tl.load(p + CAP).to(tl.float32).to(tl.float64)
        if cap < float("inf"):
            displacement = displacement * smaller(cap * norm / norm_of(displacement), 1.0).to(tl.float32)
        # False also for NaN.
        bounded = tl.abs(here + displacement) <= limit
        if tl.sum((present & (bounded == 0)).to(tl.int32), 0) > 0:
            displacement = tl.zeros([BLOCK_WIDTH], tl.float32)
            # The flags just stored are read by other threads.
            tl.debug_barrier()
            for first in range(0, used, BLOCK_ROWS):
                places = first + tl.arange(0, BLOCK_ROWS)
                inside = (places < ROWS) & (places < used)
                requested = tl.load(edited + flags + places, mask=inside, other=0)
                requested = requested | tl.load(rejected + flags + places, mask=inside, other=0)
                tl.store(rejected + flags + places, requested, mask=inside)
                tl.store(edited + flags + places, tl.zeros([BLOCK_ROWS], tl.uint8), mask=inside)
    tl.store(move + t * WIDTH + columns, displacement, mask=present)

    capture = tl.load(token + TOKEN_CAPTURE * max_tokens + t).to(tl.int64)
    if capture > 0:
        here = tl.load(x + t * WIDTH + columns, mask=present, other=0.0)
        if FIRST:
            tl.store(before + capture * WIDTH + columns, here, mask=present)
        if LAST:
            tl.store(after + capture * WIDTH + columns, here + displacement, mask=present)


def splits_of(tokens: int, rows: int, width: int) -> int:
    """Return the number of parts in which the width of a product is summed: more where there are few tiles."""
    tiles = triton.cdiv(tokens, TILE_TOKENS)
    most = min(MAX_SPLITS, TILES // tiles, MAX_PARTIAL // (tokens * rows), triton.cdiv(width, TILE_WIDTH))
    return max(1, int(most))


def steer_stage(
    x: Tensor, encoder: Tensor, bias: Tensor, threshold: Tensor, decoder: Tensor, parameters: Tensor, entries: Tensor,
    token: Tensor, extent: Tensor, activations: Tensor, edited: Tensor, rejected: Tensor, before: Tensor, after: Tensor,
    state: Tensor, latched: Tensor, ring: Tensor, is_open: Tensor, token_state: Tensor, token_alarms: Tensor,
    token_score: Tensor, max_length: Tensor, normalisation: Tensor, column: Tensor,
    gains: Tensor | None, encoded: Tensor | None, limit: float, stage: int, sequences: bool,
) -> Tensor:  # fmt: skip
    """Return the displacement of x [T, d] by one stage; the buffers are those of `SiteBank` and `Sequences`.

    parameters: `SiteBank.edits`. gains [T, kinds]: the factor of each normalisation, None for 1. encoded [T, F]:
    activations of the site's whole dictionaries, None without one.
    """
    x = x.contiguous()
    (tokens, width), rows, max_tokens = x.shape, len(encoder), token.shape[1]
    move = torch.empty_like(x)
    if not tokens:
        return move
    splits = splits_of(tokens, rows, width)
    partial = x.new_empty(splits, tokens, rows)
    first, last, entry_count = stage == 0, stage == len(entries) - 1, entries.shape[1]
    chunk = triton.cdiv(triton.cdiv(width, TILE_WIDTH), splits) * TILE_WIDTH
    grid = (triton.cdiv(tokens, TILE_TOKENS), triton.cdiv(rows, TILE_ROWS), splits)
    products[grid](
        x, encoder, token, extent, partial, tokens, chunk, max_tokens,
        width, rows, first, TILE_TOKENS, TILE_ROWS, TILE_WIDTH, num_warps=4,
    )  # fmt: skip
    # Arguments of `activation`; a kernel that is compiled without gains or encoded reads neither.
    kinds, latents = 0 if gains is None else gains.shape[1], 0 if encoded is None else encoded.shape[1]
    gains, encoded = x if gains is None else gains.contiguous(), x if encoded is None else encoded.contiguous()
    inputs = (partial, bias, threshold, gains, normalisation, encoded, column)
    is_open = is_open.view(torch.uint8)
    if sequences:
        scores = x.new_empty(tokens, dtype=torch.float64)
        conditions[(tokens,)](
            *inputs, entries, token, max_length, state, latched, ring, scores, is_open, token_state, token_alarms,
            token_score, tokens, splits, max_tokens, entry_count, state.shape[1], stage,
            rows, kinds, latents, ring.shape[2], BLOCK_SCORES, num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    block = triton.next_power_of_2(width)
    edits[(tokens,)](
        x, move, *inputs, decoder, parameters, entries, token, extent, activations, edited.view(torch.uint8),
        rejected.view(torch.uint8), is_open, before, after, limit, tokens, splits, max_tokens, entry_count,
        stage, width, rows, kinds, latents, first, last, block, min(BLOCK_ROWS, triton.next_power_of_2(rows)),
        num_warps=min(16, max(4, block // 512)), enable_fp_fusion=False,
    )  # fmt: skip
    return move


MUTATED = (
    "activations", "edited", "rejected", "before", "after", "is_open", "token_state", "token_alarms", "token_score",
)  # fmt: skip
LIBRARY = torch.library.Library("rudder", "FRAGMENT")
LIBRARY.define("steer_stage" + torch.library.infer_schema(steer_stage, mutates_args=MUTATED))
for device in ("CUDA", "CPU"):
    # On a CPU only with Triton's interpreter.
    LIBRARY.impl("steer_stage", steer_stage, device)
torch.library.register_fake("rudder::steer_stage", lambda x, *_: torch.empty_like(x), lib=LIBRARY)
