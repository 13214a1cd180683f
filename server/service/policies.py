"""The methods of PolicyService: policies in force, checked, applied and explained."""

from dataclasses import replace

from rudder.server.caller import Caller
from rudder.server.identity.roles import require_role
from rudder.server.safety.explain import statements
from rudder.server.safety.memory import CALLER
from rudder.server.safety.policy import Policy, digest_of_message
from rudder.server.service.errors import Refusal, invalid
from rudder.server.service.serving import Serving
from rudder.v1 import policy_pb2


def list_policies(serving: Serving) -> policy_pb2.PolicyServiceListResponse:
    """Return the policies in force, by name."""
    in_force = sorted(serving.policies.in_force.values(), key=lambda policy: policy.name)
    return policy_pb2.PolicyServiceListResponse(policies=[summary_of(serving, policy) for policy in in_force])


def get_policy(serving: Serving, request: policy_pb2.PolicyServiceGetRequest) -> policy_pb2.PolicyServiceGetResponse:
    """Return a policy in force. Raises Refusal POLICY_UNKNOWN."""
    policy = serving.policies.in_force.get(request.name)
    if policy is None:
        raise invalid("name", f"no policy {request.name!r} is in force", "POLICY_UNKNOWN")
    return policy_pb2.PolicyServiceGetResponse(summary=summary_of(serving, policy), policy=policy.message)


async def validate(serving: Serving, request: policy_pb2.ValidateRequest) -> policy_pb2.ValidateResponse:
    """Return every problem that a policy has on this server, and its digest. Nothing changes."""
    problems = await serving.policies.problems(request.policy)
    return policy_pb2.ValidateResponse(
        problems=[policy_pb2.PolicyProblem(field=field, description=text) for field, text in problems],
        digest=digest_of_message(request.policy),
    )


async def apply(serving: Serving, caller: Caller, request: policy_pb2.ApplyRequest) -> policy_pb2.ApplyResponse:
    """Put a policy in force, or take it out.

    Raises PolicyInvalid, and Refusal NOT_ALLOWED at a door that authenticates nobody.
    """
    if caller.anonymous and not serving.config.policies.allow_apply:
        problem = "this door authenticates nobody: change the files of policies.folder, or set policies.allow_apply"
        raise Refusal("NOT_ALLOWED", problem)
    if serving.audit:
        serving.audit.require_open()
    policy = await serving.policies.apply(request.policy, f"{CALLER}{caller.id}")
    return policy_pb2.ApplyResponse(summary=summary_of(serving, policy))


def explain(serving: Serving, caller: Caller, request: policy_pb2.ExplainRequest) -> policy_pb2.ExplainResponse:
    """Return which policies bind a caller, and what they lock and forbid, in words."""
    if request.caller or request.roles:
        require_role(caller, "administer", "caller")
        caller = replace(caller, id=request.caller, roles=frozenset(request.roles))
    binding = serving.policies.binding(caller)
    return policy_pb2.ExplainResponse(
        policies=[summary_of(serving, policy) for policy in binding.policies],
        statements=statements(binding, serving.engine.registry),
    )


def summary_of(serving: Serving, policy: Policy) -> policy_pb2.PolicySummary:
    """Return what a list says of a policy."""
    shadow = policy_pb2.POLICY_MODE_SHADOW if policy.shadow else policy_pb2.POLICY_MODE_ENFORCE
    return policy_pb2.PolicySummary(
        name=policy.name,
        description=policy.message.description,
        version=policy.version,
        digest=policy.digest,
        mode=shadow,
        guards=[guard.name for guard in policy.guards],
        certificate=serving.policies.certificate(policy.message)[0],
    )
