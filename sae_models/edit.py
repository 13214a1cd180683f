"""The formula of steering, computed alike by the bank inside the engine, its self-test and offline evaluation.

    z = x . encoder + bias                 f = z if z > threshold else 0
    new = clip(scale * f + shift, lower, upper)
    x' = x + sum_rows (new - f) * decoder  where f > above and the gate is open
    x' = x' + weight * (mean - x')         where the gate is open

All of it runs in float32 on every token, as a few dense operations: the graph does not depend on how many programs are
in the batch, allocates no state, and never synchronises with the host. A token whose x' is not finite, or has a value
beyond a limit, keeps its x: an overflow would reach other requests through recycled pages of the KV cache. Shapes: T
tokens, d width, K rows.
"""

from collections.abc import Callable, Sequence
from math import inf

import torch
from torch import Tensor

from rudder.sae_models.operations import DISPLACEMENT, EDIT, ENTRY, NO_FLOOR, TOKEN

TINY = 1e-12
# Limit on the values of x': far above any residual stream, and far below the root of the largest float32, so that the
# square of its norm is finite, and that of what the layers behind make of it.
MAX_VALUE = 2.0**40
# A product of two matrices.
Product = Callable[[Tensor, Tensor], Tensor]


def by_name(tensor: Tensor, names: Sequence[str], dim: int = 1) -> dict[str, Tensor]:
    """Return the slices of `tensor` along `dim` by name, as views."""
    return dict(zip(names, tensor.unbind(dim), strict=True))


def entry_group(entry: Tensor, names: Sequence[str]) -> Tensor:
    """Select adjacent columns of entry [T, len(ENTRY)] that begin with names[0], as a view [T, len(names)]."""
    first = ENTRY.index(names[0])
    return entry[:, first : first + len(names)]


def norms(x: Tensor) -> Tensor:
    """Return the norm of each token of x [T, d], float64 [T, 1], at least TINY. Squares of float32 do not overflow."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)
    return norm.clamp_min(TINY)


def edit(
    x: Tensor,
    f: Tensor,
    decoder: Tensor,
    edits: Tensor,
    entry: Tensor,
    is_open: Tensor,
    gain: Tensor | None = None,
    product: Product = torch.matmul,
) -> tuple[Tensor, Tensor]:
    """Return the displacement of x, float32 [T, d], and which rows edited each token, bool [T, K].

    x [T, d] and activations f [T, K], float32; decoder [K, d]; edits [T, len(EDIT), K] and entry [T, len(ENTRY)], the
    parameters in force at each token; is_open [T], the gate; gain [T, K], the factor on each row's input (sae.gain),
    None for 1. A token that would leave `MAX_VALUE` is not edited.
    """
    move, edited, _ = bounded_edit(x, f, decoder, edits, entry, is_open, gain, product, MAX_VALUE)
    return move, edited


def bounded_edit(
    x: Tensor,
    f: Tensor,
    decoder: Tensor,
    edits: Tensor,
    entry: Tensor,
    is_open: Tensor,
    gain: Tensor | None,
    product: Product,
    limit: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Like `edit`, with a limit on the values of x'; also return which edits of each token were rejected, bool [T, K].

    A token is edited by all of its edits or, if x' is not finite or has a value beyond `limit`, by none. Where x is not
    finite itself, which shows as NaN in f, all edits that the token has count as rejected, whatever they would ask for.
    """
    p = by_name(edits, EDIT)
    unread = f.isnan()
    f = torch.where(unread, 0.0, f)
    q = by_name(entry_group(entry, DISPLACEMENT).float(), DISPLACEMENT)
    norm = norms(x)
    unit = norm.float() if gain is None else norm.float() * gain
    unit = torch.where(p["relative"] > 0, unit, 1.0)
    new = torch.minimum(torch.maximum(p["scale"] * f + p["shift"] * unit, p["lower"] * unit), p["upper"] * unit)
    delta = torch.where((f > p["above"]) & is_open[:, None], new - f, 0.0)
    y = x + product(delta if gain is None else delta / gain, decoder)
    weight = torch.where(is_open, q["weight"], 0.0)[:, None]
    blend_row = q["blend_row"].long()
    y = y + weight * (decoder[blend_row] - y)
    # An edit may be huge before the norm is restored or the displacement capped.
    y = y * torch.where(q["restore"][:, None] > 0, (norm / norms(y)).float(), 1.0)
    move = y - x
    move = move * (q["cap"][:, None] * norm / norms(move)).clamp_max(1.0).float()
    places = torch.arange(f.shape[1], device=f.device)
    blended = places == blend_row[:, None]
    requested = (delta != 0) | (blended & (weight > 0))
    lost = unread & ((p["above"] < inf) | (blended & (q["weight"] > 0)[:, None]))
    # False also for NaN.
    within = ((x + move).abs().amax(1) <= limit)[:, None]
    return torch.where(within, move, 0.0), requested & within & ~lost, requested & ~within | lost


def scan(decay: Tensor, shift: Tensor, floor: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compose the maps s -> max(floor, decay * s + shift) over each request's tokens; all float64 [T].

    `start` [T] is the batch index of the first token of a token's request; 2**steps must reach the longest request.
    These maps are closed under composition, so one doubling scan computes share, moving average and CUSUM alike.
    """
    index = torch.arange(decay.shape[0], device=decay.device)
    for step in range(steps):
        earlier = index - (1 << step)
        within = earlier >= start
        earlier = earlier.clamp_min(0)
        decay0 = torch.where(within, decay[earlier], 1.0)
        shift0 = torch.where(within, shift[earlier], 0.0)
        floor0 = torch.where(within, floor[earlier], NO_FLOOR)
        decay, shift, floor = decay * decay0, decay * shift0 + shift, torch.maximum(floor, decay * floor0 + shift)
    return decay, shift, floor


def window_mean(u: Tensor, ring: Tensor, token: Tensor, window: Tensor) -> Tensor:
    """Mean of the last `window` [T] scores u [T] of each token's request, [T].

    ring [slots, W] holds the scores of earlier steps, each at its token's count modulo W.
    """
    t = by_name(token, TOKEN, 0)
    tokens, start, count = u.shape[0], t["start"], t["count"]
    # Scores are numbered by count, not by batch index: tokens of entry 0 are in the batch but are not counted. `first`
    # is where count 0 would be, if the request's counted tokens of this step stood at `start` without gaps.
    counted = t["entry"] > 0
    before = count[start] - counted[start].to(count.dtype)
    first = start - before - 1
    # The scores in that order; those of tokens that are not counted fall behind the last one.
    ordered = u.new_zeros(tokens + 1).scatter(0, torch.where(counted, first + count, tokens), u)
    back = torch.arange(ring.shape[1], device=u.device)
    number = count[:, None] - back
    earlier = ring[t["slot"][:, None], number.remainder(ring.shape[1])]
    here = (first[:, None] + number).clamp(0, tokens)
    scores = torch.where(number > before[:, None], ordered[here], earlier)
    used = (number > 0) & (back < window[:, None])
    return torch.where(used, scores, 0.0).sum(1) / used.sum(1).clamp_min(1)


def sequence_condition(
    f: Tensor, entry: Tensor, token: Tensor, state: Tensor, latched: Tensor, ring: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Evaluate each token's sequence condition: (holds, statistic, alarms, score), [T] each, as after the token.

    The statistic is the state from which the next step continues; that of a window is its mean, as its state is unused.

    f [T, K] activations, entry [T, len(ENTRY)], token [len(TOKEN), T]; state, latched [slots] and ring [slots, W] as
    they were before this step; `steps` as in `scan`.
    """
    p, t = by_name(entry, ENTRY), by_name(token, TOKEN, 0)
    start, count = t["start"], t["count"]
    score = f.double().gather(1, p["score"].long()[:, None])[:, 0]
    score = torch.where(p["binarise"] > 0, (score > p["binary"]).double(), score)
    # A token of entry 0 must pass the state on, whatever another request's row at place 0 makes of it: 0 * inf is NaN.
    score = torch.where(p["sequence"] > 0, score, 0.0)
    decay, shift, floor = scan(p["decay"], p["gain"] * score + p["offset"], p["floor"], start, steps)
    state = torch.maximum(floor, decay * state[t["slot"]] + shift)
    statistic = torch.where(p["window"] > 0, window_mean(score, ring, token, p["window"]), state)
    alarm = (statistic > p["level"] + p["level_rate"] * count) & (count >= p["min_tokens"]) & (p["sequence"] > 0)
    # The request's alarms up to each token: the running sum of the batch, less the sum before its first token.
    running = alarm.long().cumsum(0)
    alarms = running - (running - alarm.long())[start] + latched[t["slot"]]
    return torch.where(p["latch"] > 0, alarms > 0, alarm), statistic, alarms, score
