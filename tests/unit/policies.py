"""Policies in JSON form over the registry of `tests/unit/programs.py`, and an engine that only holds rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from google.protobuf import json_format

from rudder.server.engine.admission import Admission
from rudder.server.monitoring.metrics import Metrics
from rudder.server.program import wire
from rudder.server.program.layout import Layout
from rudder.server.program.rows import Registry
from rudder.server.safety.policy import Policy, compile_policy
from rudder.v1 import policy_pb2
from tests.unit.programs import REGISTRY as ONE_STAGE
from tests.unit.programs import SITE
from tests.unit.reference import BUNDLE, WIDTH

LAYOUT = Layout(ONE_STAGE.layout.sites, rows=8, slots=2, stages=3, window=8, sequence_sites=(SITE,))
REGISTRY = Registry(LAYOUT, WIDTH, ONE_STAGE.dictionaries, max_edits=5)
PINS = {BUNDLE: "ab", "one": "ab", "two": "ab"}


def latent(index: int, bundle: str = BUNDLE) -> dict[str, Any]:
    """A latent whose bundle is named, as policies must."""
    return {"feature": {"index": index, "bundle": bundle}}


def editing(index: int = 5, site: str = SITE, **rest: Any) -> dict[str, Any]:
    """A program of one edit of a latent."""
    return {"sites": [{"site": site, "edits": [{"row": latent(index), "set": 3.0}]}]} | rest


def message(name: str = "low", **fields: Any) -> policy_pb2.Policy:
    """A policy that binds everybody."""
    document = {"name": name, "version": 1, "binds": {"all": True}, "bundles": PINS} | fields
    return json_format.ParseDict(document, policy_pb2.Policy())


def removal(name: str = "low", version: int = 2) -> policy_pb2.Policy:
    """What takes a policy out of force."""
    return policy_pb2.Policy(name=name, version=version, removed=True)


def policy(name: str = "low", registry: Registry = REGISTRY, **fields: Any) -> Policy:
    """A compiled policy."""
    return compile_policy(message(name, **fields), registry, Path())


class HoldingEngine:
    """What a PolicyStore needs of an engine. `dropped`: handles of rows that are held no longer."""

    def __init__(self, registry: Registry = REGISTRY) -> None:
        self.registry, self.metrics = registry, Metrics.create()
        self.admission = Admission(registry.layout, 8)
        self.held: dict[int, Mapping[int, Sequence[wire.Row]]] = {}
        self.dropped: list[int] = []

    async def hold(self, rows: Mapping[int, Sequence[wire.Row]]) -> int:
        handle = -1 - len(self.held)
        sites = tuple(wire.Site(number, tuple(rows[number])) for number in rows)
        self.admission.reserve(handle, wire.Request(0, 0, False, (sites,)))
        self.held[handle] = rows
        return handle

    async def drop(self, handle: int) -> None:
        self.admission.unreserve(handle)
        self.dropped.append(handle)

    def spawn(self, work: Any) -> None:
        """Run what does not wait for anything."""
        try:
            work.send(None)
        except StopIteration:
            return
        raise AssertionError("it waits")


def serving_model() -> SimpleNamespace:
    """What the service reads of a model."""
    return SimpleNamespace(name="m", max_model_len=100, vocab_size=1000, bos_token_id=None)
