"""Invalid programs are refused, naming the field at fault."""

from contextlib import suppress
from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from rudder.server.program import wire
from rudder.server.program.compile import EditLimits, compile_program
from rudder.server.program.errors import MAX_MAGNITUDE, ProgramError
from rudder.v1 import program_pb2
from tests.unit.programs import (
    ADD,
    EARLY,
    LOCKED,
    OTHER,
    PROBE,
    REGISTRY,
    SITE,
    SPREAD,
    VECTOR,
    at,
    editing,
    feature,
    gated,
    program,
    sequential,
    statistic,
)
from tests.unit.reference import BUNDLE, WIDTH

LONG_NAME = "n" * 129
LONG = {"vector": {"values": [1.0] * (WIDTH + 1)}}
ZERO = {"vector": {"values": [0.0] * WIDTH}}
NAN = {"vector": {"values": ["NaN"] * WIDTH}}
HUGE = {"vector": {"values": [3e38] * WIDTH}}


Refusal = tuple[dict[str, Any], str, str]


SITES, EDIT, BLEND, GATE = "sites[0]", "sites[0].edits[0]", "sites[0].blend", "gate"
REFUSALS: list[Refusal] = [
    ({}, "sites", "FIELD_INVALID"),
    (at(), SITES, "FIELD_INVALID"),
    (at(restore_norm=True), SITES, "FIELD_INVALID"),
    (at(edits=[ADD] * 6), "sites", "FIELD_INVALID"),
    (at("", edits=[ADD]), f"{SITES}.site", "SITE_UNKNOWN"),
    (at("layers.7.resid_post", edits=[ADD]), f"{SITES}.site", "SITE_UNKNOWN"),
    ({"sites": [{"site": SITE, "edits": [ADD]}] * 2}, "sites[1].site", "FIELD_INVALID"),
    (at(edits=[ADD], max_displacement=0.0), f"{SITES}.max_displacement", "FIELD_INVALID"),
    (at(edits=[ADD], max_displacement=-1.0), f"{SITES}.max_displacement", "FIELD_INVALID"),
    (at(edits=[ADD], max_displacement="NaN"), f"{SITES}.max_displacement", "FIELD_INVALID"),
    (at(edits=[ADD], max_displacement="Infinity"), f"{SITES}.max_displacement", "FIELD_INVALID"),
    ({"name": LONG_NAME, **at(edits=[ADD])}, "name", "FIELD_INVALID"),
    (
        editing(row={"vector": {"name": LONG_NAME, "values": [1.0] * WIDTH}}, add=1),
        f"{EDIT}.row.vector.name",
        "FIELD_INVALID",
    ),
    (
        editing(row={"probe": {"name": LONG_NAME, "weights": [1.0] * WIDTH}}, add=1),
        f"{EDIT}.row.probe.name",
        "FIELD_INVALID",
    ),
    (
        at(blend={"vector": {"name": LONG_NAME, "values": [1.0] * WIDTH}, "weight": 0.5}),
        f"{BLEND}.vector.name",
        "FIELD_INVALID",
    ),
    (editing(), f"{EDIT}.operation", "FIELD_INVALID"),
    (editing(row={}, add=1), f"{EDIT}.row", "FIELD_INVALID"),
    (editing(row=feature(6), add=1), f"{EDIT}.row.feature.index", "FEATURE_UNKNOWN"),
    (editing(row=feature(0, "unknown"), add=1), f"{EDIT}.row.feature.bundle", "FEATURE_UNKNOWN"),
    (editing(row=feature(0, "one"), add=1), f"{EDIT}.row.feature.bundle", "FIELD_INVALID"),
    (at(EARLY, edits=[ADD]), f"{EDIT}.row.feature.bundle", "FEATURE_UNKNOWN"),
    (editing(row=feature(5), add=1), f"{EDIT}.row", "ROW_LOCKED"),
    (editing(row=feature(4), add=1), f"{EDIT}.row", "FIELD_INVALID"),
    (editing(row=PROBE, add=1), f"{EDIT}.row", "FIELD_INVALID"),
    (editing(row=LONG, add=1), f"{EDIT}.row.vector.values", "FIELD_INVALID"),
    (editing(row=ZERO, add=1), f"{EDIT}.row.vector.values", "FIELD_INVALID"),
    (editing(row=NAN, add=1), f"{EDIT}.row.vector.values", "FIELD_INVALID"),
    (editing(row=HUGE, add=1), f"{EDIT}.row.vector.values", "FIELD_INVALID"),
    (editing(row=VECTOR, scale=1), f"{EDIT}.scale", "FIELD_INVALID"),
    (editing(row=VECTOR, add=1, when_above=0), f"{EDIT}.when_above", "FIELD_INVALID"),
    (editing(row=VECTOR, add=1, unit="UNIT_MAX_ACTIVATION"), f"{EDIT}.unit", "FIELD_INVALID"),
    (editing(row=feature(1), add=1, unit="UNIT_MAX_ACTIVATION"), f"{EDIT}.unit", "FIELD_INVALID"),
    (editing(add="NaN"), f"{EDIT}.add", "FIELD_INVALID"),
    (editing(set="Infinity"), f"{EDIT}.set", "FIELD_INVALID"),
    (editing(clamp="-Infinity"), f"{EDIT}.clamp", "FIELD_INVALID"),
    (editing(cap=1e39), f"{EDIT}.cap", "FIELD_INVALID"),
    (editing(floor=0.5 * MAX_MAGNITUDE, unit="UNIT_MAX_ACTIVATION"), f"{EDIT}.floor", "FIELD_INVALID"),
    (editing(ablate=False), f"{EDIT}.ablate", "FIELD_INVALID"),
    (editing(scale=2, unit="UNIT_RESIDUAL_NORM"), f"{EDIT}.unit", "FIELD_INVALID"),
    (editing(add=1, unit=17), f"{EDIT}.unit", "FIELD_INVALID"),
    (editing(add=1, phase=17), f"{EDIT}.phase", "FIELD_INVALID"),
    (editing(add=1, when_above="NaN"), f"{EDIT}.when_above", "FIELD_INVALID"),
    (at(edits=[ADD, ADD]), "sites[0].edits[1].row", "FIELD_INVALID"),
    (at(edits=[ADD | {"phase": "PHASE_PROMPT"}, ADD]), "sites[0].edits[1].row", "FIELD_INVALID"),
    (at(edits=[ADD, {"row": feature(0, BUNDLE), "scale": 2}]), "sites[0].edits[1].row", "FIELD_INVALID"),
    (at(blend={"weight": 1.01}), f"{BLEND}.weight", "FIELD_INVALID"),
    (at(blend={"weight": -0.01}), f"{BLEND}.weight", "FIELD_INVALID"),
    (at(blend={"weight": "NaN"}), f"{BLEND}.weight", "FIELD_INVALID"),
    (at(blend={"weight": 1, "phase": 9}), f"{BLEND}.phase", "FIELD_INVALID"),
    (at(blend={"weight": 1, "bundle": "unknown"}), f"{BLEND}.bundle", "FEATURE_UNKNOWN"),
    (at(blend={"weight": 1, "bundle": "one"}), f"{BLEND}.bundle", "FIELD_INVALID"),
    (at(blend={"weight": 1, "vector": LONG["vector"]}), f"{BLEND}.vector.values", "FIELD_INVALID"),
    (gated(), GATE, "FIELD_INVALID"),
    (gated(site="", any_of=[{"row": PROBE}]), "gate.site", "SITE_UNKNOWN"),
    (gated(site=OTHER, any_of=[{"row": PROBE}]), "sites[0].site", "FIELD_INVALID"),
    (gated(any_of=[{"row": VECTOR}]), "gate.any_of[0].row", "FIELD_INVALID"),
    (gated(any_of=[{"row": PROBE}, {}]), "gate.any_of[1].row", "FIELD_INVALID"),
    (gated(any_of=[{"row": PROBE, "above": "NaN"}]), "gate.any_of[0].above", "FIELD_INVALID"),
    (gated(any_of=[{"row": {"probe": {"weights": [1.0]}}}]), "gate.any_of[0].row.probe.weights", "FIELD_INVALID"),
    (
        gated(any_of=[{"row": {"probe": PROBE["probe"] | {"bias": "NaN"}}}]),
        "gate.any_of[0].row.probe.bias",
        "FIELD_INVALID",
    ),
    (gated(any_of=[{"row": feature(i)} for i in (0, 1, 2, 3, 4)]), "sites", "FIELD_INVALID"),
    (gated(site=SITE, sequence={"score": PROBE}), "gate.sequence.statistic", "FIELD_INVALID"),
    (
        {"sites": [{"site": OTHER, "blend": {"bundle": "one", "weight": 1}}]}
        | {"gate": {"site": OTHER, "sequence": {"score": PROBE, "share": {}}}},
        "gate.sequence",
        "FIELD_INVALID",
    ),
    (sequential(score={}), "gate.sequence.score", "FIELD_INVALID"),
    (sequential(score=VECTOR), "gate.sequence.score", "FIELD_INVALID"),
    (sequential(level="NaN"), "gate.sequence.level", "FIELD_INVALID"),
    (sequential(level=1), "gate.sequence.level", "FIELD_INVALID"),
    (sequential(share={"above": "NaN"}), "gate.sequence.share.above", "FIELD_INVALID"),
]


REFUSALS += [
    (statistic("moving_average", decay=0), "gate.sequence.moving_average.decay", "FIELD_INVALID"),
    (statistic("moving_average", decay=1), "gate.sequence.moving_average.decay", "FIELD_INVALID"),
    (statistic("moving_average", decay="NaN"), "gate.sequence.moving_average.decay", "FIELD_INVALID"),
    (statistic("window", tokens=0), "gate.sequence.window.tokens", "FIELD_INVALID"),
    (statistic("window", tokens=9), "gate.sequence.window.tokens", "FIELD_INVALID"),
    (statistic("cusum", drift="Infinity"), "gate.sequence.cusum.drift", "FIELD_INVALID"),
]


@pytest.mark.parametrize(("document", "field", "reason"), REFUSALS, ids=[f"{i}-{r[1]}" for i, r in enumerate(REFUSALS)])
def test_refusal_names_the_field(document: dict[str, Any], field: str, reason: str) -> None:
    message = json_format.ParseDict(document, program_pb2.Program())
    with pytest.raises(ProgramError) as caught:
        compile_program(message, REGISTRY, limits=EditLimits(LOCKED), field="steering.program")
    assert (caught.value.field, caught.value.reason) == (f"steering.program.{field}", reason)


ACCEPTED = [
    at(edits=[ADD | {"add": MAX_MAGNITUDE}]),
    at(edits=[{"row": feature(i), "add": 1} for i in (0, 1, 2, 3)]),
    at(blend={"weight": 0}),
    at(blend={"weight": 1}),
    at(OTHER, blend={"weight": 1, "bundle": "two"}),
    statistic("window", tokens=8),
    sequential(level=0),
    gated(site=EARLY, any_of=[{"row": PROBE, "above": -1}]),
]


@pytest.mark.parametrize("document", ACCEPTED)
def test_values_at_the_limits_are_accepted(document: dict[str, Any]) -> None:
    assert compile_program(json_format.ParseDict(document, program_pb2.Program()), REGISTRY).digest


def test_row_is_editable_unless_locked() -> None:
    assert compile_program(program({"row": feature(5), "ablate": True}), REGISTRY).sites[0].edits


def test_locked_row_is_refused_by_name() -> None:
    with pytest.raises(ProgramError, match=r"sites\[0\]\.edits\[1\]\.row: feature 5 of toy is locked") as caught:
        compile_program(program(ADD, {"row": feature(5), "ablate": True}), REGISTRY, limits=EditLimits(LOCKED))
    assert caught.value.reason == "ROW_LOCKED"


def test_gate_reads_a_locked_row_only_if_it_may() -> None:
    message = program(ADD, gate={"site": SITE, "any_of": [{"row": feature(5), "above": 1}]})
    assert compile_program(message, REGISTRY, limits=EditLimits(LOCKED, reads_locked=True)).sites[0].gate
    with pytest.raises(ProgramError, match=r"gate\.any_of\[0\]\.row: feature 5 of toy is locked"):
        compile_program(message, REGISTRY, limits=EditLimits(LOCKED))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_message_compiles_or_is_refused(changes: list[tuple[int, int]]) -> None:
    data = bytearray(json_format.ParseDict(SPREAD, program_pb2.Program()).SerializeToString())
    for at_byte, value in changes:
        data[at_byte % len(data)] = value
    message = program_pb2.Program()
    try:
        message.ParseFromString(bytes(data))
    except DecodeError:
        return
    with suppress(ProgramError):
        result = compile_program(message, REGISTRY)
        wire.encode(wire.Request(1, 2, True, (result.sites,)))


def test_program_with_too_many_edits_is_refused() -> None:
    message = program()
    message.sites[0].edits.extend([program_pb2.Edit()] * 100_000)
    with pytest.raises(ProgramError, match="100000 edits"):
        compile_program(message, REGISTRY)


def test_feature_without_a_bundle_is_of_the_first_that_is_served_at_the_site() -> None:
    (first, *others) = [name for name, each in REGISTRY.dictionaries.items() if each.site == OTHER]
    assert others
    message = json_format.ParseDict(at(OTHER, edits=[ADD]), program_pb2.Program())
    assert [row.bundle for site in compile_program(message, REGISTRY).sites for row in site.rows] == [first]
