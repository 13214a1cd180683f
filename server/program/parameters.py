"""Parameters of the steering formula for a compiled program: the values that the worker writes into the bank's tables.

Plain numpy, since the server process computes its self-test's reference from them without importing the worker.
"""

from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from rudder.sae_models.operations import EDIT, ENTRY, IDENTITY_EDIT, IDENTITY_ENTRY
from rudder.server.program import wire

TRIGGER = EDIT.index("trigger")
# The other columns of EDIT are fields of wire.Edit: [columns, 1], to be indexed together with row places.
EDIT_FIELDS = tuple(name for name in EDIT if name != "trigger")
EDIT_COLUMNS = np.array([[EDIT.index(name)] for name in EDIT_FIELDS])
values_of = attrgetter(*EDIT_FIELDS)
SEQUENCE_FIELDS = ("decay", "gain", "offset", "floor", "window", "level", "level_rate", "min_tokens", "latch")


def edit_parameters(site: wire.Site, places: list[int], rows: int, prompt: bool) -> NDArray[np.float32]:
    """Return EDIT parameters [len(EDIT), rows] for prompt tokens or generated ones; places[i] is row i's place."""
    table = np.repeat(np.array(IDENTITY_EDIT, np.float32)[:, None], rows, 1)
    edits = [e for e in site.edits if (e.prompt if prompt else e.generated)]
    if edits:
        table[EDIT_COLUMNS, [places[e.row] for e in edits]] = np.array([values_of(e) for e in edits], np.float32).T
    for row, above in site.gate.triggers if site.gate else ():
        table[TRIGGER, places[row]] = above
    return table


def entry_parameters(site: wire.Site, places: list[int], prompt: bool) -> NDArray[np.float64]:
    """Return ENTRY parameters [len(ENTRY)] for prompt tokens or generated ones; places[i] is row i's place."""
    p = dict(zip(ENTRY, IDENTITY_ENTRY, strict=True))
    p |= {"restore": float(site.restore_norm), "cap": site.max_displacement}
    blend = site.blend
    if blend and (blend.prompt if prompt else blend.generated):
        p |= {"weight": blend.weight, "blend_row": places[blend.row]}
    if site.gate:
        p |= {"gated": 1.0, "triggers": float(bool(site.gate.triggers))}
    if site.gate and site.gate.sequence:
        p |= sequence_parameters(site.gate.sequence, places)
    return np.array([p[name] for name in ENTRY], np.float64)


def sequence_parameters(sequence: wire.Sequence, places: list[int]) -> dict[str, float]:
    """Return the ENTRY parameters that a sequence condition sets."""
    p = {name: float(getattr(sequence, name)) for name in SEQUENCE_FIELDS}
    binary = {} if sequence.binary is None else {"binarise": 1.0, "binary": sequence.binary}
    return p | binary | {"sequence": 1.0, "score": places[sequence.score]}
