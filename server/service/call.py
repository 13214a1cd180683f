"""What surrounds every call at every door: request id, admission to the server, errors, metrics, access log."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rudder.server import failpoints
from rudder.server.caller import ANONYMOUS
from rudder.server.identity.authenticator import Credentials
from rudder.server.identity.roles import require_method
from rudder.server.monitoring.traces import Correlation
from rudder.server.service import record as records
from rudder.server.service.auditing import audit, audit_abandoned, audit_opening, audit_refused
from rudder.server.service.errors import Refusal, refusal_of
from rudder.server.service.record import CallRecord
from rudder.server.service.serving import Serving
from rudder.server.service.tracing import trace

# The client's own timer cancels the call a moment before this process would.
DEADLINE_SLACK_S = 0.05
# Calls that policies bind.
BOUND_METHODS = "InferenceService."


@asynccontextmanager
async def begin_call(
    serving: Serving,
    method: str,
    credentials: Credentials,
    request_bytes: int,
    correlation: Correlation,
    deadline: float | None = None,
) -> AsyncIterator[CallRecord]:
    """Surround a call. `method`: `Service.Method`; `deadline`: when the client gives up, by `time.monotonic`.

    Raises Refusal, with the request id in it, for every exception of the call, if the server takes no calls, and if it
    ends before the call. A call that its client cancelled stays cancelled. In each case it is counted and logged once,
    and if a policy binds it, it has two entries in the audit log, of its beginning and of its end: these wait for them
    where the configuration says so.
    """
    span = serving.spans.begin(correlation.traceparent) if serving.spans else None
    record = CallRecord(method, ANONYMOUS, correlation, span=span, request_bytes=request_bytes)
    task = asyncio.current_task()
    assert task
    serving.calls.add(task)
    try:
        failpoints.hit("call")
        require_open(serving)
        admit(serving, record, credentials, request_bytes)
        await audit_opening(serving, record)
        yield record
        record.end("OK")
        await audit(serving, record)
    except (asyncio.CancelledError, GeneratorExit):
        if serving.aborted:
            task.uncancel()
            raise refused(record, Refusal("DRAINING", "the server shut down before the call ended")) from None
        expired = deadline is not None and time.monotonic() >= deadline - DEADLINE_SLACK_S
        record.end("DEADLINE_EXCEEDED" if expired else "CANCELLED")
        raise
    except Exception as error:
        # The log has the cause of an unexpected one.
        refusal = refused(record, refusal_of(error))
        await audit_refused(serving, record)
        raise refusal from None
    finally:
        serving.calls.discard(task)
        serving.policies.release(record.policies)
        audit_abandoned(serving, record)
        records.export(record, serving.metrics)
        records.log(record)
        if record.span:
            trace(record, serving.engine.model.name)


def admit(serving: Serving, record: CallRecord, credentials: Credentials, request_bytes: int) -> None:
    """Find out who calls, whether the caller may call this method and send so much, and which policies bind the call.

    Raises CredentialError, Refusal.
    """
    caller = record.caller = serving.authenticator.caller(credentials)
    require_method(caller, record.method)
    if record.method.startswith(BOUND_METHODS):
        record.binding = serving.policies.binding(caller)
        serving.policies.acquire(record.policies)
    for quota, amount in (("requests", 1), ("request_bytes", request_bytes)):
        serving.quotas.require(caller, quota, "QUOTA_REQUESTS", amount)
        serving.quotas.charge(caller, quota, amount)


def refused(record: CallRecord, refusal: Refusal) -> Refusal:
    """End a call's record with a refusal; return it with the request id."""
    refusal.request_id = record.request_id
    record.end(refusal.reason, refusal)
    return refusal


def require_open(serving: Serving) -> None:
    """Refuse a call that cannot end well: the server drains, telemetry is lost, or the engine has died."""
    if serving.draining:
        raise Refusal("DRAINING", "the server is shutting down")
    serving.engine.require_alive()
    if serving.engine.stalled:
        raise Refusal("ENGINE_STALLED", "the engine makes no progress")
    if not serving.engine.healthy:
        raise Refusal("ENGINE_DEAD", "the engine has died")
