"""The audit entries of calls and of changes: which calls have one, what it says, and what it never says."""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rudder.server.caller import Caller
from rudder.server.cli.audit import summary
from rudder.server.identity.authenticator import Credentials
from rudder.server.monitoring.metrics import Metrics
from rudder.server.monitoring.traces import Correlation
from rudder.server.program.compile import NOTHING
from rudder.server.safety.audit import chain
from rudder.server.safety.audit.log import AuditLog
from rudder.server.safety.audit.trail import Trail, open_trail
from rudder.server.safety.audit.verify import lines, verify
from rudder.server.safety.binding import UNBOUND, Binding
from rudder.server.safety.policy import Policy
from rudder.server.safety.store import Change
from rudder.server.safety.verdicts import Findings, Refusing, Verdict
from rudder.server.service.auditing import audit_changes
from rudder.server.service.call import begin_call
from rudder.server.service.errors import Refusal, invalid
from rudder.server.service.quotas import QuotaLedger
from rudder.server.service.record import ChoiceRecord, EditRecord, GateRecord
from rudder.v1 import policy_pb2
from tests.unit.disk import full_beyond
from tests.unit.server.safety.audit.trails import settings

POLICY = Policy(policy_pb2.Policy(name="forget", version=3), "d" * 64, program=NOTHING)
ANNA = Caller("anna", "lab", frozenset({"generate"}))
METHOD = "InferenceService.Generate"


class Server:
    """What `begin_call` reads of a Serving, with a log in a folder."""

    def __init__(self, folder: Path, binding: Binding, **fields: Any) -> None:
        self.metrics = Metrics.create()
        trail = open_trail(settings(folder, **fields), self.metrics)
        assert trail
        self.trail: Trail = trail
        policies = SimpleNamespace(binding=lambda _: binding, acquire=lambda _: None, release=lambda _: None)
        engine = SimpleNamespace(healthy=True, stalled=False, require_alive=lambda: None)
        self.serving: Any = SimpleNamespace(
            engine=engine, draining=False, metrics=self.metrics, calls=set(), aborted=False, policies=policies,
            audit=trail, authenticator=SimpleNamespace(caller=lambda _: ANNA), quotas=QuotaLedger(),
            spans=None,
        )  # fmt: skip

    def begin(self, method: str = METHOD) -> Any:
        return begin_call(self.serving, method, Credentials(), 1, Correlation("a client's text", ""))

    def entries(self) -> list[dict[str, Any]]:
        """All entries but the first."""
        return [entry for line in lines(self.trail.log.place) if (entry := chain.entry_of(line))][1:]


Serve = Callable[..., Server]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    made = list[Server]()

    def start(binding: Binding | None = None, **fields: Any) -> Server:
        made.append(Server(tmp_path, binding or Binding((POLICY,)), **fields))
        return made[-1]

    yield start
    for server in made:
        server.trail.close()


def choice() -> ChoiceRecord:
    edits = (
        EditRecord("request", "layers.1.mlp_out", "vector a client's text", "add 3", 4),
        EditRecord("policy", "layers.2.resid_post", "feature 7 of b", "set 3", 5, policy="forget"),
        EditRecord("policy", "layers.2.resid_post", "feature 8 of b", "set 3", 0, policy="forget"),
    )
    gates = (GateRecord("policy", "layers.2.resid_post", 5, None, "forget"),)
    verdict = Verdict("forget", "topic", "stop", shadow=False, position=7, score=1.5)
    findings = Findings([verdict], Refusing(verdict, "No."))
    return ChoiceRecord(9, 0, 12, 0.1, "refused", edits, gates, findings)


async def test_entry_says_what_ran_and_no_text(serve: Serve) -> None:
    server = serve()
    async with server.begin() as record:
        record.program_digest, record.prompt_tokens, record.choices = "p" * 64, 4, [choice()]
    opened, entry = server.entries()
    assert opened.pop("time").endswith("Z")
    assert entry.pop("time").endswith("Z")
    identity = {
        "request_id": record.request_id, "caller": "anna", "tenant": "lab", "method": METHOD,
        "policies": [{"name": "forget", "version": 3, "digest": "d" * 64, "mode": "enforce"}],
    }  # fmt: skip
    assert opened == {"sequence": 2, "kind": "opened", **identity}
    assert entry == {
        "sequence": 3, "kind": "call", "outcome": "POLICY_REFUSED", "program": "p" * 64, "prompt_tokens": 4, **identity,
        "choices": [{
            "finish": "refused", "generated_tokens": 9, "tokens_seen": 12, "edited_tokens": 4,
            "verdicts": [{
                "policy": "forget", "rule": "topic", "action": "stop", "shadow": False, "position": 7, "score": 1.5,
            }],
            "refused_by": "forget/topic",
            "edits": [{
                "policy": "forget", "site": "layers.2.resid_post", "row": "feature 7 of b", "operation": "set 3",
                "tokens": 5,
            }],
            "gates": [{"policy": "forget", "site": "layers.2.resid_post", "open_tokens": 5}],
        }],
    }  # fmt: skip
    assert "client" not in json.dumps(entry)


@pytest.mark.parametrize(("binding", "method"), [(UNBOUND, METHOD), (None, "ModelService.Get")])
async def test_calls_that_no_policy_binds_have_no_entry(serve: Serve, binding: Binding | None, method: str) -> None:
    server = serve(binding)
    async with server.begin(method):
        pass
    assert server.entries() == []


async def test_refused_call_has_an_entry_without_what_was_wrong(serve: Serve) -> None:
    server = serve()
    with pytest.raises(Refusal, match="a client's text"):
        async with server.begin():
            raise invalid("sampling.stop[0]", "a client's text")
    _, entry = server.entries()
    assert entry["outcome"] == "FIELD_INVALID"
    assert "client" not in json.dumps(entry)


async def test_cancelled_call_has_an_entry(serve: Serve) -> None:
    server, runs = serve(), asyncio.Event()

    async def call() -> None:
        async with server.begin() as record:
            record.choices = [ChoiceRecord(generated_tokens=3, finish_reason="abort")]
            runs.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(call())
    await runs.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    server.trail.close()
    _, entry = server.entries()
    assert (entry["outcome"], entry["choices"][0]["finish"]) == ("CANCELLED", "abort")
    found = verify(server.trail.log.place, server.trail.log.key)
    assert (found.entries, found.unended) == (3, ())
    server.trail.close = lambda: None  # type: ignore[method-assign]


async def test_running_call_does_not_end_ok_and_the_next_is_refused_on_a_full_disk(serve: Serve) -> None:
    server = serve()
    with ExitStack() as disk:
        with pytest.raises(Refusal) as running:
            async with server.begin():
                disk.enter_context(full_beyond(server.trail.log.place.file(1).stat().st_size))
        with pytest.raises(Refusal) as later:
            async with server.begin():
                pytest.fail("the call ran")
    assert (running.value.reason, later.value.reason) == ("AUDIT_FAILED", "AUDIT_FAILED")
    assert running.value.code == "UNAVAILABLE"
    assert running.value.request_id


async def test_calls_that_no_policy_binds_run_on_a_full_disk(serve: Serve) -> None:
    server = serve(UNBOUND)
    server.trail.failing = True
    async with server.begin():
        pass


async def test_error_of_a_call_stays_on_a_full_disk(serve: Serve) -> None:
    server = serve()
    with ExitStack() as disk, pytest.raises(Refusal, match="is empty") as caught:  # noqa: PT012
        async with server.begin():
            disk.enter_context(full_beyond(server.trail.log.place.file(1).stat().st_size))
            raise invalid("prompt.text", "is empty")
    assert caught.value.reason == "FIELD_INVALID"


async def test_open_serves_on_a_full_disk_and_says_what_is_lost(serve: Serve) -> None:
    server = serve(on_failure="open", fsync="always")
    with full_beyond(server.trail.log.place.file(1).stat().st_size):
        for _ in range(2):
            async with server.begin():
                pass
    async with server.begin():
        pass
    kinds = [(entry["kind"], entry.get("entries")) for entry in server.entries()]
    assert kinds == [("lost", 4), ("opened", None), ("call", None)]


async def test_call_whose_process_is_killed_has_the_entry_of_its_beginning(serve: Serve) -> None:
    """What is read is a copy of the log as a killed server leaves it."""
    server = serve()
    async with server.begin():
        pass
    async with server.begin() as record, server.begin() as other:
        server.trail.submit({"kind": "end"}).result()
        place, key = server.trail.log.place, server.trail.log.key
        assert verify(place, key).unended == (record.request_id, other.request_id)
        said = summary(verify(place, key))
        assert f"2 calls began and have no end: they run, or the server was killed in them: {record.request_id}" in said
    assert verify(place, key).unended == ()


async def test_call_does_not_begin_before_its_entry(serve: Serve) -> None:
    server = serve()
    with full_beyond(server.trail.log.place.file(1).stat().st_size), pytest.raises(Refusal) as caught:
        async with server.begin():
            pytest.fail("the call ran")
    assert caught.value.reason == "AUDIT_FAILED"


async def test_answer_waits_for_its_entry(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(fsync="always")
    written, append = list[int](), AuditLog.append

    def noted(self: AuditLog, entries: Any) -> list[bytes]:
        result = append(self, entries)
        written.append(self.end.count)
        return result

    monkeypatch.setattr(AuditLog, "append", noted)
    async with server.begin():
        assert written == [2]
    assert written == [2, 3]


def test_changes_of_policies_have_entries(serve: Serve) -> None:
    server = serve()
    store: Any = SimpleNamespace(in_force={"forget": POLICY}, listeners=[])
    audit_changes(server.trail, store)
    changes = [
        Change("applied", "policies/forget.yaml", POLICY), Change("removed", "policies", POLICY),
        Change("refused", "policies/torn.yaml", None, "the text of a file"),
    ]  # fmt: skip
    for change in changes:
        for listener in store.listeners:
            listener(change)
    server.trail.submit({"kind": "end"}).result()
    entries = server.entries()[:-1]
    assert [(e["kind"], e["change"], e["source"], (e["policy"] or {}).get("version")) for e in entries] == [
        ("policy", "applied", "start", 3),
        ("policy", "applied", "policies/forget.yaml", 3),
        ("policy", "removed", "policies", 3),
        ("policy", "refused", "policies/torn.yaml", None),
    ]
    assert "the text of a file" not in json.dumps(entries)
