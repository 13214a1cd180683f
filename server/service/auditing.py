"""The audit log's entries: two per call that a policy binds, one per change of a policy. None has a client's text."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rudder.server.safety.audit.trail import AuditFailed, Trail
from rudder.server.safety.policy import Policy
from rudder.server.safety.store import Change, PolicyStore, describe
from rudder.server.service.record import CallRecord, ChoiceRecord
from rudder.server.service.serving import Serving

Entry = Mapping[str, Any]


async def audit_opening(serving: Serving, record: CallRecord) -> None:
    """Write that a call which a policy binds begins, before anything of it runs. Raises AuditFailed.

    If the process is killed in the call, this is the only entry that it has.
    """
    if serving.audit and record.policies:
        serving.audit.require_open()
        await serving.audit.append({"kind": "opened", **identity_of(record)})


async def audit(serving: Serving, record: CallRecord) -> None:
    """Write the entry of an ended call, once, if a policy binds it. Raises AuditFailed."""
    if serving.audit and record.policies and not record.audited:
        record.audited = True
        await serving.audit.append(entry_of(record))


async def audit_refused(serving: Serving, record: CallRecord) -> None:
    """Write the entry of a call that ends with an error, which stays that error whatever becomes of the entry."""
    with suppress(AuditFailed):
        await audit(serving, record)


def audit_abandoned(serving: Serving, record: CallRecord) -> None:
    """Hand over the entry of a call that has none yet: its client has gone, and nobody waits."""
    if serving.audit and record.policies and not record.audited:
        record.audited = True
        serving.audit.submit(entry_of(record))


def audit_changes(trail: Trail, store: PolicyStore) -> None:
    """Write an entry for each policy in force, and for each change from now on."""
    for policy in store.in_force.values():
        trail.submit(entry_of_change(Change("applied", "start", policy)))

    def audit_change(change: Change) -> None:
        trail.submit(entry_of_change(change))

    store.listeners.append(audit_change)


def entry_of(record: CallRecord) -> Entry:
    """Return the entry of a closed record."""
    return {
        "kind": "call",
        **identity_of(record),
        "program": record.program_digest,
        "outcome": record.outcome,
        "prompt_tokens": record.prompt_tokens,
        "choices": [entry_of_choice(choice) for choice in record.choices],
    }


def identity_of(record: CallRecord) -> Entry:
    """Return what is known of a call when it begins."""
    return {
        "request_id": record.request_id,
        "caller": record.caller.id,
        "tenant": record.caller.tenant,
        "method": record.method,
        "policies": [entry_of_policy(policy) for policy in record.policies],
    }


def entry_of_choice(choice: ChoiceRecord) -> Entry:
    """Return what an entry says of a choice. A request's own rows may have names of the client's: they are left out."""
    return {
        "finish": choice.finish_reason or "none",
        "generated_tokens": choice.generated_tokens,
        "tokens_seen": choice.tokens_seen,
        "edited_tokens": sum(edit.tokens_touched for edit in choice.edits if not edit.policy),
        "edits": [
            {"policy": e.policy, "site": e.site, "row": e.row, "operation": e.operation, "tokens": e.tokens_touched}
            for e in choice.edits
            if e.policy and e.tokens_touched
        ],
        "gates": [
            {"policy": gate.policy, "site": gate.site, "open_tokens": gate.open_tokens}
            for gate in choice.gates
            if gate.policy
        ],
        "verdicts": [verdict._asdict() for verdict in choice.verdicts],
        "refused_by": choice.refusing.rule if choice.refusing else None,
    }


def entry_of_change(change: Change) -> Entry:
    """Return the entry of a change of a policy, or of one that was refused."""
    policy = entry_of_policy(change.policy) if change.policy else None
    return {"kind": "policy", "change": change.outcome, "source": change.source, "policy": policy}


def entry_of_policy(policy: Policy) -> Entry:
    """Return what an entry says of a policy."""
    said = describe(policy)
    return {"name": said["policy"], **{name: said[name] for name in ("version", "digest", "mode")}}
