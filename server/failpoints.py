"""Failpoints: places at which a test makes the server fail. Without RUDDER_FAILPOINTS in the environment, nothing does.

The variable names a JSON file of faults by point, such as `{"audit.write": {"action": "enospc"}}`. It is read at every
point, so that a test changes faults while a server runs. A server with the variable does not start unless
`allow_unsafe` has `failpoints`.
"""

import asyncio
import errno
import os
import random
import time
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

VARIABLE = "RUDDER_FAILPOINTS"
POINTS = {
    "call": "a call begins",
    "decode": "a request is parsed",
    "admit.before": "a choice is about to wait for the engine",
    "admit.after": "a choice has its lease, and is about to be given to vLLM",
    "first_token": "the first output of a choice has come",
    "verdict": "a choice waits for what the worker reports",
    "stream.write": "a message of a stream is about to be written",
    "abort": "a request is about to be aborted in vLLM",
    "audit.write": "entries are about to be written to the audit log",
    "policy.reload": "a policy's file is about to be read again",
    "engine.step": "the worker begins a step",
    "telemetry.send": "the worker is about to send a frame",
}
LEAKED: list[bytes] = []


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What happens at a point. `seconds`: of a delay; `bytes`: of a leak; `share`: of the times, drawn at random."""

    action: Literal["error", "enospc", "delay", "skip", "leak"]
    seconds: Annotated[float, Meta(ge=0)] = 0.0
    bytes: Annotated[int, Meta(ge=0)] = 0
    share: Annotated[float, Meta(ge=0, le=1)] = 1.0


class Planted(Exception):
    """The error of a failpoint."""


FILE = Path(os.environ[VARIABLE]) if VARIABLE in os.environ else None


def fault_at(point: str) -> Fault | None:
    """Return the fault that a test has planted at a point. Raises KeyError: there is no such point."""
    if FILE is None:
        return None
    planted = msgspec.json.decode(FILE.read_bytes(), type=dict[str, Fault])
    if unknown := set(planted) - set(POINTS):
        raise KeyError(f"{FILE}: {', '.join(sorted(unknown))}: not one of {', '.join(POINTS)}")
    fault = planted.get(point)
    return fault if fault and random.random() < fault.share else None


def hit(point: str) -> bool:
    """Do what is planted at a point, and return whether the step is to be left out. A delay blocks the thread."""
    fault = fault_at(point)
    if fault and fault.action == "delay":
        time.sleep(fault.seconds)
    return carry_out(point, fault)


async def pause(point: str) -> bool:
    """Do the same in a coroutine: a delay blocks nobody else."""
    fault = fault_at(point)
    if fault and fault.action == "delay":
        await asyncio.sleep(fault.seconds)
    return carry_out(point, fault)


def carry_out(point: str, fault: Fault | None) -> bool:
    """Raise the error of a fault, or keep the memory that it leaks; return whether the step is to be left out."""
    if fault is None:
        return False
    if fault.action == "error":
        raise Planted(f"failpoint {point}")
    if fault.action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if fault.action == "leak":
        LEAKED.append(os.urandom(fault.bytes))
    return fault.action == "skip"
