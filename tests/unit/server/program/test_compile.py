"""Compilation: operations, rows, gates, watched rows and digests."""

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import json_format

from rudder.sae_models.sae import SAE
from rudder.server.program import wire
from rudder.server.program.compile import compile_program
from rudder.server.program.errors import ProgramError
from rudder.server.program.layout import Layout
from rudder.server.program.rows import Registry, check_capacity
from rudder.server.program.watch import Watched, compile_watch, merge_watched
from rudder.v1 import program_pb2
from tests.unit.programs import (
    ADD,
    EARLY,
    LAYOUT,
    OTHER,
    PROBE,
    REGISTRY,
    SITE,
    SPREAD,
    VECTOR,
    at,
    compiled,
    dictionary,
    edit_of,
    feature,
)
from tests.unit.reference import BUNDLE, WIDTH, make_driver, run_step

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
def test_operation_compiles_to_formula_parameters(edit: dict[str, Any], numbers: dict[str, Any]) -> None:
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
def test_operation_has_its_effect_on_the_activation(edit: dict[str, Any], after: tuple[float, float]) -> None:
    """On an orthonormal latent the edit's result can be read back from x': here the first coordinate."""
    eye, zeros = torch.eye(WIDTH)[:6], torch.zeros(6)
    driver = make_driver(LAYOUT, SAE(eye, zeros, zeros, eye, torch.zeros(WIDTH)))
    stage = compiled({"row": feature(0)} | edit).sites
    driver.admit("r", 1, wire.Request(2, 2, False, (stage,)))
    x = np.zeros((3, 2, WIDTH))
    x[:, 0, 0], x[:, :, 1] = 3.0, 4.0
    moves = run_step(driver, [("r", 0, 2)], {"r": x})["r"]
    assert (x + moves)[1, :, 0] == pytest.approx(after, abs=1e-5)


def test_vector_and_feature_rows_resolve() -> None:
    result = compiled({"row": VECTOR, "set": 2, "unit": "UNIT_RESIDUAL_NORM"}, {"row": feature(3), "ablate": True})
    vector, latent = result.sites[0].rows
    assert np.frombuffer(vector.decoder, "<f4").tolist()[:2] == [3.0, 4.0]
    assert (vector.encoder, vector.threshold) == (b"", -math.inf)
    assert latent == wire.Row(BUNDLE, 3)
    assert result.sites[0].edits[0].shift == pytest.approx(0.4)


def test_add_on_a_vector_adds_the_vector() -> None:
    driver = make_driver(LAYOUT, SAE(*(torch.zeros(s) for s in ((6, WIDTH), 6, 6, (6, WIDTH), WIDTH))))
    driver.admit("r", 1, wire.Request(1, 1, False, (compiled({"row": VECTOR, "add": 2}).sites,)))
    moves = run_step(driver, [("r", 0, 1)], {"r": np.ones((3, 1, WIDTH))})["r"]
    assert moves[1, 0].tolist() == [6.0, 8.0] + [0.0] * (WIDTH - 2)


def test_edit_names_have_the_order_of_the_moved_column() -> None:
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
def test_by_phase_is_set_when_phases_differ(document: dict[str, Any], by_phase: bool) -> None:
    message = json_format.ParseDict(at(**document), program_pb2.Program())
    assert compile_program(message, REGISTRY).by_phase == by_phase


def test_row_edited_in_two_phases_has_two_copies() -> None:
    prompt, generated = (
        {"row": feature(0), "add": v, "phase": f"PHASE_{p}"} for v, p in ((1, "PROMPT"), (2, "GENERATED"))
    )
    site = compiled(prompt, generated).sites[0]
    assert site.rows == (wire.Row(BUNDLE, 0), wire.Row(BUNDLE, 0, copy=1))
    assert [e.row for e in site.edits] == [0, 1]


def test_blend_towards_an_edited_vector_has_its_own_copy() -> None:
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
def test_statistic_compiles_to_sequence_parameters(condition: dict[str, Any], numbers: dict[str, Any]) -> None:
    result = compiled(ADD, gate={"site": SITE, "sequence": {"score": PROBE} | condition})
    gate = result.sites[0].gate
    assert gate
    assert gate.sequence == wire.Sequence(1, **numbers)
    assert result.in_sequence


def test_triggers_share_rows_with_edits_and_use_the_lowest_threshold() -> None:
    triggers = [{"row": feature(i), "above": above} for i, above in ((0, 1), (3, 1), (0, 2))]
    result = compiled({"row": feature(0), "add": 1}, gate={"site": SITE, "any_of": triggers})
    assert result.sites[0].rows == (wire.Row(BUNDLE, 0), wire.Row(BUNDLE, 3))
    assert result.sites[0].gate == wire.Gate(((0, 1.0), (1, 1.0)))
    assert not result.in_sequence


def digest(document: dict[str, Any], registry: Registry = REGISTRY) -> str:
    """Compile a program and return its digest."""
    return compile_program(json_format.ParseDict(document, program_pb2.Program()), registry).digest


def test_digest_ignores_names_spelling_and_order() -> None:
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
def test_digest_changes_with_the_parameters(number: int) -> None:
    changed = json_format.MessageToDict(
        json_format.ParseDict(SPREAD, program_pb2.Program()), preserving_proto_field_name=True
    )
    CHANGES[number](changed)
    registry = Registry(LAYOUT, WIDTH, REGISTRY.dictionaries | {"one": dictionary("one", OTHER, "cd")})
    assert digest(changed, registry) != digest(SPREAD, registry)


def test_digest_depends_on_bundle_hash_not_name() -> None:
    renamed = Registry(LAYOUT, WIDTH, {"new": dictionary("new", SITE)})
    retrained = Registry(LAYOUT, WIDTH, {BUNDLE: dictionary(BUNDLE, SITE, "other")})
    document = at(edits=[ADD])
    assert digest(document, renamed) == digest(document)
    assert digest(document, retrained) != digest(document)


def test_digest_does_not_depend_on_other_sites() -> None:
    alone = Registry(Layout((SITE,)), WIDTH, {BUNDLE: dictionary(BUNDLE, SITE)})
    assert digest(at(edits=[ADD]), alone) == digest(at(edits=[ADD]))


def test_digest_is_equal_in_another_process() -> None:
    code = "from tests.unit.server.program.test_compile import *; print(digest(SPREAD))"
    root = Path(__file__).parents[4]
    path = f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'clients/python')!r}]; "
    output = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == digest(SPREAD)


def parsed_row(row: dict[str, Any]) -> program_pb2.Row:
    """Parse a row from its JSON form."""
    return json_format.ParseDict(row, program_pb2.Row())


def test_watched_rows_are_merged_into_the_program() -> None:
    sites = compiled(ADD).sites
    wanted = [(OTHER, feature(1, "two")), (SITE, PROBE), (SITE, feature(0)), (OTHER, feature(1, "two")), (EARLY, PROBE)]
    watched = compile_watch([(site, parsed_row(row)) for site, row in wanted], REGISTRY, "report.features")
    merged, columns = merge_watched(sites, watched)
    assert [site.site for site in merged] == [0, 1, 2]
    assert merged[1].edits == sites[0].edits
    assert merged[1].rows[0] == sites[0].rows[0]
    reported = [(site.site, site.rows[row]) for site in merged for row in site.watch]
    assert len(reported) == 4
    assert [Watched(*reported[column]) for column in columns] == list(watched)


def test_row_watched_with_and_without_prompt_has_one_column() -> None:
    wanted = [(SITE, parsed_row(feature(0)))]
    watched = compile_watch(wanted, REGISTRY, "watch"), compile_watch(wanted, REGISTRY, "watch", prompt=True)
    (generated,), (everywhere,) = watched
    assert (generated.prompt, everywhere.prompt) == (False, True)
    (site,), columns = merge_watched((), (generated, everywhere))
    assert (site.watch, columns) == ((0,), (0, 0))


@pytest.mark.parametrize(
    ("site", "row", "field", "reason"),
    [
        ("layers.9.resid_post", PROBE, "[0].site", "SITE_UNKNOWN"),
        (SITE, VECTOR, "[0].row", "FIELD_INVALID"),
        (SITE, feature(6), "[0].row.feature.index", "FEATURE_UNKNOWN"),
    ],
)
def test_watch_refusal_names_the_field(site: str, row: dict[str, Any], field: str, reason: str) -> None:
    with pytest.raises(ProgramError) as caught:
        compile_watch([(site, parsed_row(row))], REGISTRY, "report.features")
    assert (caught.value.field, caught.value.reason) == ("report.features" + field, reason)


def test_rows_of_all_stages_share_the_capacity() -> None:
    first = compiled(*({"row": feature(i), "add": 1} for i in (0, 1, 2))).sites
    shared = compiled(*({"row": feature(i), "add": 1} for i in (2, 3))).sites
    other = compiled({"row": VECTOR, "add": 1}, {"row": feature(3), "add": 1}).sites
    check_capacity([first, shared], REGISTRY, "program")
    with pytest.raises(ProgramError, match="5 distinct rows"):
        check_capacity([first, other], REGISTRY, "program")


def test_reserved_rows_count_against_the_capacity_once() -> None:
    three = compiled(*({"row": feature(i), "add": 1} for i in (0, 1, 2))).sites
    reserved = {three[0].site: frozenset({wire.Row(BUNDLE, 2), wire.Row(BUNDLE, 3)})}
    check_capacity([three], REGISTRY, "program", reserved)
    other = compiled({"row": VECTOR, "add": 1}, *({"row": feature(i), "add": 1} for i in (0, 1))).sites
    with pytest.raises(ProgramError, match="5 distinct rows"):
        check_capacity([other], REGISTRY, "program", reserved)


def test_compiled_request_survives_a_round_trip() -> None:
    rng = Random(0)
    for _ in range(50):
        edits = [
            {"row": feature(i), rng.choice(("add", "set", "cap", "floor", "clamp")): rng.uniform(-3, 3)}
            for i in range(3)
        ]
        request = wire.Request(1, 2, True, (compiled(*edits).sites,))
        assert wire.decode(wire.encode(request)) == request
