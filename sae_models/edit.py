"""The one formula of steering, used by the bank inside the engine and by offline evaluation.

    z = x . encoder + bias                 f = z if z > threshold else 0
    new = clip(scale * f + shift, lower, upper)
    x' = x + sum_rows (new - f) * decoder  where f > above and the gate is open
    x' = x' + weight * (mean - x')         where the gate is open

All of it in fp32 on every token, as a few dense operations: nothing depends on how many programs are in the batch,
nothing allocates state, nothing leaves the device. Shapes: T tokens, d width, K rows.
"""

from collections.abc import Callable
from math import inf

import torch
from torch import Tensor

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
# A product of two matrices.
Product = Callable[[Tensor, Tensor], Tensor]
# What each operation makes of its operand; nothing behind this table knows operations by name.
OPERATIONS: dict[str, Callable[[float], dict[str, float]]] = {
    "add": lambda v: {"shift": v},
    "set": lambda v: {"scale": 0.0, "shift": v},
    "ablate": lambda _: {"scale": 0.0},
    "scale": lambda v: {"scale": v},
    "cap": lambda v: {"upper": v},
    "floor": lambda v: {"lower": v},
    "clamp": lambda v: {"scale": 0.0, "shift": v, "above": 0.0},
}
# What each statistic of a sequence condition makes of its parameter: of the state
# s_t = max(floor, decay * s_{t-1} + gain * u_t + offset), or of a window. CUSUM: Page 1954.
STATISTICS: dict[str, Callable[[float], dict[str, float]]] = {
    "share": lambda above: {"binary": above},
    "moving_average": lambda decay: {"decay": 1.0 - decay, "gain": decay},
    "window": lambda tokens: {"window": tokens},
    "cusum": lambda drift: {"offset": -drift, "floor": 0.0},
}


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
    """How far x [T, d] moves [T, d], and which rows moved it [T, K].

    f [T, K] activations, decoder [K, d], edits [T, len(EDIT), K] and entry [T, len(ENTRY)] the parameters in force at
    each token, is_open [T] the gate; gain [T, K] what each row's input was multiplied by (sae.gain), None: 1.
    """
    scale, shift, lower, upper, above, relative, _ = edits.unbind(1)
    weight, blend_row, restore, cap = entry[:, :4].float().unbind(1)
    norm = x.norm(dim=1, keepdim=True).clamp_min(TINY)
    unit = torch.where(relative > 0, norm if gain is None else norm * gain, 1.0)
    new = torch.minimum(torch.maximum(scale * f + shift * unit, lower * unit), upper * unit)
    delta = torch.where((f > above) & is_open[:, None], new - f, 0.0)
    y = x + product(delta if gain is None else delta / gain, decoder)
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
