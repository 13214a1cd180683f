"""The attestation of a choice: what ran, as the worker counted it, never echoed from the request."""

from rudder.server.safety.guards import ACTIONS, COUNT
from rudder.server.safety.policy import Policy
from rudder.server.safety.verdicts import Refusing, Verdict
from rudder.server.service.record import CallRecord, ChoiceRecord
from rudder.v1 import inference_pb2


def attestation_of(call: CallRecord, choice: ChoiceRecord, engine_epoch: str) -> inference_pb2.Attestation:
    """Convert the record of a finished choice to an Attestation."""
    shown = {"", *(policy.name for policy in call.policies if reads_scores(policy, call))}
    return inference_pb2.Attestation(
        program_digest=call.program_digest,
        policy_digest=call.policy_digest,
        edits=[inference_pb2.EditCount(**edit._asdict()) for edit in choice.edits if edit.policy in shown],
        tokens_seen=choice.tokens_seen,
        engine_epoch=engine_epoch,
        gates=[inference_pb2.GateCount(**gate._asdict()) for gate in choice.gates if gate.policy in shown],
        request_id=call.request_id,
        policies=[applied_policy(policy, call, choice) for policy in call.policies],
        topic=call.topic,
    )


def applied_policy(policy: Policy, call: CallRecord, choice: ChoiceRecord) -> inference_pb2.AppliedPolicy:
    """Convert what a policy did. Guards that only count are in metrics and audit."""
    verdicts = [
        inference_pb2.Verdict(rule=found.rule, position=found.position, score=visible_score(found, policy, call))
        for found in choice.verdicts
        if found.policy == policy.name and found.action != ACTIONS[COUNT]
    ]
    return inference_pb2.AppliedPolicy(
        name=policy.name,
        version=policy.version,
        digest=policy.digest,
        shadow=policy.shadow,
        verdicts=verdicts,
        withheld=not reads_scores(policy, call),
    )


def policy_refusal(call: CallRecord, refusing: Refusing) -> inference_pb2.PolicyRefusal:
    """Convert the verdict that ended a choice."""
    verdict = refusing.verdict
    policy = next(policy for policy in call.policies if policy.name == verdict.policy)
    return inference_pb2.PolicyRefusal(
        policy=verdict.policy,
        rule=verdict.rule,
        text=refusing.text,
        position=verdict.position,
        score=visible_score(verdict, policy, call),
    )


def visible_score(verdict: Verdict, policy: Policy, call: CallRecord) -> float | None:
    """Return a verdict's score where the caller may read it: one who can search for texts by it finds a way past."""
    return verdict.score if reads_scores(policy, call) else None


def reads_scores(policy: Policy, call: CallRecord) -> bool:
    """Return whether the caller may read the scores of a policy, and what its gate and its edits did.

    At how many tokens a gate was open, and an edit changed something, tells as much as a score: texts can be searched
    by it.
    """
    return call.binding.reads_scores and policy.message.rights.read_guards
