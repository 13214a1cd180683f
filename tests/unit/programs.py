"""Programs in JSON form, and a registry of the rows that they refer to."""

from typing import Any

import numpy as np
from google.protobuf import json_format

from rudder.server.program import wire
from rudder.server.program.compile import Compiled, compile_program
from rudder.server.program.layout import Layout
from rudder.server.program.rows import Dictionary, Floats, Registry
from rudder.v1 import program_pb2
from tests.unit.reference import BUNDLE, WIDTH

EARLY, SITE, OTHER = "layers.0.resid_post", "layers.1.resid_post", "layers.2.mlp_out"
LAYOUT = Layout((SITE, OTHER, EARLY), rows=4, slots=2, window=8, sequence_sites=(SITE, EARLY))
MAXIMA, NORMS = np.array([4.0, 0.0, 2.0, 8.0, 1.0, 1.0], "<f4"), np.array([1.0, 1.0, 2.0, 1.0, 0.0, 1.0], "<f4")


def vectors_of(latents: int | slice) -> list[Floats]:
    """Encoder and decoder of latents, which are equal here; those of two latents are orthogonal to each other."""
    return 2 * [np.eye(6, WIDTH, dtype="<f4")[latents]]


def dictionary(name: str, site: str, sha256: str = "ab") -> Dictionary:
    """A dictionary of six latents."""
    return Dictionary(name, site, sha256, 6, MAXIMA, NORMS, np.ones(WIDTH, "<f4"), vectors_of)


REGISTRY = Registry(
    LAYOUT,
    WIDTH,
    {d.name: d for d in (dictionary(BUNDLE, SITE), dictionary("one", OTHER), dictionary("two", OTHER))},
    max_edits=5,
)
LOCKED = frozenset({(BUNDLE, 5)})
VECTOR = {"vector": {"name": "joy", "values": [3.0, 4.0] + [0.0] * (WIDTH - 2)}}
PROBE = {"probe": {"name": "lie", "weights": [1.0] * WIDTH, "bias": -0.5}}


def feature(index: int = 0, bundle: str = "") -> dict[str, Any]:
    """A row in JSON form."""
    return {"feature": {"index": index, "bundle": bundle}}


def program(*edits: dict[str, Any], gate: dict[str, Any] | None = None, **site: Any) -> program_pb2.Program:
    """A program with these edits at SITE."""
    document = {"sites": [{"site": SITE, "edits": list(edits)} | site]} | ({"gate": gate} if gate else {})
    return json_format.ParseDict(document, program_pb2.Program())


def compiled(*edits: dict[str, Any], **rest: Any) -> Compiled:
    """Compile a program with these edits at SITE."""
    return compile_program(program(*edits, **rest), REGISTRY)


def edit_of(**edit: Any) -> wire.Edit:
    """Compile a program of one edit, of feature 2 by default, and return the edit."""
    return compiled({"row": feature(2)} | edit).sites[0].edits[0]


ADD = {"row": feature(0), "add": 1.0}


def gated(**gate: Any) -> dict[str, Any]:
    """A program with a gate."""
    return {"sites": [{"site": SITE, "edits": [ADD]}], "gate": {"site": SITE} | gate}


def sequential(**condition: Any) -> dict[str, Any]:
    """A program with a sequence condition."""
    return gated(sequence={"score": PROBE, "share": {}} | condition)


def at(site: str = SITE, **fields: Any) -> dict[str, Any]:
    """A program of one SiteEdits."""
    return {"sites": [{"site": site} | fields]}


def editing(**edit: Any) -> dict[str, Any]:
    """A program of one edit, of feature 0 by default."""
    return at(edits=[{"row": feature(0)} | edit])


def statistic(name: str, **fields: Any) -> dict[str, Any]:
    """A program with a sequence condition on one statistic."""
    return gated(sequence={"score": PROBE, name: fields})


SPREAD: dict[str, Any] = {
    "name": "a",
    "description": "b",
    "sites": [
        {"site": OTHER, "edits": [{"row": feature(1, "two"), "scale": 2}]},
        {"site": SITE, "edits": [{"row": feature(0), "add": 1}], "blend": {"weight": 0.5}},
    ],
    "gate": {"site": SITE, "any_of": [{"row": feature(3), "above": 1}]},
}
