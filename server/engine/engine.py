"""The async engine around vLLM. Every request reaches vLLM through `Engine.stream`."""

import asyncio
import hashlib
import logging
import secrets
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count, islice
from typing import Any

import msgspec

from rudder.sae_models.bundle.bundle import Bundle
from rudder.sae_models.bundle.manifest import Context
from rudder.sae_models.concepts import Concepts
from rudder.sae_models.token_model import vocabulary_sha256
from rudder.server import failpoints
from rudder.server.engine.adapter import (
    AsyncLLM,
    EngineDeadError,
    ModelFacts,
    RequestOutputCollector,
    add_request,
    answer_text,
    eos_token_ids,
    scheduler_gauges,
)
from rudder.server.engine.admission import Admission
from rudder.server.engine.call import (
    Call,
    FinishReason,
    GateOutcome,
    Outcome,
    Output,
    PolicyNotApplied,
    engine_sampling,
    salt,
)
from rudder.server.engine.ledger import PINNED_HANDLE
from rudder.server.engine.report import views_of
from rudder.server.engine.sockets import socket_folder
from rudder.server.engine.stall import STALL_CHECK_S, Progress
from rudder.server.engine.telemetry.frame import TelemetryLost
from rudder.server.engine.telemetry.hub import Features, Hub, Inbox, wait_for_event
from rudder.server.monitoring.logs import fields
from rudder.server.monitoring.metrics import Metrics
from rudder.server.program import wire
from rudder.server.program.exclusion import Exclusion
from rudder.server.program.named import NamedProgram
from rudder.server.program.rows import Registry, check_capacity, check_capture
from rudder.server.program.watch import merge_watched

logger = logging.getLogger(__name__)
TELEMETRY_TIMEOUT_S = 30.0
# How long vLLM may take to notice that the engine process has died, whose end of the channel closes at once.
DEATH_CHECKS, DEATH_CHECK_S = 100, 0.02
RELEASE_TIMEOUT_S = 0.5


@dataclass
class Engine:
    """A running vLLM engine with its bank, telemetry and admission; `start.start_engine` builds it.

    `concepts`: steering concepts by bundle. `epoch`: identifies this start. `self_tested`: `selftest.run` has passed.
    `queues`: of the outputs of all calls in vLLM, by handle. `stalled`: it has work, and has made no progress for a
    while; `given_up`: for so long that it counts as dead.
    """

    llm: AsyncLLM
    model: ModelFacts
    registry: Registry
    bundles: dict[str, Bundle]
    programs: dict[str, NamedProgram]
    admission: Admission
    hub: Hub
    metrics: Metrics
    concepts: dict[str, Concepts] = field(default_factory=dict)
    epoch: str = field(default_factory=lambda: secrets.token_hex(8))
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32))
    handles: Iterator[int] = field(default_factory=lambda: count(1))
    held_handles: Iterator[int] = field(default_factory=lambda: count(PINNED_HANDLE - 1, -1))
    tasks: set["asyncio.Task[None]"] = field(default_factory=set)
    queues: dict[int, RequestOutputCollector] = field(default_factory=dict)
    # Readable by this user only, and removed with the engine.
    folder: tempfile.TemporaryDirectory[str] = field(
        default_factory=lambda: tempfile.TemporaryDirectory(prefix="rudder-", dir=socket_folder())
    )
    self_tested: bool = False
    stalled: bool = False
    given_up: bool = False

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer. It is not thread-safe."""
        return self.llm.get_tokenizer()

    @cached_property
    def exclusion(self) -> Exclusion:
        """What the bundles of this server exclude from reading, statistics and edits."""
        return exclusion_of(bundle.manifest.context for bundle in self.bundles.values())

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """The ids of the tokens with which the model ends an answer."""
        return frozenset(eos_token_ids(self.llm))

    @cached_property
    def encoding_digest(self) -> str:
        """Digest of how texts and chats become token ids: vocabulary and chat template of the tokenizer."""
        template = getattr(self.tokenizer, "chat_template", None)
        parts = vocabulary_sha256(self.tokenizer.get_vocab()), template
        return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:16]

    def text_of(self, call: Call, ids: Sequence[int]) -> str:
        """Return the text of an answer of these tokens, as it would have been streamed to its end."""
        return answer_text(self.tokenizer, call.prompt_ids, call.sampling, ids)

    @property
    def healthy(self) -> bool:
        """Whether the engine is self-tested and alive and no telemetry was lost."""
        return self.self_tested and self.llm.is_running and not self.dead and self.hub.lost is None

    @property
    def dead(self) -> bool:
        """Whether the engine process has died, or has made no progress for so long that it counts as dead."""
        return self.given_up or bool(self.llm.errored)

    async def watch_progress(self, stall_s: float, give_up_s: float) -> None:
        """Note when requests are pending and the workers report no step for `stall_s`, and give the engine up after
        `give_up_s`: then every call fails.
        """
        progress = Progress()
        while not self.dead:
            # What has arrived while this process was busy itself counts.
            self.hub.receive()
            pending = bool(self.admission.callers)
            idle_s = progress.idle_s(self.hub.frames, time.monotonic(), pending=pending)
            self.note_stall(idle_s >= stall_s, idle_s)
            if idle_s >= give_up_s:
                self.give_up()
            await asyncio.sleep(STALL_CHECK_S)

    def note_stall(self, stalled: bool, idle_s: float) -> None:
        """Log the begin and the end of a stall."""
        if stalled and not self.stalled:
            running = len(self.admission.callers)
            logger.error("the engine makes no progress", extra=fields(seconds=round(idle_s, 1), choices=running))
        elif self.stalled and not stalled:
            logger.info("the engine makes progress again")
        self.stalled = stalled
        self.metrics.set_stalled(stalled)

    def give_up(self) -> None:
        """Treat the engine as dead: fail every call."""
        logger.error("the engine is given up: it counts as dead")
        self.given_up = True
        self.fail(EngineDeadError())

    def fail(self, error: Exception) -> None:
        """Raise `error` in every call, in place of any output that waits for it."""
        self.admission.fail(error)
        for queue in self.queues.values():
            queue.put(error)

    async def listen(self) -> None:
        """Receive telemetry until it is lost, then fail every call, with the loss as its reason."""
        await self.hub.listen()
        error = await self.end_of_telemetry()
        self.fail(error)
        if isinstance(error, TelemetryLost):
            self.metrics.telemetry_lost()

    async def end_of_telemetry(self) -> TelemetryLost | EngineDeadError:
        """Return why telemetry ended: it is lost, or the engine process has died."""
        for _ in range(DEATH_CHECKS):
            if self.hub.lost:
                return self.hub.lost
            if self.llm.errored:
                break
            await asyncio.sleep(DEATH_CHECK_S)
        else:
            return self.hub.lost or self.hub.lose("the worker closed the telemetry channel")
        return EngineDeadError()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a task that is cancelled when the engine stops."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def stop(self) -> None:
        """Cancel all tasks, abort running requests and shut vLLM down."""
        for task in self.tasks:
            task.cancel()
        self.llm.shutdown()
        self.folder.cleanup()

    async def hold(self, rows: Mapping[int, Sequence[wire.Row]]) -> int:
        """Hold rows, by site number, until they are dropped; return the handle for that. Raises BankFull."""
        handle = next(self.held_handles)
        request = wire.Request(0, 0, False, (tuple(wire.Site(number, tuple(rows[number])) for number in sorted(rows)),))
        # The server's ledger runs ahead of the workers'.
        self.admission.reserve(handle, request)
        await self.llm.collective_rpc("rudder_hold", args=(handle, wire.encode(request)))
        return handle

    async def drop(self, handle: int) -> None:
        """Hold the rows of a handle no longer. An engine that has died holds none."""
        if self.llm.errored:
            return
        await self.llm.collective_rpc("rudder_drop", args=(handle,))
        self.admission.unreserve(handle)

    def compile(self, call: Call) -> tuple[wire.Request, tuple[int, ...]]:
        """Compile a call to its wire form; return it and the column of each row of `call.watch`, then `call.guard`.

        Raises ProgramError if the call needs more rows than a site has places, or more room for captured residuals.
        """
        layout = self.registry.layout
        if len(call.policies) >= layout.stages:
            raise ValueError(f"the bank has {layout.stages - 1} stages for {len(call.policies)} policies")
        program = call.compiled.sites if call.compiled else ()
        sites, columns = merge_watched(program, (*call.watch, *call.guard))
        request = wire.Request(
            prompt_tokens=call.prompt_tokens,
            max_tokens=self.max_tokens(call),
            bos=self.begins_with_bos(call),
            stages=(sites, *(policy.sites for policy in call.policies)),
            watch_prompt=call.reads_prompt,
            top_k=call.ranked,
            top_k_sites=tuple(layout.sites.index(site) for site in call.top_k_sites),
            capture=call.capture,
            excluded=self.excluded(call),
        )
        field_at_fault = "report.features" if call.watch else "steering"
        reserved, kept = self.admission.reserved_rows, self.admission.ledger.kept
        check_capacity(request.stages, self.registry, field_at_fault, reserved, self.registry.request_share, kept)
        check_capture(request, self.registry, "report.top_k")
        return request, columns

    def max_tokens(self, call: Call) -> int:
        """Return the bound on the prompt and generated tokens of a call together."""
        return min(len(call.prompt_ids) + (call.sampling.max_tokens or 0), self.model.max_model_len)

    def begins_with_bos(self, call: Call) -> bool:
        """Return whether position 0 of a call holds the BOS token."""
        return call.prompt_ids[0] == self.model.bos_token_id

    def excluded(self, call: Call) -> tuple[int, ...]:
        """Return the positions of a call, in ascending order, that the SAEs were not trained on."""
        return self.exclusion.of(call.prompt_ids[: call.prompt_tokens], self.max_tokens(call))

    def uncounted(self, call: Call) -> tuple[int, ...]:
        """Return the positions of a call, in ascending order, that are not edited, evaluated by gates or counted."""
        return wire.with_bos(self.excluded(call), self.begins_with_bos(call))

    async def held_by_vllm(self) -> dict[str, float]:
        """Return what requests hold in the engine process: leases of the worker that has most, and of vLLM's scheduler
        what it reported with its last step.
        """
        leases = await self.llm.collective_rpc("rudder_leases")
        return {"worker_leases": max(leases, default=0), **scheduler_gauges()}

    def require_alive(self) -> None:
        """Raise TelemetryLost or EngineDeadError if no call can complete any more."""
        if self.hub.lost:
            raise self.hub.lost
        if self.dead:
            raise EngineDeadError

    async def stream(self, call: Call, on_abandoned: Callable[[Outcome], None] | None = None) -> AsyncGenerator[Output]:
        """Run a call. Closing or cancelling the iterator aborts it in the engine at once.

        `on_abandoned` receives the outcome so far of a call that was closed or failed before its last output. Raises
        QueueFull, TelemetryLost, EngineDeadError, PolicyNotApplied, ProgramError (more rows than a bank has places).
        """
        self.require_alive()
        handle = next(self.handles)
        request, columns = self.compile(call)
        client, guard = views_of(call, columns)
        inbox, queued_s = await self.enter(handle, request, call.caller.share_key)
        request_id = f"{handle}-{secrets.token_hex(4)}"
        queue: RequestOutputCollector | None = None
        ended = False
        generated = cached = 0
        outcome: Outcome | None = None
        try:
            await failpoints.pause("admit.after")
            sampling = engine_sampling(call, request)
            cache_salt = salt(self.secret, call, by_id=bool(self.exclusion.tokens))
            queue = await add_request(self.llm, request_id, call.prompt_ids, cache_salt, sampling, call.trace_headers)
            self.queues[handle] = queue
            if self.hub.closed:
                raise await self.end_of_telemetry()
            while not ended:
                out = queue.get_nowait() or await queue.get()
                if not generated:
                    await failpoints.pause("first_token")
                choice = out.outputs[0]
                position = len(call.prompt_ids) + generated
                generated += len(choice.token_ids)
                cached = max(cached, out.num_cached_tokens or 0)
                end = end_of_run(call, generated)
                ended = bool(choice.finish_reason)
                # What guards read decides whether these tokens leave.
                features = await self.features_before(end, inbox, wait=ended or bool(call.guard or call.enforced))
                require_applied(call, inbox, end)
                if ended:
                    outcome = replace(
                        outcome_before(end, call, inbox, generated, cached, queued_s),
                        finish_reason=FinishReason(choice.finish_reason),
                        stop_reason=choice.stop_reason,
                    )
                if self.hub.closed:
                    # No token leaves after the loss is known.
                    outcome = None
                    raise await self.end_of_telemetry()
                yield Output(
                    choice.text, choice.token_ids, position, choice.logprobs,
                    client.select(features), guard.select(features), outcome, out.prompt_logprobs,
                )  # fmt: skip
        finally:
            self.queues.pop(handle, None)
            self.spawn(self.ensure_released(handle, inbox, request_id))
            if on_abandoned and outcome is None:
                self.hub.receive()
                on_abandoned(outcome_before(inbox.num_computed_tokens, call, inbox, generated, cached, queued_s))
            if queue and not ended:
                await self.abort(queue.request_id, internal=True)

    async def abort(self, request_id: str, *, internal: bool = False) -> None:
        """End a request in vLLM."""
        if not failpoints.hit("abort"):
            await self.llm.abort(request_id, internal=internal)

    def outcome_without_run(self, call: Call) -> Outcome:
        """Return the outcome of a call that never reached the engine."""
        request, _ = self.compile(call)
        return outcome_before(0, call, Inbox(request), 0, 0, 0.0)

    async def enter(self, handle: int, request: wire.Request, caller: str) -> tuple[Inbox, float]:
        """Wait for room in the bank; return the request's inbox and the seconds waited. Raises QueueFull."""
        started = time.monotonic()
        await failpoints.pause("admit.before")
        with self.hub.awaited():
            await self.admission.acquire(handle, request, caller)
        return self.hub.open(handle, request), time.monotonic() - started

    async def features_before(self, end: int, inbox: Inbox, *, wait: bool) -> Features:
        """Return the new features of positions before `end`: those that are there, or all of them if `wait`."""
        if wait:
            await self.wait_covered(inbox, end)
        elif inbox.reports and inbox.num_computed_tokens < end:
            # A frame holds all requests of a step: the first to receive it does so for the others.
            self.hub.receive()
        return inbox.take(end)

    async def wait_covered(self, inbox: Inbox, position: int) -> None:
        """Wait until every token before `position` has been reported.

        Raises TelemetryLost after TELEMETRY_TIMEOUT_S, or what `require_alive` raises.
        """
        started = time.monotonic()
        deadline = started + TELEMETRY_TIMEOUT_S
        await failpoints.pause("verdict")
        self.hub.receive()
        if inbox.covered >= position:
            self.metrics.telemetry_waited(0.0)
            return
        with self.hub.awaited():
            while inbox.covered < position:
                self.hub.arrived.clear()
                self.require_alive()
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise TelemetryLost(f"no telemetry for position {inbox.covered}")
                await wait_for_event(self.hub.arrived, min(remaining, 1.0))
        self.metrics.telemetry_waited(time.monotonic() - started)

    async def ensure_released(self, handle: int, inbox: Inbox, request_id: str) -> None:
        """Release a request's rows and slot, also if it never reached the worker."""
        while not inbox.released.is_set() and not self.dead:
            if await wait_for_event(inbox.released, RELEASE_TIMEOUT_S):
                return
            # A call cancelled inside `add_request` may still run. The engine handles this abort before the RPC below.
            await self.abort(request_id)
            held = await self.llm.collective_rpc("rudder_holds", args=(handle,))
            if not any(held):
                # Frames that name the request may still be unread: they must be split while its inbox exists.
                self.hub.receive()
                self.hub.inboxes.pop(handle, None)
                self.admission.release(handle)
                return
        if self.dead:
            self.admission.fail(EngineDeadError())


def require_applied(call: Call, inbox: Inbox, end: int) -> None:
    """Raise PolicyNotApplied if an edit of an enforced policy was rejected at a position before `end`."""
    own = len(call.compiled.edits) if call.compiled else 0
    edits = sum(len(policy.edits) for policy in call.policies[: call.enforced])
    position = inbox.first_rejected(range(own, own + edits), end)
    if position is not None:
        raise PolicyNotApplied(position)


def exclusion_of(contexts: Iterable[Context]) -> Exclusion:
    """Return the union of what bundles exclude."""
    contexts = list(contexts)
    positions = {position for context in contexts for position in context.excluded_positions}
    return Exclusion(tuple(sorted(positions)), frozenset(t for context in contexts for t in context.excluded_tokens))


def outcome_before(end: int, call: Call, inbox: Inbox, generated: int, cached: int, queued_s: float) -> Outcome:
    """Build the outcome of an aborted call from its telemetry of positions before `end`."""
    moved, opened = inbox.flagged_before(end)
    rejected, policy_rejected = by_program(call, inbox.rejected_before(end))
    own, policy_moved = by_program(call, moved)
    return Outcome(
        FinishReason.ABORT, None, len(call.prompt_ids), generated, cached,
        moved=own, policy_moved=policy_moved,
        tokens_seen=inbox.computed_before(end), captures=tuple(inbox.captures), queued_s=queued_s,
        rejected=rejected, policy_rejected=policy_rejected,
        gates=gate_outcomes(inbox.request, opened, inbox.statistics_at(end), end),
    )  # fmt: skip


def by_program(call: Call, counts: Sequence[int]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Split counts of all edits of a call: those of its own program, and those of each policy."""
    remaining = iter(counts)
    own = tuple(islice(remaining, len(call.compiled.edits) if call.compiled else 0))
    return own, tuple(tuple(islice(remaining, len(policy.edits))) for policy in call.policies)


def gate_outcomes(
    request: wire.Request, opened: Sequence[int], statistics: Sequence[float], end: int
) -> tuple[GateOutcome, ...]:
    """Join what was counted for each gate. A share is reported as such: its state is a number of tokens."""
    remaining = iter(statistics)
    outcomes = []
    for (stage, gate), tokens in zip(request.gates(), opened, strict=True):
        statistic = next(remaining) if gate.sequence else None
        if gate.sequence and gate.sequence.binary is not None and statistic:
            statistic /= request.counted_before(end)
        outcomes.append(GateOutcome(stage, tokens, statistic))
    return tuple(outcomes)


def end_of_run(call: Call, generated: int) -> int:
    """Return the position after the last token that must have run.

    The last generated token is sampled, not run (an asynchronous scheduler may run it and discard the result). A call
    that failed before its first token may not have run at all.
    """
    return len(call.prompt_ids) + generated - 1 if generated else 0
