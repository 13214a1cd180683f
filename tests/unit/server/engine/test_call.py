"""What keeps the prefix cache of one program from another's requests, and a client's words from the engine."""

from dataclasses import replace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from rudder.server.engine.call import Call, engine_sampling, salt
from rudder.server.program import wire
from rudder.server.program.compile import Compiled

SECRET = b"s" * 32
PROGRAM = Compiled(sites=(), digest="p", edits=(), in_sequence=False, by_phase=False)
CALL = Call((1, 2, 3), SamplingParams(), compiled=PROGRAM, tenant="a", cache_salt="b")
REQUEST = wire.Request(3, 19, True)


@pytest.mark.parametrize(
    "changed",
    [
        {"tenant": "other"},
        {"cache_salt": "other"},
        {"compiled": None},
        {"compiled": replace(PROGRAM, digest="other")},
        {"tenant": "ab", "cache_salt": ""},
    ],
)
def test_another_tenant_program_or_salt_shares_no_cache(changed: dict[str, Any]) -> None:
    assert salt(SECRET, replace(CALL, **changed), None) != salt(SECRET, CALL, None)


def test_the_same_call_shares_its_cache_whatever_it_asks_to_see() -> None:
    assert salt(SECRET, replace(CALL, prompt_ids=(1, 2, 3, 4), top_k=3), None) == salt(SECRET, CALL, None)


def test_another_policy_shares_no_cache() -> None:
    as_policy = salt(SECRET, replace(CALL, compiled=None), PROGRAM)
    assert len({salt(SECRET, CALL, None), as_policy, salt(SECRET, CALL, PROGRAM)}) == 3


def test_no_one_can_compute_a_salt_without_the_secret() -> None:
    assert salt(b"t" * 32, CALL, None) != salt(SECRET, CALL, None)


@pytest.mark.parametrize("of_policy", [False, True])
def test_where_phases_differ_the_length_of_the_prompt_is_part_of_the_salt(of_policy: bool) -> None:
    by_phase = replace(PROGRAM, by_phase=True)
    call, policy = (replace(CALL, compiled=None), by_phase) if of_policy else (replace(CALL, compiled=by_phase), None)
    assert salt(SECRET, replace(call, prompt_ids=(1, 2, 3, 4)), policy) != salt(SECRET, call, policy)


IN_SEQUENCE = replace(PROGRAM, in_sequence=True)


@pytest.mark.parametrize(
    ("changed", "policy", "skips"),
    [
        ({}, None, False),
        ({}, PROGRAM, False),
        ({"report_prompt": True}, None, True),
        ({"capture": True}, None, True),
        ({"compiled": IN_SEQUENCE}, None, True),
        ({}, IN_SEQUENCE, True),
    ],
)
def test_who_needs_activations_of_the_prompt_reads_no_cache(
    changed: dict[str, Any], policy: Compiled | None, skips: bool
) -> None:
    assert engine_sampling(replace(CALL, **changed), REQUEST, policy).skip_reading_prefix_cache is skips


def test_the_engine_is_told_the_program_and_nothing_else_of_a_clients() -> None:
    asked = SamplingParams(temperature=0.5, extra_args={"kv_transfer_params": {}, wire.EXTRA_ARG: b"x"})
    told = engine_sampling(replace(CALL, sampling=asked), REQUEST, None)
    assert told.extra_args == {wire.EXTRA_ARG: wire.encode(REQUEST)}
    assert (told.output_kind, told.temperature) == (RequestOutputKind.DELTA, 0.5)
    assert asked.extra_args != told.extra_args
