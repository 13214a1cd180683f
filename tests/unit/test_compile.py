"""From programs to numbers: what each operation means, what is refused and by which field, what a digest says."""

import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from rudder.v1 import program_pb2
from sae_models.sae import SAE
from server.engine.layout import Layout
from server.steering import wire
from server.steering.compile import Compiled, compile_program
from server.steering.errors import LARGEST, ProgramError
from server.steering.programs import ProgramFileError, load_programs
from server.steering.rows import Dictionary, Registry, check_capacity
from server.steering.watch import compile_watch, with_watch
from tests.unit.reference import BUNDLE, WIDTH, make_driver, run_step

EARLY, SITE, OTHER = "layers.0.resid_post", "layers.1.resid_post", "layers.2.mlp_out"
LAYOUT = Layout((SITE, OTHER, EARLY), rows=4, slots=2, window=8, sequence_sites=(SITE, EARLY))
MAXIMA, NORMS = np.array([4.0, 0.0, 2.0, 8.0, 1.0, 1.0], "<f4"), np.array([1.0, 1.0, 2.0, 1.0, 0.0, 1.0], "<f4")


def dictionary(name: str, site: str, sha256: str = "ab") -> Dictionary:
    """Six latents."""
    return Dictionary(name, site, sha256, 6, MAXIMA, NORMS, np.ones(WIDTH, "<f4"))


REGISTRY = Registry(
    LAYOUT,
    WIDTH,
    {d.name: d for d in (dictionary(BUNDLE, SITE), dictionary("one", OTHER), dictionary("two", OTHER))},
    max_edits=5,
    locked=frozenset({(BUNDLE, 5)}),
)
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
    """The same, compiled."""
    return compile_program(program(*edits, **rest), REGISTRY)


def edit_of(**edit: Any) -> wire.Edit:
    """The numbers of one edit."""
    return compiled({"row": feature(2)} | edit).sites[0].edits[0]


OPERATIONS = [
    ({"add": 1.5}, {"shift": 1.5}),
    ({"set": 1.5}, {"scale": 0.0, "shift": 1.5}),
    ({"ablate": True}, {"scale": 0.0}),
    ({"scale": -2}, {"scale": -2.0}),
    ({"cap": 1.5}, {"upper": 1.5}),
    ({"floor": 1.5}, {"lower": 1.5}),
    ({"clamp": -1.5}, {"scale": 0.0, "shift": -1.5, "above": 0.0}),
    ({"clamp": -1.5, "when_above": 0.5}, {"scale": 0.0, "shift": -1.5, "above": 0.5}),
    ({"clamp": -1.5, "when_above": -0.5}, {"scale": 0.0, "shift": -1.5, "above": 0.0}),
    ({"add": 1, "when_above": -0.5}, {"shift": 1.0, "above": -0.5}),
    ({"add": 1.5, "unit": "UNIT_MAX_ACTIVATION"}, {"shift": 3.0}),
    ({"add": 1.5, "unit": "UNIT_RESIDUAL_NORM"}, {"shift": 0.75, "relative": True}),
    ({"cap": 1.5, "unit": "UNIT_RESIDUAL_NORM"}, {"upper": 0.75, "relative": True}),
    ({"add": 1, "phase": "PHASE_PROMPT"}, {"shift": 1.0, "generated": False}),
    ({"add": 1, "phase": "PHASE_GENERATED"}, {"shift": 1.0, "prompt": False}),
]


@pytest.mark.parametrize(("edit", "numbers"), OPERATIONS)
def test_operations_compile_to_the_formula(edit: dict[str, Any], numbers: dict[str, Any]) -> None:
    assert edit_of(**edit) == wire.Edit(0, **numbers)


# f of the latent after the edit, where it was 3 and where it was 0.
MEANINGS = [
    ({"add": 1.5}, (4.5, 1.5)),
    ({"set": 1.5}, (1.5, 1.5)),
    ({"ablate": True}, (0.0, 0.0)),
    ({"scale": 2}, (6.0, 0.0)),
    ({"cap": 1.5}, (1.5, 0.0)),
    ({"floor": 1.5}, (3.0, 1.5)),
    ({"clamp": 2.5}, (2.5, 0.0)),
    ({"add": 1.5, "when_above": 3.5}, (3.0, 0.0)),
    ({"add": 1, "unit": "UNIT_MAX_ACTIVATION"}, (7.0, 4.0)),
    ({"add": 2, "unit": "UNIT_RESIDUAL_NORM"}, (3.0 + 2 * 5.0, 2 * 4.0)),
]


@pytest.mark.parametrize(("edit", "after"), MEANINGS)
def test_operations_do_what_they_are_called(edit: dict[str, Any], after: tuple[float, float]) -> None:
    """On an orthonormal latent the edit's result can be read back from x': here the first coordinate."""
    eye, zeros = torch.eye(WIDTH)[:6], torch.zeros(6)
    driver = make_driver(LAYOUT, SAE(eye, zeros, zeros, eye, torch.zeros(WIDTH)))
    stage = compiled({"row": feature(0)} | edit).sites
    driver.admit("r", 1, wire.Request(2, 2, False, (stage,)))
    x = np.zeros((3, 2, WIDTH))
    x[:, 0, 0], x[:, :, 1] = 3.0, 4.0
    moves = run_step(driver, [("r", 0, 2)], {"r": x})["r"]
    assert (x + moves)[1, :, 0] == pytest.approx(after, abs=1e-5)


def test_rows_resolve() -> None:
    result = compiled({"row": VECTOR, "set": 2, "unit": "UNIT_RESIDUAL_NORM"}, {"row": feature(3), "ablate": True})
    vector, latent = result.sites[0].rows
    assert np.frombuffer(vector.decoder, "<f4").tolist()[:2] == [3.0, 4.0]
    assert (vector.encoder, vector.threshold) == (b"", -math.inf)
    assert latent == wire.Row(BUNDLE, 3)
    assert result.sites[0].edits[0].shift == pytest.approx(0.4)


def test_a_vector_adds_itself() -> None:
    driver = make_driver(LAYOUT, SAE(*(torch.zeros(s) for s in ((6, WIDTH), 6, 6, (6, WIDTH), WIDTH))))
    driver.admit("r", 1, wire.Request(1, 1, False, (compiled({"row": VECTOR, "add": 2}).sites,)))
    moves = run_step(driver, [("r", 0, 1)], {"r": np.ones((3, 1, WIDTH))})["r"]
    assert moves[1, 0].tolist() == [6.0, 8.0] + [0.0] * (WIDTH - 2)


def test_names_follow_the_moved_column() -> None:
    document = {
        "sites": [
            {"site": OTHER, "edits": [{"row": feature(1, "two"), "scale": 2}]},
            {
                "site": SITE,
                "edits": [{"row": feature(0), "clamp": -2, "unit": "UNIT_RESIDUAL_NORM"}, {"row": VECTOR, "add": 3}],
                "blend": {"weight": 0.8},
            },
        ],
        "gate": {"site": EARLY, "any_of": [{"row": PROBE, "above": 1}]},
    }
    result = compile_program(json_format.ParseDict(document, program_pb2.Program()), REGISTRY)
    assert [site.site for site in result.sites] == [0, 1, 2]
    assert [(e.site, e.row, e.operation) for e in result.edits] == [
        (SITE, "feature 0 of toy", "clamp -2 residual norms"),
        (SITE, "vector joy", "add 3"),
        (SITE, "mean of toy", "blend 0.8"),
        (OTHER, "feature 1 of two", "scale 2"),
    ]


@pytest.mark.parametrize(
    ("document", "by_phase"),
    [
        ({"edits": [{"row": VECTOR, "add": 1}], "blend": {"weight": 1}}, False),
        ({"edits": [{"row": VECTOR, "add": 1, "phase": "PHASE_PROMPT"}]}, True),
        ({"edits": [{"row": VECTOR, "add": 1}], "blend": {"weight": 1, "phase": "PHASE_GENERATED"}}, True),
    ],
)
def test_by_phase_says_whether_the_prompts_length_matters(document: dict[str, Any], by_phase: bool) -> None:
    message = json_format.ParseDict(at(**document), program_pb2.Program())
    assert compile_program(message, REGISTRY).by_phase == by_phase


def test_one_row_in_two_phases_has_two_places() -> None:
    prompt, generated = (
        {"row": feature(0), "add": v, "phase": f"PHASE_{p}"} for v, p in ((1, "PROMPT"), (2, "GENERATED"))
    )
    site = compiled(prompt, generated).sites[0]
    assert site.rows == (wire.Row(BUNDLE, 0), wire.Row(BUNDLE, 0, copy=1))
    assert [e.row for e in site.edits] == [0, 1]


def test_a_blend_towards_an_edited_vector_has_its_own_place() -> None:
    site = compiled({"row": VECTOR, "add": 1}, blend={"vector": VECTOR["vector"], "weight": 0.5}).sites[0]
    assert site.blend
    assert site.edits[0].row != site.blend.row
    assert site.rows[site.edits[0].row].decoder == site.rows[site.blend.row].decoder


STATISTICS = [
    ({"share": {"above": 0.5}, "level": 0.25}, {"binary": 0.5, "level_rate": 0.25}),
    ({"moving_average": {"decay": 0.25}, "level": 2}, {"decay": 0.75, "gain": 0.25, "level": 2.0}),
    ({"window": {"tokens": 8}, "level": 2}, {"window": 8, "level": 2.0}),
    ({"cusum": {"drift": 0.5}, "level": 2}, {"offset": -0.5, "floor": 0.0, "level": 2.0}),
    ({"cusum": {}, "latch": True, "min_tokens": 3}, {"offset": 0.0, "floor": 0.0, "latch": True, "min_tokens": 3}),
]


@pytest.mark.parametrize(("condition", "numbers"), STATISTICS)
def test_statistics_compile(condition: dict[str, Any], numbers: dict[str, Any]) -> None:
    result = compiled(ADD, gate={"site": SITE, "sequence": {"score": PROBE} | condition})
    gate = result.sites[0].gate
    assert gate
    assert gate.sequence == wire.Sequence(1, **numbers)
    assert result.in_sequence


def test_triggers_share_rows_with_edits_and_the_lowest_threshold_counts() -> None:
    triggers = [{"row": feature(i), "above": above} for i, above in ((0, 2), (3, 1), (0, 1))]
    result = compiled({"row": feature(0), "add": 1}, gate={"site": SITE, "any_of": triggers})
    assert result.sites[0].rows == (wire.Row(BUNDLE, 0), wire.Row(BUNDLE, 3))
    assert result.sites[0].gate == wire.Gate(((0, 1.0), (1, 1.0)))
    assert not result.in_sequence


ADD = {"row": feature(0), "add": 1.0}
LONG = {"vector": {"values": [1.0] * (WIDTH + 1)}}
ZERO = {"vector": {"values": [0.0] * WIDTH}}
NAN = {"vector": {"values": ["NaN"] * WIDTH}}
HUGE = {"vector": {"values": [3e38] * WIDTH}}
Refusal = tuple[dict[str, Any], str, str]


def gated(**gate: Any) -> dict[str, Any]:
    """A program behind a gate."""
    return {"sites": [{"site": SITE, "edits": [ADD]}], "gate": {"site": SITE} | gate}


def sequential(**condition: Any) -> dict[str, Any]:
    """A program behind a sequence condition."""
    return gated(sequence={"score": PROBE, "share": {}} | condition)


def at(site: str = SITE, **fields: Any) -> dict[str, Any]:
    """A program of one SiteEdits."""
    return {"sites": [{"site": site} | fields]}


def editing(**edit: Any) -> dict[str, Any]:
    """A program of one edit, of feature 0 unless it says otherwise."""
    return at(edits=[{"row": feature(0)} | edit])


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
    (editing(), f"{EDIT}.operation", "FIELD_INVALID"),
    (editing(row={}, add=1), f"{EDIT}.row", "FIELD_INVALID"),
    (editing(row=feature(6), add=1), f"{EDIT}.row.feature.index", "FEATURE_UNKNOWN"),
    (editing(row=feature(0, "nobody"), add=1), f"{EDIT}.row.feature.bundle", "FEATURE_UNKNOWN"),
    (editing(row=feature(0, "one"), add=1), f"{EDIT}.row.feature.bundle", "FIELD_INVALID"),
    (at(OTHER, edits=[ADD]), f"{EDIT}.row.feature.bundle", "FIELD_INVALID"),
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
    (editing(floor=0.5 * LARGEST, unit="UNIT_MAX_ACTIVATION"), f"{EDIT}.floor", "FIELD_INVALID"),
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
    (at(blend={"weight": 1, "bundle": "nobody"}), f"{BLEND}.bundle", "FEATURE_UNKNOWN"),
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


def statistic(name: str, **fields: Any) -> dict[str, Any]:
    """A program behind one statistic."""
    return gated(sequence={"score": PROBE, name: fields})


REFUSALS += [
    (statistic("moving_average", decay=0), "gate.sequence.moving_average.decay", "FIELD_INVALID"),
    (statistic("moving_average", decay=1), "gate.sequence.moving_average.decay", "FIELD_INVALID"),
    (statistic("moving_average", decay="NaN"), "gate.sequence.moving_average.decay", "FIELD_INVALID"),
    (statistic("window", tokens=0), "gate.sequence.window.tokens", "FIELD_INVALID"),
    (statistic("window", tokens=9), "gate.sequence.window.tokens", "FIELD_INVALID"),
    (statistic("cusum", drift="Infinity"), "gate.sequence.cusum.drift", "FIELD_INVALID"),
]


@pytest.mark.parametrize(("document", "field", "reason"), REFUSALS, ids=[f"{i}-{r[1]}" for i, r in enumerate(REFUSALS)])
def test_refusals_name_the_field(document: dict[str, Any], field: str, reason: str) -> None:
    message = json_format.ParseDict(document, program_pb2.Program())
    with pytest.raises(ProgramError) as caught:
        compile_program(message, REGISTRY, field="steering.program")
    assert (caught.value.field, caught.value.reason) == (f"steering.program.{field}", reason)


ACCEPTED = [
    at(edits=[ADD | {"add": LARGEST}]),
    at(edits=[{"row": feature(i), "add": 1} for i in (0, 1, 2, 3)]),
    at(blend={"weight": 0}),
    at(blend={"weight": 1}),
    at(OTHER, blend={"weight": 1, "bundle": "two"}),
    statistic("window", tokens=8),
    sequential(level=0),
    gated(site=EARLY, any_of=[{"row": PROBE, "above": -1}]),
]


@pytest.mark.parametrize("document", ACCEPTED)
def test_the_limits_themselves_are_accepted(document: dict[str, Any]) -> None:
    assert compile_program(json_format.ParseDict(document, program_pb2.Program()), REGISTRY).digest


def test_policies_may_edit_locked_rows() -> None:
    assert compile_program(program({"row": feature(5), "ablate": True}), REGISTRY, policy=True).sites[0].edits


SPREAD: dict[str, Any] = {
    "name": "a",
    "description": "b",
    "sites": [
        {"site": OTHER, "edits": [{"row": feature(1, "two"), "scale": 2}]},
        {"site": SITE, "edits": [{"row": feature(0), "add": 1}], "blend": {"weight": 0.5}},
    ],
    "gate": {"site": SITE, "any_of": [{"row": feature(3), "above": 1}]},
}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_message_is_compiled_or_refused_by_field(changes: list[tuple[int, int]]) -> None:
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


def digest(document: dict[str, Any], registry: Registry = REGISTRY) -> str:
    """A program's digest."""
    return compile_program(json_format.ParseDict(document, program_pb2.Program()), registry).digest


def test_the_digest_ignores_names_spelling_and_order() -> None:
    explicit = {
        "site": SITE,
        "edits": [{"row": feature(0, BUNDLE), "add": 1, "unit": "UNIT_ABSOLUTE", "phase": "PHASE_BOTH"}],
    }
    other = SPREAD | {
        "name": "z",
        "description": "",
        "sites": [explicit | {"blend": {"bundle": BUNDLE, "weight": 0.5}}, SPREAD["sites"][0]],
    }
    assert digest(other) == digest(SPREAD)


Change = Callable[[dict[str, Any]], None]
CHANGES: list[Change] = [
    lambda d: d["sites"][1]["edits"][0].update(add=1.5),
    lambda d: d["sites"][1]["edits"][0].update(when_above=0.0),
    lambda d: d["sites"][1]["edits"][0].update(phase="PHASE_PROMPT"),
    lambda d: d["sites"][1]["edits"][0]["row"]["feature"].update(index=2),
    lambda d: d["sites"][1]["blend"].update(weight=0.25),
    lambda d: d["sites"][1].update(restore_norm=True),
    lambda d: d["sites"][1].update(max_displacement=0.5),
    lambda d: d["gate"]["any_of"][0].update(above=2),
    lambda d: d["gate"].update(sequence={"score": PROBE, "share": {}}),
    lambda d: d.pop("gate"),
    lambda d: d["sites"][0]["edits"][0]["row"]["feature"].update(bundle="one"),
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_the_digest_follows_the_numbers(number: int) -> None:
    changed = json_format.MessageToDict(
        json_format.ParseDict(SPREAD, program_pb2.Program()), preserving_proto_field_name=True
    )
    CHANGES[number](changed)
    registry = Registry(LAYOUT, WIDTH, REGISTRY.dictionaries | {"one": dictionary("one", OTHER, "cd")})
    assert digest(changed, registry) != digest(SPREAD, registry)


def test_the_digest_is_of_the_bundles_content_not_its_name() -> None:
    renamed = Registry(LAYOUT, WIDTH, {"new": dictionary("new", SITE)})
    retrained = Registry(LAYOUT, WIDTH, {BUNDLE: dictionary(BUNDLE, SITE, "other")})
    document = at(edits=[ADD])
    assert digest(document, renamed) == digest(document)
    assert digest(document, retrained) != digest(document)


def test_the_digest_does_not_depend_on_other_sites_of_the_layout() -> None:
    alone = Registry(Layout((SITE,)), WIDTH, {BUNDLE: dictionary(BUNDLE, SITE)})
    assert digest(at(edits=[ADD]), alone) == digest(at(edits=[ADD]))


def test_the_digest_is_the_same_in_another_process() -> None:
    code = "from tests.unit.test_compile import *; print(digest(SPREAD))"
    root = Path(__file__).parents[2]
    path = f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'clients/python')!r}]; "
    output = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == digest(SPREAD)


def parsed_row(row: dict[str, Any]) -> program_pb2.Row:
    """A row from its JSON form."""
    return json_format.ParseDict(row, program_pb2.Row())


def test_watched_rows_join_the_program() -> None:
    sites = compiled(ADD).sites
    wanted = [(OTHER, feature(1, "two")), (SITE, PROBE), (SITE, feature(0)), (OTHER, feature(1, "two")), (EARLY, PROBE)]
    watched = compile_watch([(site, parsed_row(row)) for site, row in wanted], REGISTRY, "report.features")
    merged, columns = with_watch(sites, watched)
    assert [site.site for site in merged] == [0, 1, 2]
    assert merged[1].edits == sites[0].edits
    assert merged[1].rows[0] == sites[0].rows[0]
    told = [(site.site, site.rows[row]) for site in merged for row in site.watch]
    assert len(told) == 4
    assert [told[column] for column in columns] == list(watched)


@pytest.mark.parametrize(
    ("site", "row", "field", "reason"),
    [
        ("layers.9.resid_post", PROBE, "[0].site", "SITE_UNKNOWN"),
        (SITE, VECTOR, "[0].row", "FIELD_INVALID"),
        (SITE, feature(6), "[0].row.feature.index", "FEATURE_UNKNOWN"),
    ],
)
def test_watching_is_refused_by_field(site: str, row: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(ProgramError) as caught:
        compile_watch([(site, parsed_row(row))], REGISTRY, "report.features")
    assert (caught.value.field, caught.value.reason) == ("report.features" + field, reason)


def test_rows_of_all_stages_must_fit_together() -> None:
    first = compiled(*({"row": feature(i), "add": 1} for i in (0, 1, 2))).sites
    shared = compiled(*({"row": feature(i), "add": 1} for i in (2, 3))).sites
    other = compiled({"row": VECTOR, "add": 1}, {"row": feature(3), "add": 1}).sites
    check_capacity([first, shared], REGISTRY, "program")
    with pytest.raises(ProgramError, match="5 distinct rows"):
        check_capacity([first, other], REGISTRY, "program")


GOOD = """
name: calm
sites:
  - site: layers.1.resid_post
    edits:
      - row: {feature: {index: 3}}
        clamp: -2
        unit: UNIT_RESIDUAL_NORM
"""


def test_programs_load_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "calm.yaml").write_text(GOOD)
    (tmp_path / "notes.txt").write_text("not a program")
    programs = load_programs(tmp_path)
    assert list(programs) == ["calm"]
    assert compile_program(programs["calm"], REGISTRY).edits[0].operation == "clamp -2 residual norms"


BAD = {
    "unknown key": (GOOD + "gates: {}\n", "gates"),
    "unknown enum": (GOOD.replace("UNIT_RESIDUAL_NORM", "UNIT_MILES"), "unit"),
    "wrong type": (GOOD.replace("-2", "much"), "clamp"),
    "no name": (GOOD.replace("name: calm\n", ""), "name"),
    "bad yaml": ("sites: [", "line 1"),
    "no mapping": ("- 1", "mapping"),
    "object": ("!!python/object/apply:os.getcwd []", "python/object"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named_with_the_field(tmp_path: Path, case: str) -> None:
    text, word = BAD[case]
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ProgramFileError, match=word) as caught:
        load_programs(tmp_path)
    assert "bad.yaml" in str(caught.value)


def test_a_name_is_defined_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(GOOD)
    with pytest.raises(ProgramFileError, match=r"b\.yaml: name: 'calm'"):
        load_programs(tmp_path)


def test_huge_programs_are_refused_quickly() -> None:
    message = program()
    message.sites[0].edits.extend([program_pb2.Edit()] * 100_000)
    with pytest.raises(ProgramError, match="100000 edits"):
        compile_program(message, REGISTRY)


def test_random_programs_compile_alike_after_a_round_trip() -> None:
    rng = Random(0)
    for _ in range(50):
        edits = [
            {"row": feature(i), rng.choice(("add", "set", "cap", "floor", "clamp")): rng.uniform(-3, 3)}
            for i in range(3)
        ]
        request = wire.Request(1, 2, True, (compiled(*edits).sites,))
        assert wire.decode(wire.encode(request)) == request
