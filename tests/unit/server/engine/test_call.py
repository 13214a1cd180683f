"""Cache salts separate tenants, programs and policies; sampling parameters carry the compiled request only."""

from dataclasses import replace
from typing import Any

import pytest

from rudder.server.caller import ANONYMOUS
from rudder.server.engine.adapter import RequestOutputKind, SamplingParams
from rudder.server.engine.call import Call, FinishReason, engine_sampling, salt
from rudder.server.program import wire
from rudder.server.program.compile import NOTHING, Compiled
from rudder.server.program.watch import Watched

SECRET = b"s" * 32
PROGRAM = Compiled(sites=(), digest="p", edits=(), in_sequence=False, by_phase=False)
TENANT_A = replace(ANONYMOUS, tenant="a")
CALL = Call((1, 2, 3), SamplingParams(), compiled=PROGRAM, caller=TENANT_A, cache_salt="b")
REQUEST = wire.Request(3, 19, True)
ROW = wire.Row("toy", 0)


@pytest.mark.parametrize(
    "changed",
    [
        {"caller": replace(ANONYMOUS, tenant="other")},
        {"cache_salt": "other"},
        {"compiled": None},
        {"compiled": replace(PROGRAM, digest="other")},
        {"caller": replace(ANONYMOUS, tenant="ab"), "cache_salt": ""},
    ],
)
def test_other_tenant_program_or_client_salt_changes_the_salt(changed: dict[str, Any]) -> None:
    assert salt(SECRET, replace(CALL, **changed)) != salt(SECRET, CALL)


def test_reports_and_prompt_do_not_change_the_salt() -> None:
    assert salt(SECRET, replace(CALL, prompt_ids=(1, 2, 3, 4), top_k=3)) == salt(SECRET, CALL)


def test_callers_of_one_tenant_share_the_salt() -> None:
    assert salt(SECRET, replace(CALL, caller=replace(TENANT_A, id="other", roles=frozenset()))) == salt(SECRET, CALL)


def test_policy_changes_the_salt() -> None:
    as_policy = salt(SECRET, replace(CALL, compiled=None, policies=(PROGRAM,)))
    assert len({salt(SECRET, CALL), as_policy, salt(SECRET, replace(CALL, policies=(PROGRAM,)))}) == 3


def test_order_and_number_of_policies_change_the_salt() -> None:
    other = replace(PROGRAM, digest="other")
    orders = [(PROGRAM, other), (other, PROGRAM), (other,), (NOTHING, other)]
    assert len({salt(SECRET, replace(CALL, policies=policies)) for policies in orders}) == len(orders)


def test_salt_depends_on_the_secret() -> None:
    assert salt(b"t" * 32, CALL) != salt(SECRET, CALL)


@pytest.mark.parametrize("of_policy", [False, True])
def test_prompt_length_changes_the_salt_when_phases_differ(of_policy: bool) -> None:
    by_phase = replace(PROGRAM, by_phase=True)
    programs: dict[str, Any] = (
        {"compiled": None, "policies": (PROGRAM, by_phase)} if of_policy else {"compiled": by_phase}
    )
    call = replace(CALL, **programs)
    assert salt(SECRET, replace(call, prompt_ids=(1, 2, 3, 4))) != salt(SECRET, call)


@pytest.mark.parametrize("of_policy", [False, True])
def test_prompt_length_changes_the_salt_of_edited_calls_when_tokens_are_excluded_by_id(of_policy: bool) -> None:
    """A generated token is edited whatever its id, and excluded in the prompt of the next turn."""
    programs: dict[str, Any] = {"compiled": None, "policies": (PROGRAM,)} if of_policy else {}
    call = replace(CALL, **programs)
    longer = replace(call, prompt_ids=(1, 2, 3, 4))
    assert salt(SECRET, longer, by_id=True) != salt(SECRET, call, by_id=True)
    plain, longer = (replace(part, compiled=None, policies=()) for part in (call, longer))
    assert salt(SECRET, longer, by_id=True) == salt(SECRET, plain, by_id=True)


IN_SEQUENCE = replace(PROGRAM, in_sequence=True)


@pytest.mark.parametrize(
    ("changed", "skips"),
    [
        ({}, False),
        ({"policies": (PROGRAM,)}, False),
        ({"watch": (Watched(0, ROW, prompt=True),)}, True),
        ({"watch": (Watched(0, ROW),)}, False),
        ({"watch": (Watched(0, ROW),), "guard": (Watched(0, ROW, prompt=True),)}, True),
        ({"guard": (Watched(0, ROW),)}, False),
        ({"top_k": 3, "top_k_prompt": True}, True),
        ({"top_k": 3}, False),
        ({"top_k_prompt": True}, True),
        ({"capture": True}, True),
        ({"compiled": IN_SEQUENCE}, True),
        ({"policies": (PROGRAM, IN_SEQUENCE)}, True),
    ],
)
def test_call_that_needs_prompt_activations_skips_the_prefix_cache(changed: dict[str, Any], skips: bool) -> None:
    assert engine_sampling(replace(CALL, **changed), REQUEST).skip_reading_prefix_cache is skips


def test_sampling_carries_the_program_and_drops_client_extra_args() -> None:
    client = SamplingParams(temperature=0.5, extra_args={"kv_transfer_params": {}, wire.EXTRA_ARG: b"x"})
    params = engine_sampling(replace(CALL, sampling=client), REQUEST)
    assert params.extra_args == {wire.EXTRA_ARG: wire.encode(REQUEST)}
    assert (params.output_kind, params.temperature) == (RequestOutputKind.DELTA, 0.5)
    assert client.extra_args != params.extra_args


def test_every_finish_reason_of_vllm_is_mapped() -> None:
    from vllm.v1.engine import FINISH_REASON_STRINGS

    assert [str(reason) for reason in FinishReason] == [*FINISH_REASON_STRINGS, "refused"]
