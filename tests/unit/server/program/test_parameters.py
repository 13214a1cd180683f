"""Parameters of compiled programs: each value is in the column of its name, at the place of its row."""

import numpy as np

from rudder.sae_models.operations import EDIT, ENTRY, IDENTITY_EDIT, IDENTITY_ENTRY
from rudder.server.program import wire
from rudder.server.program.parameters import edit_parameters, entry_parameters

ROWS = tuple(wire.Row("sae", latent) for latent in range(3))
EDITS = (
    wire.Edit(0, scale=2.0, shift=3.0, lower=-4.0, upper=5.0, above=0.5, relative=True),
    wire.Edit(1, shift=7.0, generated=False),
)
GATE = wire.Gate(((1, 0.25),), wire.Sequence(2, binary=0.5, decay=0.75, window=4, min_tokens=6, latch=True))
SITE = wire.Site(0, ROWS, EDITS, wire.Blend(2, 0.125, prompt=False), True, 0.5, GATE)
PLACES = [4, 2, 0]


def test_edit_parameters_by_name() -> None:
    identity = dict(zip(EDIT, IDENTITY_EDIT, strict=True))
    trigger = identity | {"trigger": 0.25}
    first = identity | {"scale": 2.0, "shift": 3.0, "lower": -4.0, "upper": 5.0, "above": 0.5, "relative": 1.0}
    second = trigger | {"shift": 7.0, "above": -np.inf}
    for prompt, row_1 in ((True, second), (False, trigger)):
        table = edit_parameters(SITE, PLACES, 6, prompt)
        assert table.dtype == np.float32
        columns = [dict(zip(EDIT, column, strict=True)) for column in table.T.tolist()]
        assert columns == [identity, identity, row_1, identity, first, identity]


def test_entry_parameters_by_name() -> None:
    expected = dict(zip(ENTRY, IDENTITY_ENTRY, strict=True)) | {
        "restore": 1.0, "cap": 0.5, "gated": 1.0, "triggers": 1.0, "sequence": 1.0, "score": 0.0, "binarise": 1.0,
        "binary": 0.5, "decay": 0.75, "gain": 1.0, "window": 4.0, "min_tokens": 6.0, "latch": 1.0,
    }  # fmt: skip
    assert dict(zip(ENTRY, entry_parameters(SITE, PLACES, prompt=True).tolist(), strict=True)) == expected
    blended = expected | {"weight": 0.125, "blend_row": 0.0}
    assert dict(zip(ENTRY, entry_parameters(SITE, PLACES, prompt=False).tolist(), strict=True)) == blended


def test_a_site_without_a_program_has_identity_parameters() -> None:
    assert edit_parameters(wire.Site(0), [], 2, prompt=True).T.tolist() == [list(IDENTITY_EDIT)] * 2
    assert entry_parameters(wire.Site(0), [], prompt=True).tolist() == list(IDENTITY_ENTRY)
