"""Names of the steering formula's parameters (the arithmetic is in `edit.py`), and the operations that set them.

Imports no torch: a program is checked and compiled without it.
"""

from collections.abc import Callable
from math import inf

# Stands for minus infinity where it is multiplied by a decay of 0, which would make a NaN of -inf.
NO_FLOOR = -1e300
# Parameters of an entry on a row, float32 [E, len(EDIT), K].
EDIT = ("scale", "shift", "lower", "upper", "above", "relative", "trigger")
# `above` is inf: an activation that overflows, of a row that another request brought, must not edit this token.
IDENTITY_EDIT = (1.0, 0.0, -inf, inf, inf, 0.0, inf)
# Parameters of an entry as a whole, float64 [E, len(ENTRY)]: sequence state must not depend on how a prompt is chunked.
DISPLACEMENT = ("weight", "blend_row", "restore", "cap")
GATE = ("gated", "triggers", "sequence")
STATISTIC = (
    "score", "binarise", "binary", "decay", "gain", "offset", "floor", "window", "level", "level_rate", "min_tokens",
    "latch",
)  # fmt: skip
ENTRY = (*DISPLACEMENT, *GATE, *STATISTIC)
IDENTITY_ENTRY = tuple({"cap": inf, "decay": 1.0, "floor": NO_FLOOR}.get(name, 0.0) for name in ENTRY)
# Metadata of each token of a step, int32 [len(TOKEN), max tokens]: the entry in force, the slot of its request, the
# batch index of the request's first token in this step, the count of the request's tokens up to this one (without
# BOS and excluded positions, which have entry 0), and the token's index in the capture buffers (0: it is not captured).
TOKEN = ("entry", "slot", "start", "count", "capture")
# Parameters of EDIT that an operation sets from its operand. Nothing after this table knows operations by name.
OPERATIONS: dict[str, Callable[[float], dict[str, float]]] = {
    "add": lambda v: {"shift": v},
    "set": lambda v: {"scale": 0.0, "shift": v},
    "ablate": lambda _: {"scale": 0.0},
    "scale": lambda v: {"scale": v},
    "cap": lambda v: {"upper": v},
    "floor": lambda v: {"lower": v},
    "clamp": lambda v: {"scale": 0.0, "shift": v, "above": 0.0},
}
# Parameters of STATISTIC that a sequence statistic sets from its operand: of the state
# s_t = max(floor, decay * s_{t-1} + gain * u_t + offset), or of a window. CUSUM: Page, "Continuous inspection
# schemes", Biometrika 1954.
STATISTICS: dict[str, Callable[[float], dict[str, float]]] = {
    "share": lambda above: {"binary": above},
    "moving_average": lambda decay: {"decay": 1.0 - decay, "gain": decay},
    "window": lambda tokens: {"window": tokens},
    "cusum": lambda drift: {"offset": -drift, "floor": 0.0},
}
