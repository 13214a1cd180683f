"""What policies forbid a caller that they bind: sites, rows, rights, fields, and how several of them combine."""

import re
from itertools import product
from math import inf
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st

from rudder.sae_models.hookpoints import POINTS
from rudder.server.caller import ANONYMOUS, Caller
from rudder.server.program.compile import NOTHING
from rudder.server.program.errors import ProgramError
from rudder.server.program.layout import Layout
from rudder.server.program.rows import PARALLEL, Registry
from rudder.server.program.span import basis, reaches
from rudder.server.safety.binding import (
    ALL_RIGHTS,
    UNBOUND,
    Binding,
    binding_policies,
    binds,
    stages_needed,
    stages_of,
)
from rudder.server.safety.explain import statements
from rudder.server.safety.policy import MAX_DISPLACEMENT, Policy
from rudder.v1 import inference_pb2, program_pb2
from tests.unit.policies import editing, latent, message, policy
from tests.unit.programs import SITE as DICTIONARY_SITE
from tests.unit.programs import dictionary
from tests.unit.reference import BUNDLE, WIDTH

SITES = tuple(f"layers.{layer}.{point}" for layer in (0, 1, 10) for point in POINTS)
REGISTRY = Registry(Layout(tuple(reversed(SITES)), stages=2), WIDTH, {BUNDLE: dictionary(BUNDLE, DICTIONARY_SITE)})
UP = {"row": {"vector": {"values": [1.0] * WIDTH}}, "add": 1.0}
BLEND = {"vector": {"values": [1.0] * WIDTH}, "weight": 1.0}
SIDE = {"vector": {"values": [0.0] * (WIDTH - 1) + [1.0]}}
PROBE = {"probe": {"weights": SIDE["vector"]["values"]}}
FIELD = "steering.program"
BEHIND, BEFORE = "edit_behind_policy", "edit_before_guard"
OWN = {"edit_latents": True, "raw_vectors": True}


def program(*sites: dict[str, Any], **rest: Any) -> program_pb2.Program:
    return json_format.ParseDict({"sites": list(sites)} | rest, program_pb2.Program())


def adding(*sites: str) -> dict[str, Any]:
    return {"sites": [{"site": site, "edits": [UP]} for site in sites]}


def steering(site: str = DICTIONARY_SITE, *edits: dict[str, Any], **rest: Any) -> program_pb2.Program:
    return program({"site": site, "edits": list(edits)}, **rest)


def along(row: dict[str, Any]) -> program_pb2.Program:
    return steering(DICTIONARY_SITE, {"row": row, "add": 1.0})


def bound(name: str = "low", *, rights: dict[str, bool] | None = None, **fields: Any) -> Policy:
    """A policy that by default leaves callers programs of their own."""
    fields = {"bundles": {BUNDLE: "ab"}, "rights": OWN if rights is None else rights} | fields
    return policy(name, REGISTRY, **fields)


def refusal(asked: program_pb2.Program, *policies: Policy) -> tuple[str, str] | None:
    """Return (reason, field) of the refusal of a request's own program under policies; None if it is accepted."""
    try:
        Binding(policies).compile_own(asked, REGISTRY, FIELD)
    except ProgramError as error:
        return error.reason, error.field
    return None


@pytest.mark.parametrize(("policy_site", "site"), list(product(SITES, SITES)))
def test_edit_behind_the_policy_is_refused_by_name(policy_site: str, site: str) -> None:
    # Along another direction than the request's.
    edit = {"row": SIDE, "add": 1.0}
    edits = {"sites": [{"site": policy_site, "edits": [edit]}]}
    # SITES is in the order of the forward pass.
    behind = SITES.index(site) > SITES.index(policy_site)
    refused = ("POLICY_FORBIDS", f"{FIELD}.sites[0].site") if behind else None
    for asked in (program(*adding(site)["sites"]), program({"site": site, "blend": BLEND})):
        assert refusal(asked, bound(program=edits)) == refused
        assert refusal(asked, bound(program=edits, rights=OWN | {BEHIND: True})) is None
        assert refusal(asked) is None


def test_first_site_of_the_policy_counts_and_the_site_at_fault_is_named() -> None:
    low = bound(program=editing(5, DICTIONARY_SITE))
    sites = [SITES[0], SITES[SITES.index(DICTIONARY_SITE) + 1], SITES[1]]
    assert refusal(program(*adding(*sites)["sites"]), low) == ("POLICY_FORBIDS", f"{FIELD}.sites[1].site")


GATE = {"any_of": [{"row": PROBE, "above": 1.0}]}


@pytest.mark.parametrize(("gate_site", "policy_site"), list(product(SITES[::2], SITES[::2])))
def test_edit_that_the_gate_of_the_policy_may_read_is_refused_by_name(gate_site: str, policy_site: str) -> None:
    gate, edit = SITES.index(gate_site), SITES.index(policy_site)
    if gate > edit:
        return
    edits = {"sites": [{"site": policy_site, "edits": [{"row": SIDE, "add": 1.0}]}], "gate": GATE | {"site": gate_site}}
    neither, before, both = (
        bound(program=edits, rights=OWN | dict.fromkeys(r, True)) for r in ((), (BEFORE,), (BEFORE, BEHIND))
    )
    for index, site in enumerate(SITES):
        fault = ("POLICY_FORBIDS", f"{FIELD}.sites[0].site")
        asked = program(*adding(site)["sites"])
        assert refusal(asked, neither) == (None if gate < index <= edit else fault)
        assert refusal(asked, before) == (None if index <= edit else fault)
        assert refusal(asked, both) is None


def test_edit_that_a_guard_reads_is_refused_by_name() -> None:
    terms = [{"site": SITES[2], "row": PROBE, "weight": 1}, {"site": SITES[4], "row": PROBE, "weight": 1}]
    guard = {"name": "g", "action": "GUARD_ACTION_COUNT", "score": {"terms": terms}, "level": 1}
    for index, site in enumerate(SITES):
        refused = refusal(program(*adding(site)["sites"]), bound(guards=[guard]))
        # At its own site a guard reads what is there before the request's edits.
        assert refused == (None if index >= 4 else ("POLICY_FORBIDS", f"{FIELD}.sites[0].site"))


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("operation", [{"ablate": True}, {"add": -50.0}, {"set": 0.0}, {"cap": 1.0}])
def test_latents_that_the_policy_edits_are_locked(operation: dict[str, Any], behind: bool) -> None:
    low = bound(program=editing(5, DICTIONARY_SITE), rights=OWN | {BEHIND: behind})
    own = {"row": {"feature": {"index": 5}}} | operation
    other = {"row": {"feature": {"index": 3}}, "add": 1.0}
    fault = ("ROW_LOCKED", f"{FIELD}.sites[0].edits[1].row")
    assert refusal(steering(DICTIONARY_SITE, other, own), low) == fault
    assert refusal(steering(DICTIONARY_SITE, other), low) is None


def reading(index: int) -> dict[str, Any]:
    return {"site": DICTIONARY_SITE, "row": {"feature": {"index": index}}}


def test_enforced_policies_with_a_program_must_apply() -> None:
    shadow, low = bound("a", program=editing(5), mode="POLICY_MODE_SHADOW"), bound("b", program=editing(3))
    assert Binding(binding_policies([shadow, low, bound("c")], ANONYMOUS)).stages_enforced == 1
    assert UNBOUND.stages_enforced == 0


def test_latents_that_gate_guards_and_operator_name_are_locked() -> None:
    gate = {
        "site": DICTIONARY_SITE,
        "any_of": [{"row": latent(5), "above": 1.0}],
        "sequence": {"score": latent(2), "cusum": {"drift": 1.0}, "level": 3.0},
    }
    terms = [{"site": DICTIONARY_SITE, "row": latent(4), "weight": 1}]
    low = bound(
        program=editing(3, DICTIONARY_SITE, gate=gate),
        guards=[{"name": "g", "action": "GUARD_ACTION_COUNT", "score": {"terms": terms}, "level": 1}],
        locked=[{"site": DICTIONARY_SITE, "row": latent(0)}],
        rights=OWN | {BEFORE: True},
    )
    assert low.locked == {(BUNDLE, index) for index in (0, 2, 3, 4, 5)}
    for index in range(6):
        locked = index != 1
        fault = ("ROW_LOCKED", f"{FIELD}.sites[0].edits[0].row") if locked else None
        if index != 4:
            # That one has no decoder.
            assert refusal(along(latent(index)), low) == fault
        gated = steering(DICTIONARY_SITE, {"row": latent(1), "add": 1.0}, gate={
            "site": DICTIONARY_SITE, "any_of": [{"row": latent(index), "above": 0.0}]})  # fmt: skip
        assert refusal(gated, low) == (("ROW_LOCKED", f"{FIELD}.gate.any_of[0].row") if locked else None)
        report = [json_format.ParseDict(reading(index), inference_pb2.SiteFeature())]
        if not locked:
            Binding((low,)).check_report(report, REGISTRY, "report.features")
            continue
        with pytest.raises(ProgramError) as caught:
            Binding((low,)).check_report(report, REGISTRY, "report.features")
        assert (caught.value.reason, caught.value.field) == ("ROW_LOCKED", "report.features[0].row")


def test_reader_of_guards_reads_locked_rows_and_still_edits_none() -> None:
    low = bound(program=editing(5, DICTIONARY_SITE), rights=OWN | {"read_guards": True})
    binding = Binding((low,))
    binding.check_report([json_format.ParseDict(reading(5), inference_pb2.SiteFeature())], REGISTRY, "report.features")
    assert binding.hidden == frozenset()
    assert Binding((bound(program=editing(5, DICTIONARY_SITE)),)).hidden == {(BUNDLE, 5)}
    assert refusal(along(latent(5)), low) == ("ROW_LOCKED", f"{FIELD}.sites[0].edits[0].row")


@pytest.mark.parametrize(("cosine", "hidden"), [(1.0, True), (-0.51, True), (0.49, False)])
def test_latents_parallel_to_a_locked_row_are_not_among_the_strongest(cosine: float, hidden: bool) -> None:
    """A report may not name them either."""
    score = {"terms": [{"site": SITES[0], "row": {"probe": {"weights": tilted(3, cosine)}}, "weight": 1}]}
    guard = {"name": "g", "action": "GUARD_ACTION_COUNT", "score": score, "level": 1}
    low = bound(guards=[guard])
    report = [json_format.ParseDict(reading(3), inference_pb2.SiteFeature())]
    assert ((BUNDLE, 3) in Binding((low,)).hidden) == hidden
    assert (BUNDLE, 2) not in Binding((low,)).hidden
    if hidden:
        with pytest.raises(ProgramError, match="parallel") as caught:
            Binding((low,)).check_report(report, REGISTRY, "report.features")
        # Whoever can climb to a larger cosine finds the guard's direction.
        assert not re.search(r"0\.51|1\.00", str(caught.value))
    else:
        Binding((low,)).check_report(report, REGISTRY, "report.features")


def tilted(index: int, cosine: float) -> list[float]:
    """A vector with this cosine to the direction of a latent."""
    vector = np.zeros(WIDTH)
    vector[[index, WIDTH - 1]] = cosine, np.sqrt(1 - cosine**2)
    return [float(value) for value in 7 * vector]


@pytest.mark.parametrize(("cosine", "locked"), [(1.0, True), (-1.0, True), (0.51, True), (-0.51, True), (0.49, False)])
def test_row_parallel_to_a_locked_one_is_locked(cosine: float, locked: bool) -> None:
    assert abs(cosine) > PARALLEL or not locked
    low, values = bound(program=editing(5, DICTIONARY_SITE)), tilted(5, cosine)
    fault = "ROW_LOCKED" if locked else None
    vector = {"vector": {"values": values}}
    asked = [
        (along(vector), "sites[0].edits[0].row"),
        (program({"site": SITES[0], "blend": {"vector": {"values": values}, "weight": 1}}), "sites[0].blend.vector"),
    ]
    for request, field in asked:
        assert refusal(request, low) == ((fault, f"{FIELD}.{field}") if fault else None)


def probed(row: dict[str, Any]) -> program_pb2.Program:
    gate = {"site": DICTIONARY_SITE, "any_of": [{"row": row, "above": 0.0}]}
    return steering(DICTIONARY_SITE, {"row": latent(1), "add": 1.0}, gate=gate)


@pytest.mark.parametrize("cosine", [1.0, 0.51, 0.49, 0.0])
def test_probes_of_ones_own_are_for_readers_of_guards(cosine: float) -> None:
    """Whatever their direction: a few that are parallel to nothing add up to the guard's."""
    row = {"probe": {"weights": tilted(5, cosine)}}
    report = [json_format.ParseDict({"site": SITES[0], "row": row}, inference_pb2.SiteFeature())]
    low, nothing = bound(program=editing(5, DICTIONARY_SITE)), bound(program=None)
    reader = bound(program=editing(5, DICTIONARY_SITE), rights=OWN | {"read_guards": True})
    assert refusal(probed(row), low) == ("POLICY_FORBIDS", f"{FIELD}.gate.any_of[0].row.probe")
    with pytest.raises(ProgramError, match="read_guards") as caught:
        Binding((low,)).check_report(report, REGISTRY, "report.features")
    assert (caught.value.reason, caught.value.field) == ("POLICY_FORBIDS", "report.features[0].row.probe")
    for policies in ((reader,), (nothing,)):
        assert refusal(probed(row), *policies) is None
        Binding(policies).check_report(report, REGISTRY, "report.features")
    assert any("probes of its own" in line for line in statements(Binding((low,)), REGISTRY))
    assert not any("may not use probes" in line for line in statements(Binding((reader,)), REGISTRY))


def unit(*parts: tuple[int, float]) -> dict[str, Any]:
    values = np.zeros(WIDTH)
    for index, value in parts:
        values[index] = value
    return {"row": {"vector": {"values": [float(value) for value in values]}}, "add": 1.0}


# Two halves of the direction of latent 5, each hidden behind another direction.
HALVES = unit((5, 0.45), (WIDTH - 1, 1.0)), unit((5, 0.45), (WIDTH - 1, -1.0))
GROUPS: dict[str, tuple[program_pb2.Program, bool]] = {
    "one half": (steering(DICTIONARY_SITE, HALVES[0]), True),
    "the other": (steering(DICTIONARY_SITE, HALVES[1]), True),
    "both": (steering(DICTIONARY_SITE, *HALVES), False),
    "one taken away": (steering(DICTIONARY_SITE, HALVES[0], HALVES[1] | {"add": -1.0}), False),
    "at two sites": (program(*({"site": s, "edits": [e]} for s, e in zip(SITES[:2], HALVES, strict=True))), False),
    "in two phases": (steering(DICTIONARY_SITE, HALVES[0] | {"phase": "PHASE_PROMPT"}, HALVES[1]), False),
    "in two units": (steering(DICTIONARY_SITE, HALVES[0] | {"unit": "UNIT_RESIDUAL_NORM"}, HALVES[1]), False),
    "as blends": (
        program(
            {"site": SITES[0], "edits": [HALVES[0]]},
            {"site": SITES[1], "blend": HALVES[1]["row"] | {"weight": 0.5}},
        ),
        False,
    ),
    "nearly the same twice": (steering(DICTIONARY_SITE, unit((7, 1.0)), unit((7, 1.0), (5, 1e-3))), False),
    "elsewhere": (steering(DICTIONARY_SITE, unit((7, 1.0)), unit((6, 1.0), (7, 1.0))), True),
}


@pytest.mark.parametrize("group", GROUPS)
def test_vectors_that_together_reach_a_locked_row_are_refused(group: str) -> None:
    asked, allowed = GROUPS[group]
    low = bound(locked=[{"site": DICTIONARY_SITE, "row": latent(5)}])
    assert refusal(asked, low) == (None if allowed else ("ROW_LOCKED", f"{FIELD}.sites"))
    assert refusal(asked) is None


def test_vector_between_locked_rows_is_refused_though_it_is_parallel_to_none() -> None:
    locked = [{"site": DICTIONARY_SITE, "row": latent(index)} for index in range(6)]
    between = steering(DICTIONARY_SITE, unit(*((index, 1.0) for index in range(6))))
    assert refusal(between, bound(locked=locked[:1])) is None
    assert refusal(between, bound(locked=locked)) == ("ROW_LOCKED", f"{FIELD}.sites")


def test_random_vector_passes_however_many_rows_are_locked() -> None:
    """The bound counts from what a random direction has in the span of so many rows."""
    generator = np.random.default_rng(0)
    locked = basis(generator.normal(size=(32, 128)))
    passed = [not reaches(generator.normal(size=(1, 128)), locked) for _ in range(50)]
    assert all(passed)
    assert reaches(locked[:1] + 0.5 * locked[1:2], locked)
    assert not reaches(np.zeros((1, 128)), locked)


LATENTS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "along": ({"add": 1.0}, {"add": 1.0}, False),
    "against": ({"add": 1.0}, {"add": -1.0}, True),
    "where active": ({"add": 1.0, "whenAbove": 0.5}, {"add": 1.0}, True),
    "wherever": ({"add": 1.0, "whenAbove": -1.0}, {"add": 1.0}, False),
    "scaled": ({"scale": 3.0}, {"scale": 3.0}, True),
    "set": ({"set": 1.0}, {"floor": 1.0}, False),
    "in other phases": (
        {"add": 1.0, "phase": "PHASE_PROMPT"},
        {"add": 1.0, "phase": "PHASE_GENERATED"},
        True,
    ),
}


@pytest.mark.parametrize("case", LATENTS)
def test_latents_that_together_add_a_locked_direction_are_refused(case: str) -> None:
    """Latents 1 and 2 are parallel to nothing locked; what both add is."""
    first, second, allowed = LATENTS[case]
    score = {"terms": [{"site": SITES[0], "row": {"probe": unit_between(1, 2, 3, 4, 5)}, "weight": 1}]}
    guard = {"name": "g", "action": "GUARD_ACTION_COUNT", "score": score, "level": 1}
    low = bound(guards=[guard], rights=OWN | {BEFORE: True})
    edits = ({"row": latent(1)} | first, {"row": latent(2)} | second)
    assert [refusal(steering(DICTIONARY_SITE, edit), low) for edit in edits] == [None, None]
    assert refusal(steering(DICTIONARY_SITE, *edits), low) == (None if allowed else ("ROW_LOCKED", f"{FIELD}.sites"))


def unit_between(*indices: int) -> dict[str, Any]:
    return {"weights": [1.0 if index in indices else 0.0 for index in range(WIDTH)]}


RIGHTS = {
    "nothing": ({}, {"latent": FIELD, "vector": FIELD, "probe": FIELD}),
    "latents": (
        {"edit_latents": True},
        {"latent": "", "vector": f"{FIELD}.sites[0].edits[0].row.vector", "probe": f"{FIELD}.gate.any_of[0].row.probe"},
    ),
    "vectors": (
        {"raw_vectors": True},
        {
            "latent": f"{FIELD}.sites[0].edits[0].row.feature",
            "vector": "",
            "probe": f"{FIELD}.gate.any_of[0].row.probe",
        },
    ),
    "both": (OWN, {"latent": "", "vector": "", "probe": f"{FIELD}.gate.any_of[0].row.probe"}),
    "reading": (OWN | {"read_guards": True}, {"latent": "", "vector": "", "probe": ""}),
}


@pytest.mark.parametrize("rights", RIGHTS)
def test_rights_to_rows(rights: str) -> None:
    given, faults = RIGHTS[rights]
    low = bound(locked=[{"site": DICTIONARY_SITE, "row": latent(5)}], rights=given)
    row = {"feature": {"index": 1}} if given.get("edit_latents") else SIDE
    gate = {"site": DICTIONARY_SITE, "any_of": [{"row": PROBE, "above": 0.0}]}
    asked = {
        "latent": along(latent(1)),
        "vector": along(SIDE),
        "probe": steering(DICTIONARY_SITE, {"row": row, "add": 1.0}, gate=gate),
    }
    for kind, fault in faults.items():
        assert refusal(asked[kind], low) == (("POLICY_FORBIDS", fault) if fault else None)
    # A program of the operator needs none of these rights, and obeys every bound.
    binding = Binding((low,))
    for name, named in asked.items():
        compiled = binding.compile_named(name, named, REGISTRY, "steering.name")
        assert binding.compile_named(name, named, REGISTRY, "steering.name") is compiled
    with pytest.raises(ProgramError, match="locked"):
        Binding((low,)).compile_named("locked", along(latent(5)), REGISTRY, "steering.name")


def test_topic_of_another_strength_is_another_program_and_obeys_locks() -> None:
    binding = Binding((bound(locked=[{"site": DICTIONARY_SITE, "row": latent(5)}]),))
    doses = [
        binding.compile_topic(steering(DICTIONARY_SITE, {"row": latent(1), "add": dose}), REGISTRY, "steering.topic")
        for dose in (0.5, 1.0)
    ]
    assert doses[0].digest != doses[1].digest
    with pytest.raises(ProgramError) as caught:
        binding.compile_topic(along(latent(5)), REGISTRY, "steering.topic")
    assert caught.value.reason == "ROW_LOCKED"


def test_probe_of_a_report_needs_the_right_to_raw_vectors() -> None:
    report = [json_format.ParseDict({"site": DICTIONARY_SITE, "row": PROBE}, inference_pb2.SiteFeature())]
    with pytest.raises(ProgramError) as caught:
        Binding((bound(rights={}),)).check_report(report, REGISTRY, "report.features")
    assert (caught.value.reason, caught.value.field) == ("POLICY_FORBIDS", "report.features[0].row.probe")
    Binding((bound(),)).check_report(report, REGISTRY, "report.features")


def test_displacement_is_capped_at_the_smallest_bound() -> None:
    wide, narrow = bound("wide", maxDisplacement=0.5), bound("narrow", maxDisplacement=0.25)
    caps = {
        (own, *names): Binding(policies)
        .compile_own(
            program({"site": SITES[0], "edits": [UP]} | ({"maxDisplacement": own} if own else {})), REGISTRY, "f"
        )
        .sites[0]
        .max_displacement
        for own in (None, 0.1, 0.4)
        for names, policies in (((), ()), (("w",), (wide,)), (("w", "n"), (wide, narrow)))
    }
    assert caps == {
        (None,): inf, (None, "w"): 0.5, (None, "w", "n"): 0.25,
        (0.1,): 0.1, (0.1, "w"): 0.1, (0.1, "w", "n"): 0.1,
        (0.4,): 0.4, (0.4, "w"): 0.4, (0.4, "w", "n"): 0.25,
    }  # fmt: skip


def test_forbidden_field_is_refused_by_its_path() -> None:
    binding = Binding((bound(forbiddenFields=["sampling.logprobs"]), bound("other", forbiddenFields=["sampling.n"])))
    request = inference_pb2.GenerateRequest(sampling=inference_pb2.Sampling(temperature=0.5))
    binding.check_fields(request)
    for name, value in (("logprobs", 0), ("n", 1)):
        asked = json_format.ParseDict({"sampling": {name: value}}, inference_pb2.GenerateRequest())
        with pytest.raises(ProgramError) as caught:
            binding.check_fields(asked)
        assert (caught.value.reason, caught.value.field) == ("POLICY_FORBIDS", f"sampling.{name}")
        UNBOUND.check_fields(asked)


def test_token_ids_must_be_those_that_the_tokenizer_writes() -> None:
    binding = Binding((bound(),))
    binding.check_token_ids("prompt.token_ids", [1, 2], (1, 2))
    with pytest.raises(ProgramError, match=r"prompt\.token_ids") as caught:
        binding.check_token_ids("prompt.token_ids", [1, 3], (1, 2))
    assert caught.value.reason == "POLICY_FORBIDS"
    UNBOUND.check_token_ids("prompt.token_ids", [1, 3], ())


ALICE = Caller("alice", "acme", frozenset({"generate", "tester"}))


@pytest.mark.parametrize(
    ("whom", "bound_callers"),
    [
        ({}, []),
        ({"all": True}, [ALICE, ANONYMOUS]),
        ({"callers": ["alice", "bob"]}, [ALICE]),
        ({"callers": ["anonymous"]}, [ANONYMOUS]),
        ({"roles": ["tester"]}, [ALICE]),
        ({"roles": ["generate"]}, [ALICE, ANONYMOUS]),
    ],
)
def test_whom_a_policy_binds(whom: dict[str, Any], bound_callers: list[Caller]) -> None:
    low = bound(binds=whom)
    assert [caller for caller in (ALICE, ANONYMOUS) if binds(low, caller)] == bound_callers


def test_policies_apply_by_name_and_shadows_last() -> None:
    policies = [bound("c"), bound("a", mode="POLICY_MODE_SHADOW"), bound("b"), bound("x", binds={})]
    assert [p.name for p in binding_policies(policies, ALICE)] == ["b", "c", "a"]


def test_shadow_forbids_nothing() -> None:
    strict: dict[str, Any] = {
        "program": editing(5, DICTIONARY_SITE),
        "rights": {},
        "forbiddenFields": ["sampling.n"],
        "maxDisplacement": 0.1,
    }
    shadow = bound(mode="POLICY_MODE_SHADOW", **strict)
    assert refusal(along(latent(5)), shadow) is None
    binding = Binding((shadow,))
    assert (binding.rights, binding.hidden, binding.limits.max_displacement) == (ALL_RIGHTS, frozenset(), inf)
    binding.check_fields(inference_pb2.GenerateRequest(sampling=inference_pb2.Sampling(n=2)))
    assert refusal(along(latent(5)), shadow, bound("hard", **strict)) is not None


def test_stages_of_policies() -> None:
    from_start = {"name": "g", "action": "GUARD_ACTION_CLAMP_FROM_START", "level": 1,
                  "score": {"terms": [{"site": DICTIONARY_SITE, "row": PROBE, "weight": 1}]}}  # fmt: skip
    plain = bound("a", program=editing(5, DICTIONARY_SITE))
    forced = bound("b", program=editing(3, DICTIONARY_SITE), guards=[from_start])
    policies = (plain, bound("none"), forced)
    assert stages_of(policies) == (plain.program, NOTHING)
    assert stages_of(policies, {"b"}) == (plain.program, forced.forced)


@pytest.mark.parametrize(
    ("binds_of", "stages"),
    [
        ([], 0),
        ([{"all": True}, {"all": True}], 2),
        ([{"all": True}, {"roles": ["x"]}, {"roles": ["y"]}], 3),
        ([{"callers": ["a"]}, {"callers": ["b"]}], 1),
        ([{"callers": ["a"]}, {"callers": ["b", "a"]}, {"roles": ["x"]}], 3),
        ([{}], 0),
    ],
)
def test_stages_needed(binds_of: list[dict[str, Any]], stages: int) -> None:
    messages = [message(f"p{i}", binds=whom, program=editing(5)) for i, whom in enumerate(binds_of)]
    assert stages_needed([*messages, message("no program")]) == stages


PARTS = st.fixed_dictionaries(
    {
        "locked": st.sets(st.integers(0, 5), max_size=3),
        "rights": st.sets(st.sampled_from(sorted(ALL_RIGHTS))),
        "forbidden": st.sets(st.sampled_from(["sampling.n", "sampling.logprobs", "prompt.chat"])),
        "cap": st.sampled_from([None, 0.1, 0.5, 2.0]),
        "edits": st.sampled_from([None, *SITES]),
    }
)


def of_parts(name: str, parts: dict[str, Any]) -> Policy:
    site = parts["edits"]
    edits = {"program": {"sites": [{"site": site, "edits": [{"row": SIDE, "add": 1.0}]}]}} if site else {}
    cap = {"maxDisplacement": parts["cap"]} if parts["cap"] else {}
    locked = [{"site": DICTIONARY_SITE, "row": latent(index)} for index in sorted(parts["locked"])]
    rights = dict.fromkeys(parts["rights"], True)
    return bound(name, locked=locked, rights=rights, forbiddenFields=sorted(parts["forbidden"]), **cap, **edits)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(PARTS, min_size=1, max_size=4))
def test_policies_combine_to_the_strictest(parts: list[dict[str, Any]]) -> None:
    """Locked rows and forbidden fields are unions, rights an intersection, bounds the smallest: in whatever order."""
    policies = [of_parts(f"p{i}", part) for i, part in enumerate(parts)]
    for order in (policies, policies[::-1], [*policies, policies[0]]):
        binding = Binding(tuple(order))
        assert binding.limits.locked == {(BUNDLE, i) for part in parts for i in part["locked"]}
        assert binding.rights == frozenset.intersection(*(frozenset(part["rights"]) for part in parts))
        assert binding.forbidden.keys() == set().union(*(part["forbidden"] for part in parts))
        assert binding.limits.max_displacement == min(part["cap"] or MAX_DISPLACEMENT for part in parts)
        edited = [SITES.index(part["edits"]) for part in parts if part["edits"]]
        expected = None if BEHIND in binding.rights else min(edited, default=None)
        assert binding.limits.last_site == expected
        assert binding.limits.reads_locked == ("read_guards" in binding.rights)
    alone, together = Binding(tuple(policies[:1])), Binding(tuple(policies))
    assert together.rights <= alone.rights
    assert together.limits.locked >= alone.limits.locked
