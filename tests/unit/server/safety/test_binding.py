"""A caller bound by a policy cannot edit behind it, before its gate, nor its latents: over every pair of sites."""

from itertools import product
from typing import Any

import pytest
from google.protobuf import json_format

from rudder.sae_models.hookpoints import POINTS
from rudder.server.config import Policies
from rudder.server.program.compile import Compiled, compile_program
from rudder.server.program.errors import ProgramError
from rudder.server.program.layout import Layout
from rudder.server.program.rows import Registry
from rudder.server.safety.binding import compile_bound
from rudder.v1 import program_pb2
from tests.unit.programs import SITE as DICTIONARY_SITE
from tests.unit.programs import dictionary
from tests.unit.reference import BUNDLE, WIDTH

SITES = tuple(f"layers.{layer}.{point}" for layer in (0, 1, 10) for point in POINTS)
REGISTRY = Registry(Layout(tuple(reversed(SITES)), stages=2), WIDTH, {BUNDLE: dictionary(BUNDLE, DICTIONARY_SITE)})
UP = {"row": {"vector": {"values": [1.0] * WIDTH}}, "add": 1.0}
BLEND = {"vector": {"values": [1.0] * WIDTH}, "weight": 1.0}
FIELD = "steering.program"


def program(*sites: dict[str, Any], **rest: Any) -> program_pb2.Program:
    return json_format.ParseDict({"sites": list(sites)} | rest, program_pb2.Program())


def adding(*sites: str) -> program_pb2.Program:
    return program(*({"site": site, "edits": [UP]} for site in sites))


def refusal(message: program_pb2.Program, policy: Compiled, **settings: Any) -> tuple[str, str] | None:
    """Return (reason, field) of the refusal of a request's program under a policy; None if it is accepted."""
    try:
        compile_bound(message, REGISTRY, policy, Policies(**settings), FIELD)
    except ProgramError as error:
        return error.reason, error.field
    return None


@pytest.mark.parametrize(("policy_site", "site"), list(product(SITES, SITES)))
def test_edit_behind_the_policy_is_refused_by_name(policy_site: str, site: str) -> None:
    policy = compile_program(adding(policy_site), REGISTRY)
    # SITES is in the order of the forward pass.
    behind = SITES.index(site) > SITES.index(policy_site)
    refused = ("POLICY_FORBIDS", f"{FIELD}.sites[0].site") if behind else None
    assert refusal(adding(site), policy) == refused
    assert refusal(program({"site": site, "blend": BLEND}), policy) == refused
    assert refusal(adding(site), policy, allow_later_edits=True) is None
    assert compile_bound(adding(site), REGISTRY, None, Policies(), FIELD)


def test_first_site_of_the_policy_counts_and_the_site_at_fault_is_named() -> None:
    policy = compile_program(adding(SITES[9], SITES[3]), REGISTRY)
    assert refusal(adding(SITES[2], SITES[5], SITES[1]), policy) == ("POLICY_FORBIDS", f"{FIELD}.sites[1].site")


GATE = {"any_of": [{"row": {"probe": {"weights": [1.0] * WIDTH}}, "above": 1.0}]}


@pytest.mark.parametrize(("gate_site", "policy_site"), list(product(SITES, SITES)))
def test_edit_that_the_gate_of_the_policy_may_read_is_refused_by_name(gate_site: str, policy_site: str) -> None:
    gate, edit = SITES.index(gate_site), SITES.index(policy_site)
    if gate > edit:
        return
    message = program({"site": policy_site, "edits": [UP]}, gate=GATE | {"site": gate_site})
    policy = compile_program(message, REGISTRY)
    for index, site in enumerate(SITES):
        fault = ("POLICY_FORBIDS", f"{FIELD}.sites[0].site")
        assert refusal(adding(site), policy) == (None if gate < index <= edit else fault)
        assert refusal(adding(site), policy, allow_edits_before_gate=True) == (None if index <= edit else fault)
        assert refusal(adding(site), policy, allow_edits_before_gate=True, allow_later_edits=True) is None


def test_gate_of_a_request_may_read_behind_its_own_last_edit_only() -> None:
    policy = compile_program(program({"site": SITES[7], "blend": BLEND}), REGISTRY)
    gate = GATE | {"site": SITES[2]}
    assert refusal(program({"site": SITES[3], "edits": [UP]}, gate=gate), policy) is None


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("operation", [{"ablate": True}, {"add": -50.0}, {"set": 0.0}, {"cap": 1.0}])
def test_latents_that_the_policy_edits_are_locked(operation: dict[str, Any], allow: bool) -> None:
    edit = {"row": {"feature": {"index": 5}}, "set": 3.0}
    policy = compile_program(program({"site": DICTIONARY_SITE, "edits": [edit]}), REGISTRY)
    own = {"row": {"feature": {"index": 5}}} | operation
    other = {"row": {"feature": {"index": 3}}, "add": 1.0}
    fault = ("ROW_LOCKED", f"{FIELD}.sites[0].edits[1].row")
    message = program({"site": DICTIONARY_SITE, "edits": [other, own]})
    assert refusal(message, policy, allow_later_edits=allow) == fault
    assert refusal(program({"site": DICTIONARY_SITE, "edits": [other]}), policy) is None


def test_latents_that_the_gate_of_the_policy_reads_are_locked() -> None:
    reads = {
        "any_of": [{"row": {"feature": {"index": 5}}, "above": 1.0}],
        "sequence": {"score": {"feature": {"index": 2}}, "cusum": {"drift": 1.0}, "level": 3.0},
    }
    edit = {"row": {"feature": {"index": 3}}, "add": 1.0}
    policy = compile_program(
        program({"site": DICTIONARY_SITE, "edits": [edit]}, gate=reads | {"site": DICTIONARY_SITE}), REGISTRY
    )
    assert policy.edited_latents == {(BUNDLE, 3)}
    assert policy.gate_latents == {(BUNDLE, 5), (BUNDLE, 2)}
    for index in (1, 2, 3, 5):
        own = program({"site": DICTIONARY_SITE, "edits": [{"row": {"feature": {"index": index}}, "add": 1.0}]})
        fault = ("ROW_LOCKED", f"{FIELD}.sites[0].edits[0].row") if index != 1 else None
        assert refusal(own, policy, allow_edits_before_gate=True) == fault
