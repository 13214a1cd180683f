"""PolicyService: what is in force, checked, applied and explained, and who may do so."""

from types import SimpleNamespace
from typing import Any

import pytest

from rudder.server import config as configuration
from rudder.server.caller import ANONYMOUS, Caller
from rudder.server.identity.errors import CredentialError
from rudder.server.identity.roles import require_method
from rudder.server.safety.policy import digest_of_message
from rudder.server.safety.problems import PolicyInvalid
from rudder.server.service import policies
from rudder.server.service.errors import Refusal
from rudder.server.service.serving import Serving
from rudder.v1 import policy_pb2
from tests.unit.policies import HoldingEngine, editing, latent, message, serving_model
from tests.unit.programs import PROBE, SITE

ADMINISTRATOR = Caller("root", "acme", frozenset({"administer"}))
USER = Caller("alice", "acme", frozenset({"generate"}))
GUARD = {
    "name": "topic", "action": "GUARD_ACTION_STOP", "level": 1,
    "score": {"terms": [{"site": SITE, "row": PROBE, "weight": 1}]},
}  # fmt: skip
FULL = message(
    program=editing(5), guards=[GUARD], forbiddenFields=["sampling.n"], maxDisplacement=0.5, description="keeps low",
    binds={"roles": ["generate"]}, rights={"edit_latents": True},
)  # fmt: skip


def serving_of(**overrides: str) -> Serving:
    engine: Any = HoldingEngine()
    vars(engine).update(model=serving_model(), bundles={}, programs={}, tokenizer=SimpleNamespace())
    overrides = {"policies.allow_uncertified": "true"} | overrides
    return Serving.around(engine, configuration.load(None, overrides), engine.metrics)


async def serving_with(*messages: policy_pb2.Policy) -> Serving:
    serving = serving_of()
    for one in messages:
        await serving.policies.apply(one, "test")
    return serving


async def test_policies_are_listed_by_name_and_returned_whole() -> None:
    serving = await serving_with(message("z", mode="POLICY_MODE_SHADOW"), FULL)
    low, z = policies.list_policies(serving).policies
    assert (low.name, low.version, low.description, list(low.guards)) == ("low", 1, "keeps low", ["topic"])
    assert (low.digest, low.certificate) == (digest_of_message(FULL), "NONE")
    assert (low.mode, z.mode) == (policy_pb2.POLICY_MODE_ENFORCE, policy_pb2.POLICY_MODE_SHADOW)
    response = policies.get_policy(serving, policy_pb2.PolicyServiceGetRequest(name="low"))
    assert (response.policy, response.summary) == (FULL, low)
    with pytest.raises(Refusal) as caught:
        policies.get_policy(serving, policy_pb2.PolicyServiceGetRequest(name="x"))
    assert (caught.value.reason, caught.value.violations[0].field) == ("POLICY_UNKNOWN", "name")


async def test_validation_names_every_problem_and_changes_nothing() -> None:
    serving = await serving_with(FULL)
    bad = message(program=editing(99), forbiddenFields=["x"])
    response = await policies.validate(serving, policy_pb2.ValidateRequest(policy=bad))
    fields = {problem.field for problem in response.problems}
    assert fields == {"program.sites[0].edits[0].row.feature.index", "forbidden_fields[0]", "version"}
    assert response.digest == digest_of_message(bad)
    assert not (await policies.validate(serving, policy_pb2.ValidateRequest(policy=FULL))).problems
    assert serving.policies.in_force["low"].message == FULL


async def test_validation_names_rows_that_nobody_counts() -> None:
    watching = message(watch=[{"site": SITE, "row": latent(3)}])
    response = await policies.validate(serving_of(), policy_pb2.ValidateRequest(policy=watching))
    assert [problem.field for problem in response.problems] == ["watch[0]"]


async def test_apply_needs_a_caller_who_is_known_or_the_configuration() -> None:
    request = policy_pb2.ApplyRequest(policy=FULL)
    serving = serving_of()
    with pytest.raises(Refusal, match=r"policies\.allow_apply") as caught:
        await policies.apply(serving, ANONYMOUS, request)
    assert (caught.value.reason, serving.policies.in_force) == ("NOT_ALLOWED", {})
    assert (await policies.apply(serving, ADMINISTRATOR, request)).summary.name == "low"
    allowed = serving_of(**{"policies.allow_apply": "true"})
    assert (await policies.apply(allowed, ANONYMOUS, request)).summary.version == 1
    with pytest.raises(PolicyInvalid):
        await policies.apply(allowed, ANONYMOUS, policy_pb2.ApplyRequest(policy=message(program=editing(3))))


@pytest.mark.parametrize("method", ["Get", "Validate", "Apply"])
def test_methods_that_change_or_reveal_a_policy_need_a_role(method: str) -> None:
    require_method(ADMINISTRATOR, f"PolicyService.{method}")
    require_method(ANONYMOUS, f"PolicyService.{method}")
    with pytest.raises(CredentialError) as caught:
        require_method(USER, f"PolicyService.{method}")
    assert caught.value.reason == "ROLE_MISSING"
    require_method(USER, "PolicyService.Explain")


async def test_explanation_says_what_is_locked_forbidden_and_guarded() -> None:
    serving = await serving_with(FULL, message("quiet", mode="POLICY_MODE_SHADOW"))
    response = policies.explain(serving, USER, policy_pb2.ExplainRequest())
    assert [summary.name for summary in response.policies] == ["low", "quiet"]
    assert list(response.statements) == [
        "Policy 'low', version 1, binds this caller.",
        "It edits layers.1.resid_post behind the request's own program.",
        "Guard 'topic' of 'low' judges prompt and generated tokens by layers.1.resid_post; its action is stop.",
        "Policy 'quiet', version 1, binds this caller in shadow mode: it counts what it would do, and changes nothing.",
        "This caller may run the server's programs that have names, within what follows.",
        "It may run programs of its own on latents.",
        "It may not use vectors and probes of its own.",
        "It may not edit behind the first site that a policy edits.",
        "It may not edit where it changes what gates and guards read.",
        "It may not read locked rows and scores of guards.",
        "It may not edit before layers.1.resid_post.",
        "It may not edit behind layers.1.resid_post.",
        "Locked are the latents 5 of toy, and whatever is parallel to them.",
        "Its programs displace the residual by at most 0.5 of its norm at each site.",
        "Policy 'low' forbids the field sampling.n.",
    ]


async def test_explanation_of_another_caller_needs_a_role() -> None:
    serving = await serving_with(FULL)
    request = policy_pb2.ExplainRequest(caller="bob", roles=["observe"])
    assert list(policies.explain(serving, ADMINISTRATOR, request).statements) == ["No policy binds this caller."]
    with pytest.raises(CredentialError) as caught:
        policies.explain(serving, USER, request)
    assert caught.value.reason == "ROLE_MISSING"


async def test_explanations_do_not_remember_other_callers_for_ever() -> None:
    serving = await serving_with(FULL)
    for number in range(3000):
        policies.explain(serving, ADMINISTRATOR, policy_pb2.ExplainRequest(caller=str(number)))
    assert len(serving.policies.bindings) <= 1024
