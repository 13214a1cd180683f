"""The conservation ledger: what calls hold of the server. Without calls, all of it is 0."""

import asyncio
import os
import threading
from pathlib import Path

from rudder.server.service.record import CallRecord
from rudder.server.service.serving import Serving
from rudder.v1 import debug_pb2

STATUS, DESCRIPTORS = Path("/proc/self/statm"), Path("/proc/self/fd")


async def get_ledger(serving: Serving, record: CallRecord) -> debug_pb2.GetLedgerResponse:
    """Return what calls hold, without this one, and figures of the process."""
    held = {**held_by_server(serving, record), **await serving.engine.held_by_vllm()}
    return debug_pb2.GetLedgerResponse(held=held, process=process_figures())


def held_by_server(serving: Serving, record: CallRecord) -> dict[str, float]:
    """Return what calls hold in this process."""
    engine = serving.engine
    ledger, admission, quotas = engine.admission.ledger, engine.admission, serving.quotas
    return {
        "calls": len(serving.calls) - 1,
        "request_bytes": serving.pending.used - record.request_bytes,
        "streams": serving.pace.streams,
        "quota_streams": quotas.held("streams"),
        "quota_rows": quotas.held("rows"),
        "waiting": admission.waiting,
        "leases": len(ledger.leases) - len(admission.reservations),
        "slots": ledger.slots_used,
        "rows": len(ledger.held) - len(admission.reserved),
        "capture_tokens": ledger.capture_used,
        "inboxes": len(engine.hub.inboxes),
        "outputs": len(engine.queues),
    }


def process_figures() -> dict[str, float]:
    """Return what this process uses."""
    return {
        "tasks": len(asyncio.all_tasks()),
        "threads": threading.active_count(),
        "open_files": sum(1 for _ in DESCRIPTORS.iterdir()),
        "resident_bytes": int(STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
    }
