"""A policy is compiled from its message, and every problem of a message is named."""

from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format

from rudder.server.program import wire
from rudder.server.program.compile import compile_program
from rudder.server.safety.fields import is_request_field, is_set
from rudder.server.safety.policy import digest_of_message, problems_of
from rudder.v1 import inference_pb2, policy_pb2, program_pb2
from tests.unit.policies import REGISTRY, editing, latent, message, policy
from tests.unit.programs import EARLY, OTHER, PROBE, SITE, VECTOR
from tests.unit.reference import BUNDLE, WIDTH

NUMBER = REGISTRY.layout.sites.index(SITE)


def problems(**fields: Any) -> dict[str, str]:
    """The problems of a policy, by field."""
    return dict(problems_of(message(**fields), REGISTRY, Path()))


def guard(name: str = "g", action: str = "GUARD_ACTION_COUNT", **fields: Any) -> dict[str, Any]:
    """A guard of a probe, or of what `score` says."""
    score = {"terms": [{"site": SITE, "row": PROBE, "weight": 1}]}
    return {"name": name, "action": action, "score": score, "level": 0.5} | fields


def clamp(**fields: Any) -> dict[str, Any]:
    return guard(action="GUARD_ACTION_CLAMP", **fields)


def compiled_program(document: dict[str, Any]) -> Any:
    return compile_program(json_format.ParseDict(document, program_pb2.Program()), REGISTRY)


def test_policy_of_every_part() -> None:
    compiled = policy(
        program=editing(5),
        guards=[guard()],
        locked=[{"site": SITE, "row": latent(2)}],
        watch=[{"site": SITE, "row": latent(3)}],
    )
    assert (compiled.name, compiled.version, compiled.shadow, compiled.forced) == ("low", 1, False, None)
    assert compiled.program == compiled_program(editing(5))
    assert compiled.locked == {(BUNDLE, 5), (BUNDLE, 2)}
    # Two latents with encoder and decoder, and the guard's probe, each of length 1.
    assert compiled.directions.shape == (5, WIDTH)
    np.testing.assert_allclose(np.linalg.norm(compiled.directions, axis=1), 1, rtol=1e-6)
    rows = set(compiled.rows[NUMBER])
    assert {wire.Row(BUNDLE, 5), wire.Row(BUNDLE, 3)} < rows
    assert wire.Row(BUNDLE, 2) not in rows
    assert len(rows) == 3


def test_every_problem_is_named() -> None:
    many = problems(
        name="n" * 200,
        version=0,
        bundles={BUNDLE: "other", "gone": "x"},
        program={
            "sites": [
                {"site": SITE, "edits": [{"row": latent(99), "set": 1}, {"row": {"feature": {"index": 2}}, "set": 1}]},
                {"site": "layers.7.mlp_out", "edits": [{"row": VECTOR, "add": 1}]},
            ],
            "gate": {"site": SITE, "any_of": [{"row": VECTOR, "above": 1}, {"row": latent(1, "one"), "above": 1}]},
        },
        guards=[guard("a"), guard("a"), guard("", level="Infinity"), guard(action="GUARD_ACTION_UNSPECIFIED")],
        locked=[{"site": "x", "row": latent(1)}, {"site": SITE, "row": latent(77)}],
        watch=[{"site": SITE, "row": latent(78)}, {"site": SITE, "row": PROBE}],
        forbiddenFields=["sampling.nothing", "sampling.n"],
        maxDisplacement=-1,
    )
    assert set(many) == {
        "name", "version", f"bundles[{BUNDLE}]", "bundles[gone]",
        "program.sites[0].edits[0].row.feature.index", "program.sites[0].edits[1].row.feature.bundle",
        "program.sites[1].site", "program.gate.any_of[0].row", "program.gate.any_of[1].row.feature.bundle",
        "guards[1].name", "guards[2].name", "guards[3].action", "locked[0].site", "locked[1].row.feature.index",
        "watch[0].row.feature.index", "watch[1].row", "forbidden_fields[0]", "max_displacement",
    }  # fmt: skip
    assert "99" in many["program.sites[0].edits[0].row.feature.index"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"mode": 7}, "mode"),
        ({"name": ""}, "name"),
        ({"maxDisplacement": 0}, "max_displacement"),
        ({"program": editing(5), "bundles": {}}, "program.sites[0].edits[0].row.feature.bundle"),
        ({"program": {"sites": []}}, "program.sites"),
        ({"program": {"sites": [{"site": SITE, "blend": {"weight": 0.5}}]}}, "program.sites[0].blend.bundle"),
        ({"locked": [{"site": SITE, "row": {"feature": {"index": 1}}}]}, "locked[0].row.feature.bundle"),
        ({"guards": [clamp()]}, "guards[0].action"),
        ({"guards": [guard(action="GUARD_ACTION_CLAMP_FROM_START")]}, "guards[0].action"),
        ({"program": editing(5), "guards": [clamp(), clamp(name="h")]}, "guards[1].action"),
        ({"program": editing(5, gate={"site": EARLY, "any_of": [{"row": PROBE, "above": 1}]}), "guards": [clamp()]},
         "guards[0].score.terms[0].site"),
        ({"program": editing(5), "guards": [clamp(score={"terms": [{"site": SITE, "row": PROBE, "weight": 2}]})]},
         "guards[0].score"),
    ],
)  # fmt: skip
def test_field_at_fault(fields: dict[str, Any], field: str) -> None:
    assert field in problems(**fields)


def test_bundle_with_another_hash_is_refused() -> None:
    assert problems(bundles={BUNDLE: "ab"}) == {}
    assert "'ab'" in problems(bundles={BUNDLE: "ac"})[f"bundles[{BUNDLE}]"]


# A guard that clamps is the sequence condition of the gate.
STATISTICS: dict[str, dict[str, Any]] = {
    "share": {"share": {"above": 0.25}},
    "moving_average": {"movingAverage": {"decay": 0.1}},
    "window": {"window": {"tokens": 4}},
    "cusum": {"cusum": {"drift": 1.5}},
}


@pytest.mark.parametrize("statistic", STATISTICS)
def test_guard_that_clamps_is_the_latch_of_the_gate(statistic: str) -> None:
    compiled = policy(program=editing(5), guards=[clamp(**STATISTICS[statistic], minTokens=3)]).program
    condition = {"score": PROBE, "level": 0.5, "minTokens": 3, "latch": True} | STATISTICS[statistic]
    assert compiled == compiled_program(editing(5, gate={"site": SITE, "sequence": condition}))


def test_guard_that_clamps_on_a_token_or_on_agreement() -> None:
    def sequence(**fields: Any) -> wire.Sequence:
        compiled = policy(program=editing(5), guards=[clamp(**fields)])
        assert compiled.program
        gate = compiled.program.sites[0].gate
        assert gate is not None
        assert gate.sequence is not None
        return gate.sequence

    token = sequence()
    assert (token.window, token.binary, token.level, token.latch) == (1, None, 0.5, True)
    agreement = sequence(agreement={"above": 2.5, "tokens": 4}, level=0.75)
    assert (agreement.window, agreement.binary, agreement.level, agreement.latch) == (4, 2.5, 0.75, True)
    other = policy(program=editing(5), guards=[clamp(agreement={"above": 2.0, "tokens": 4}, level=0.75)]).program
    first = policy(program=editing(5), guards=[clamp(agreement={"above": 2.5, "tokens": 4}, level=0.75)]).program
    assert first
    assert other
    assert first.digest != other.digest


def test_triggers_of_the_program_stay_beside_the_guard() -> None:
    trigger = {"site": SITE, "any_of": [{"row": latent(3), "above": 1}]}
    compiled = policy(program=editing(5, gate=trigger), guards=[clamp()]).program
    assert compiled
    gate = compiled.sites[0].gate
    assert gate
    assert len(gate.triggers) == 1
    assert gate.sequence


def test_program_without_its_gate_is_what_runs_from_the_start() -> None:
    from_start = guard(action="GUARD_ACTION_CLAMP_FROM_START", phase="PHASE_PROMPT")
    gate = {"site": SITE, "any_of": [{"row": latent(3), "above": 1}]}
    gated = policy(program=editing(5, gate=gate), guards=[from_start])
    assert gated.program == compiled_program(editing(5, gate=gate))
    assert gated.forced == compiled_program(editing(5))
    opened = policy(program=editing(5), guards=[from_start])
    # Nothing runs before the guard has held.
    assert (opened.program, opened.forced) == (None, compiled_program(editing(5)))
    assert opened.first_edited_site == NUMBER


def test_shadow_moves_nothing_and_keeps_its_gate_and_edits() -> None:
    gate = {"site": SITE, "any_of": [{"row": latent(3), "above": 1}]}
    enforced = policy(program=editing(5, gate=gate)).program
    shadow = policy(program=editing(5, gate=gate), mode="POLICY_MODE_SHADOW").program
    assert enforced
    assert shadow
    (site,), (still,) = enforced.sites, shadow.sites
    assert (site.max_displacement, still.max_displacement) == (inf, 0.0)
    assert (still.edits, still.gate, still.rows) == (site.edits, site.gate, site.rows)
    assert shadow.digest != enforced.digest
    assert shadow.edits == enforced.edits


def test_digest_covers_what_is_written_and_not_its_order() -> None:
    first = digest_of_message(message(program=editing(5), bundles={"one": "ab", BUNDLE: "ab"}))
    assert first == digest_of_message(message(program=editing(5), bundles={BUNDLE: "ab", "one": "ab"}))
    assert len({first, digest_of_message(message(program=editing(4))), digest_of_message(message())}) == 3


PATHS = ("sampling.logprobs", "sampling.n", "sampling.logit_bias", "prompt.token_ids", "prompt.token_ids.ids",
         "prompt.chat.messages.role", "steering.program.gate", "stream_interval", "report.top_k", "sampling",
         "prompt.chat.continue_final_message")  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_path_of_a_request(path: str) -> None:
    assert is_request_field(path)


@pytest.mark.parametrize(
    "path", ["", "x", "sampling.", "sampling.x", "sampling.logit_bias.key", "sampling.n.x", ".sampling"]
)
def test_path_of_no_request(path: str) -> None:
    assert not is_request_field(path)


def test_field_that_is_set() -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}
    request = json_format.ParseDict(
        {"prompt": {"chat": chat}, "sampling": {"n": 1, "temperature": 0, "stop": []}}, inference_pb2.GenerateRequest()
    )
    assert {path for path in PATHS if is_set(request, path)} == {"sampling.n", "prompt.chat.messages.role", "sampling"}
    assert is_set(request, "sampling.temperature")
    assert not is_set(request, "sampling.stop")


def test_first_sites_that_matter() -> None:
    late = {"terms": [{"site": OTHER, "row": PROBE, "weight": 1}]}
    compiled = policy(program=editing(5), guards=[guard(score=late)])
    assert compiled.first_edited_site == NUMBER
    # Guards read what they find at their site, before any edit there.
    assert compiled.first_unread_site == REGISTRY.layout.sites.index(OTHER)
    gate = {"site": SITE, "any_of": [{"row": latent(3), "above": 1}]}
    assert policy(program=editing(5, gate=gate)).first_unread_site == NUMBER + 1
    assert policy_pb2.Policy().mode == policy_pb2.POLICY_MODE_UNSPECIFIED
