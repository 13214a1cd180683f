"""What surrounds a call: request id, refusals, cancellation; one count and one log line, in whatever way it ends."""

import asyncio
import json
import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from rudder.server.caller import ANONYMOUS, Caller
from rudder.server.engine.call import FinishReason, GateOutcome, Outcome
from rudder.server.engine.telemetry.frame import TelemetryLost
from rudder.server.identity.authenticator import Authenticator, Credentials
from rudder.server.monitoring.logs import JsonFormatter
from rudder.server.monitoring.metrics import Metrics
from rudder.server.monitoring.traces import Correlation
from rudder.server.program.compile import NOTHING
from rudder.server.safety.binding import Binding
from rudder.server.safety.policy import Policy
from rudder.server.safety.store import PolicyStore
from rudder.server.service.attestation import attestation_of
from rudder.server.service.call import begin_call
from rudder.server.service.errors import Refusal, invalid
from rudder.server.service.quotas import QuotaLedger
from rudder.server.service.record import CallRecord, ChoiceRecord, EditRecord, GateRecord
from rudder.v1 import policy_pb2

METHOD = "InferenceService.Complete"
CORRELATION = Correlation("order 7", "4bf92f3577b34da6a3ce929d0e0e4736")


class Server:
    """What `begin_call` reads of a Serving, its registry, and its log."""

    def __init__(
        self, caplog: pytest.LogCaptureFixture, healthy: bool = True, draining: bool = False, stalled: bool = False
    ) -> None:
        self.registry, self.caplog = CollectorRegistry(), caplog
        metrics = Metrics.create(self.registry)
        engine = SimpleNamespace(healthy=healthy, stalled=stalled, require_alive=lambda: None, metrics=metrics)
        self.serving: Any = SimpleNamespace(
            engine=engine,
            draining=draining,
            metrics=metrics,
            calls=set(),
            aborted=False,
            policies=PolicyStore(engine),  # type: ignore[arg-type]
            authenticator=Authenticator(),
            quotas=QuotaLedger(),
            audit=None,
            spans=None,
        )

    def begin(self, deadline: float | None = None) -> Any:
        return begin_call(self.serving, METHOD, Credentials(), 10, CORRELATION, deadline)

    def counted(self, outcome: str) -> float | None:
        return self.registry.get_sample_value("rudder_requests_total", {"method": METHOD, "outcome": outcome})

    def log_line(self) -> dict[str, Any]:
        """The one line of the access log."""
        (record,) = [record for record in self.caplog.records if record.name == "rudder.access"]
        values: dict[str, Any] = json.loads(JsonFormatter().format(record))
        return values


@pytest.fixture
def server(caplog: pytest.LogCaptureFixture) -> Server:
    caplog.set_level(logging.INFO, "rudder")
    return Server(caplog)


def policy_of(name: str, **message: Any) -> Policy:
    """A policy with a program, of which only the name and the mode are read here."""
    return Policy(policy_pb2.Policy(name=name, version=3, **message), f"digest {name}", NOTHING)


LOW, QUIET = policy_of("low"), policy_of("quiet", mode=policy_pb2.POLICY_MODE_SHADOW)


def finished_choice(policies: tuple[Policy, ...] = (LOW, QUIET)) -> ChoiceRecord:
    choice = ChoiceRecord()
    edits = tuple(
        SimpleNamespace(site="layers.1.mlp_out", row="feature 1 of b", operation=o) for o in ("set 4", "ablate")
    )
    call: Any = SimpleNamespace(
        compiled=SimpleNamespace(edits=edits[:1]),
        policies=(SimpleNamespace(edits=edits[1:]), SimpleNamespace(edits=())),
    )
    choice.end(Outcome(FinishReason.STOP, None, 4, 3, 1, (6,), ((5,), ()), 6, (), 0.25), call, policies)
    return choice


async def test_successful_call_is_counted_and_logged(server: Server) -> None:
    async with server.begin() as record:
        record.program_digest, record.prompt_tokens = "d1", 4
        record.choices = [finished_choice(), finished_choice()]
        record.binding = Binding((LOW, QUIET))
        record.first_token_s = 0.125
    assert server.counted("OK") == 1
    line = server.log_line()
    expected = {
        "level": "info", "message": "call ended", "request_id": record.request_id, "correlation_id": "order 7",
        "trace_id": CORRELATION.trace_id, "caller": "anonymous", "method": METHOD, "outcome": "OK", "program": "d1",
        "policies": ["low@3", "quiet@3"],
        "prompt_tokens": 4, "generated_tokens": 6, "cached_tokens": 1, "edited_tokens": 22, "finish": ["stop", "stop"],
        "queued_s": 0.25, "first_token_s": 0.125, "total_s": round(record.total_s, 4),
    }  # fmt: skip
    assert expected.items() <= line.items()
    assert line.keys() - expected.keys() == {"time", "logger", "process"}
    labels = {"site": "layers.1.mlp_out", "operation": "set", "origin": "request", "policy": ""}
    assert server.registry.get_sample_value("rudder_edits_applied_tokens_total", labels) == 12
    labels |= {"operation": "ablate", "origin": "policy", "policy": "low"}
    assert server.registry.get_sample_value("rudder_edits_applied_tokens_total", labels) == 10


async def test_edits_in_shadow_mode_are_counted_apart(server: Server) -> None:
    async with server.begin() as record:
        record.binding = Binding((QUIET, LOW))
        record.choices = [finished_choice((QUIET, LOW))]
    labels = {"site": "layers.1.mlp_out", "operation": "ablate", "origin": "shadow", "policy": "quiet"}
    assert server.registry.get_sample_value("rudder_edits_applied_tokens_total", labels) == 5
    attested = attestation_of(record, record.choices[0], "epoch")
    assert [(p.name, p.version, p.digest, p.shadow) for p in attested.policies] == [
        ("quiet", 3, "digest quiet", True),
        ("low", 3, "digest low", False),
    ]
    edits = [(edit.origin, edit.policy, edit.tokens_touched) for edit in attested.edits]
    # That of a policy is for readers of guards.
    assert edits == [("request", "", 6)]


async def test_call_is_bound_by_the_policies_in_force_when_it_begins(server: Server) -> None:
    store = server.serving.policies
    bound = Policy(policy_pb2.Policy(name="low", version=3, binds={"all": True}), "digest")
    store.set_in_force({"low": bound})
    async with server.begin() as record:
        assert (record.policies, store.running) == ((bound,), {bound: 1})
        store.set_in_force({})
        async with server.begin() as later:
            assert later.policies == ()
        assert (record.policies, store.running) == ((bound,), {bound: 1})
    assert not store.running
    store.set_in_force({"low": bound})
    async with begin_call(server.serving, "ModelService.Get", Credentials(), 1, CORRELATION) as other:
        assert other.policies == ()


async def test_method_that_needs_a_role_is_refused_and_counted(server: Server) -> None:
    caller = replace(ANONYMOUS, roles=frozenset({"generate"}))
    server.serving.authenticator = SimpleNamespace(caller=lambda _: caller)
    with pytest.raises(Refusal) as caught:
        async with begin_call(server.serving, "PolicyService.Apply", Credentials(), 1, CORRELATION):
            pytest.fail("the call ran")
    assert caught.value.reason == "ROLE_MISSING"
    labels = {"method": "PolicyService.Apply", "outcome": "ROLE_MISSING"}
    assert server.registry.get_sample_value("rudder_requests_total", labels) == 1


async def test_rejected_edits_are_counted_and_attested(server: Server) -> None:
    async with server.begin() as record:
        choice = ChoiceRecord()
        edit = SimpleNamespace(site="layers.1.mlp_out", row="r", operation="add 9e29")
        call: Any = SimpleNamespace(compiled=SimpleNamespace(edits=(edit, edit)), policies=())
        outcome = Outcome(FinishReason.STOP, None, 4, 3, 1, (0, 2), (), 6, (), 0.25, rejected=(3, 0))
        choice.end(outcome, call, ())
        record.choices = [choice]
    counts = [(e.tokens_touched, e.tokens_rejected) for e in attestation_of(record, choice, "epoch").edits]
    assert counts == [(0, 3), (2, 0)]
    labels = {"site": "layers.1.mlp_out", "origin": "request", "policy": ""}
    assert server.registry.get_sample_value("rudder_edits_rejected_total", labels) == 3


async def test_refusal_carries_the_request_id_and_logs_fields_without_their_values(server: Server) -> None:
    with pytest.raises(Refusal) as caught:
        async with server.begin():
            raise invalid("sampling.stop[0]", "the client's text")
    assert server.counted("FIELD_INVALID") == 1
    line = server.log_line()
    assert line["request_id"] == caught.value.request_id != ""
    assert (line["outcome"], line["refused_fields"]) == ("FIELD_INVALID", ["sampling.stop[0]"])
    assert "the client's text" not in json.dumps(line)


async def test_unexpected_exception_becomes_an_internal_error(server: Server) -> None:
    with pytest.raises(Refusal) as caught:
        async with server.begin():
            raise KeyError("x")
    assert server.counted("INTERNAL") == 1
    assert server.log_line()["error_id"] == caught.value.error_id != ""


@pytest.mark.parametrize(
    ("state", "reason"),
    [({"draining": True}, "DRAINING"), ({"healthy": False}, "ENGINE_DEAD"), ({"stalled": True}, "ENGINE_STALLED")],
)
async def test_server_that_takes_no_calls_refuses_them(
    caplog: pytest.LogCaptureFixture, state: dict[str, bool], reason: str
) -> None:
    caplog.set_level(logging.INFO, "rudder")
    server = Server(caplog, **state)
    with pytest.raises(Refusal) as caught:
        async with server.begin():
            pytest.fail("the call ran")
    assert (caught.value.reason, server.counted(reason)) == (reason, 1)
    assert server.log_line()["request_id"] == caught.value.request_id


def test_record_names_gates_by_the_program_that_has_them() -> None:
    choice = ChoiceRecord()
    gates = (GateOutcome(0, 4, 0.5), GateOutcome(2, 0, None))
    program = SimpleNamespace(edits=(), gate_site="layers.1.mlp_out")
    policy = SimpleNamespace(edits=(), gate_site="layers.0.resid_pre")
    run: Any = SimpleNamespace(compiled=program, policies=(NOTHING, policy))
    choice.end(Outcome(FinishReason.STOP, None, 4, 3, 1, (), ((), ()), 6, (), gates=gates), run, (LOW, QUIET))
    call = CallRecord(METHOD, ANONYMOUS, CORRELATION)
    attestation = attestation_of(call, choice, "epoch")
    assert choice.gates[1] == GateRecord("policy", "layers.0.resid_pre", 0, None, "quiet")
    assert [(g.origin, g.policy, g.site, g.open_tokens) for g in attestation.gates] == [
        ("request", "", "layers.1.mlp_out", 4)
    ]
    assert (attestation.gates[0].statistic, attestation.request_id) == (0.5, call.request_id)


@pytest.mark.parametrize("mode", [policy_pb2.POLICY_MODE_ENFORCE, policy_pb2.POLICY_MODE_SHADOW])
@pytest.mark.parametrize("reads", [False, True])
def test_what_a_policy_did_is_for_readers_of_guards(mode: policy_pb2.PolicyMode, reads: bool) -> None:
    """Counts of a policy's gate and edits lead past it as scores do: they are absent, not zero, and that is said."""
    policy = policy_of("low", mode=mode, rights=policy_pb2.Rights(read_guards=reads))
    call = CallRecord(METHOD, ANONYMOUS, CORRELATION, binding=Binding((policy,)))
    choice = ChoiceRecord(
        edits=[EditRecord("request", "a", "r", "add 1", 5), EditRecord("policy", "b", "r", "cap 0", 7, 2, "low")],
        gates=[GateRecord("request", "a", 1, 2.5), GateRecord("policy", "b", 3, 4.5, "low")],
    )
    attestation = attestation_of(call, choice, "epoch")
    edits = [(edit.policy, edit.tokens_touched, edit.tokens_rejected) for edit in attestation.edits]
    gates = [(gate.policy, gate.open_tokens, gate.statistic) for gate in attestation.gates]
    assert edits == [("", 5, 0), *([("low", 7, 2)] if reads else [])]
    assert gates == [("", 1, 2.5), *([("low", 3, 4.5)] if reads else [])]
    assert [applied.withheld for applied in attestation.policies] == [not reads]


async def test_call_that_begins_after_a_loss_of_telemetry_is_refused_with_that_reason(server: Server) -> None:
    def lost() -> None:
        raise TelemetryLost("a gap")

    server.serving.engine = SimpleNamespace(healthy=False, stalled=False, require_alive=lost)
    with pytest.raises(Refusal) as caught:
        async with server.begin():
            pytest.fail("the call ran")
    assert (caught.value.reason, server.counted("VERDICT_LOST")) == ("VERDICT_LOST", 1)


@pytest.mark.parametrize(
    ("deadline", "outcome"), [(None, "CANCELLED"), (float("inf"), "CANCELLED"), (0.0, "DEADLINE_EXCEEDED")]
)
async def test_cancelled_call_stays_cancelled_and_counts_its_edits(
    server: Server, deadline: float | None, outcome: str
) -> None:
    async def call() -> None:
        async with server.begin(deadline) as record:
            record.choices = [finished_choice()]
            await asyncio.Event().wait()

    task = asyncio.create_task(call())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert server.counted(outcome) == 1
    assert (server.log_line()["outcome"], server.log_line()["edited_tokens"]) == (outcome, 11)


def test_request_ids_differ() -> None:
    assert len({CallRecord(METHOD, ANONYMOUS, CORRELATION).request_id for _ in range(100)}) == 100


def test_routing_key_is_of_the_tenant_and_the_program() -> None:
    def key(tenant: str, digest: str) -> str:
        return CallRecord(METHOD, Caller("id", tenant, frozenset()), CORRELATION, program_digest=digest).routing_key

    assert key("a", "x") == key("a", "x")
    assert len({key("a", "x"), key("b", "x"), key("a", "y"), key("a", "")}) == 4
