"""Known traps of steering inside an engine (docs/design.md, Traps). Each test fails without its countermeasure."""

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams

from rudder.server.caller import ANONYMOUS
from rudder.server.engine import selftest
from rudder.server.engine.admission import QueueFull
from rudder.server.engine.call import Call, Outcome, Output, PolicyNotApplied
from rudder.server.engine.engine import RELEASE_TIMEOUT_S, Engine
from rudder.server.engine.telemetry.frame import TelemetryLost
from rudder.server.engine.telemetry.hub import Inbox, Span
from rudder.server.program.compile import Compiled, compile_program
from rudder.server.program.watch import compile_watch
from rudder.v1 import program_pb2 as pb
from tests.engine.conftest import preempted

SITE = "layers.2.resid_post"
LATE = "layers.4.resid_post"
TEXT = "The cell membrane is a thin layer that separates the inside of the cell from the world outside. "


def push(engine: Engine, strength: float, seed: int = 0, phase: pb.Phase = pb.PHASE_BOTH, site: str = SITE) -> Compiled:
    """Compile a program that adds a random direction."""
    direction = np.random.default_rng(seed).normal(size=engine.model.hidden_size).tolist()
    row = pb.Row(vector=pb.Vector(name=f"direction {seed}", values=direction))
    edit = pb.Edit(row=row, add=strength, unit=pb.UNIT_RESIDUAL_NORM, phase=phase)
    return compile_program(pb.Program(sites=[pb.SiteEdits(site=site, edits=[edit])]), engine.registry)


def prompt(engine: Engine, tokens: int, offset: int = 0) -> tuple[int, ...]:
    """Return BOS and real text, `tokens` tokens in all."""
    ids = engine.tokenizer.encode(TEXT * 40, add_special_tokens=False)
    return (engine.model.bos_token_id, *ids[offset : offset + tokens - 1])


def greedy(tokens: int, **more: Any) -> SamplingParams:
    """Return greedy sampling of exact length."""
    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, **more)


async def run(engine: Engine, call: Call) -> list[Output]:
    """Run a call and return its outputs."""
    return [output async for output in engine.stream(call)]


def outcome(outputs: list[Output]) -> Outcome:
    """Return the outcome of a call."""
    last = outputs[-1].outcome
    assert last is not None
    return last


def ids(outputs: Iterable[Output]) -> list[int]:
    """Return the generated ids."""
    return [i for output in outputs for i in output.token_ids]


def positions(outputs: Iterable[Output]) -> list[int]:
    """Return the positions whose features were reported."""
    return [p for output in outputs for p in range(output.features.first, output.features.end)]


async def usage(engine: Engine) -> dict[str, Any]:
    """Wait until nothing is in flight; return what the worker holds."""
    for _ in range(100):
        held: dict[str, Any] = (await engine.llm.collective_rpc("rudder_usage"))[0]
        if held["requests"] == 0 and not engine.admission.ledger.leases:
            return held
        await asyncio.sleep(0.05)
    raise AssertionError(f"still held: {held}, {engine.admission.ledger.leases.keys()}")


async def test_unsteered_requests_are_unchanged_by_steered_ones_in_the_batch(engine: Engine) -> None:
    call = Call(prompt(engine, 20), greedy(24))
    alone = ids(await run(engine, call))
    steered = Call(call.prompt_ids, call.sampling, push(engine, 1.0))
    batch = await asyncio.gather(*(run(engine, c) for c in (call, steered, call, steered, call)))
    assert ids(batch[0]) == ids(batch[2]) == ids(batch[4]) == alone
    assert ids(batch[1]) == ids(batch[3]) != alone


def overflowing(engine: Engine, strength: float, unit: pb.Unit = pb.UNIT_ABSOLUTE) -> Compiled:
    """Compile a legal program whose displacement has a square beyond float32."""
    direction = np.eye(engine.model.hidden_size)[0].tolist()
    edit = pb.Edit(row=pb.Row(vector=pb.Vector(name="huge", values=direction)), add=strength, unit=unit)
    return compile_program(pb.Program(sites=[pb.SiteEdits(site=SITE, edits=[edit])]), engine.registry)


@pytest.mark.parametrize("unit", [pb.UNIT_ABSOLUTE, pb.UNIT_RESIDUAL_NORM])
async def test_overflow_does_not_reach_other_requests(engine: Engine, unit: pb.Unit) -> None:
    """Neither its neighbours in the batch nor those who get its pages of the KV cache; the self-test still passes."""

    def plain(salt: str) -> list[Call]:
        # A salt of its own, so that no page is shared. Two pages each: all pages of the cache together.
        return [Call(prompt(engine, 130, n), greedy(12), cache_salt=salt) for n in range(6)]

    name = pb.Unit.Name(unit)
    alone = [ids(await run(engine, call)) for call in plain(f"alone {name}")]
    hostile = [Call(prompt(engine, 200, n), greedy(12), overflowing(engine, 9e29 / (1 + n), unit)) for n in range(4)]
    beside = await asyncio.gather(*(run(engine, call) for call in (*hostile, *plain(f"beside {name}"))))
    rejected = beside[: len(hostile)]
    assert [outcome(outputs).moved for outputs in rejected] == [(0,)] * 4
    assert [outcome(outputs).rejected for outputs in rejected] == [(199 + 11,)] * 4
    assert [ids(outputs) for outputs in beside[len(hostile) :]] == alone
    later = await asyncio.gather(*(run(engine, call) for call in plain(f"later {name}")))
    assert [ids(outputs) for outputs in later] == alone
    assert all(outcome(outputs).rejected == () for outputs in later)
    await selftest.run(engine)


async def test_rejected_edit_of_a_policy_ends_the_call(engine: Engine) -> None:
    """Its token would go on without the policy. In shadow mode a policy only counts; a request's own is attested."""
    hostile = overflowing(engine, 9e29, pb.UNIT_ABSOLUTE)
    call = Call(prompt(engine, 20), greedy(4), push(engine, 0.1), policies=(push(engine, 0.1, 1), hostile))
    for enforced in (0, 1):
        counted = outcome(await run(engine, replace(call, enforced=enforced)))
        assert counted.policy_rejected == ((0,), (22,))
    # Before the first output: the prompt has rejected it.
    with pytest.raises(PolicyNotApplied, match=r"at token 1$"):
        await anext(engine.stream(replace(call, enforced=2)))
    own = outcome(await run(engine, Call(prompt(engine, 20), greedy(4), hostile, (push(engine, 0.1),), enforced=1)))
    assert own.rejected == (22,)


async def test_program_has_the_same_effect_alone_and_in_a_batch(engine: Engine) -> None:
    calls = [Call(prompt(engine, 12), greedy(12), push(engine, 0.8, seed)) for seed in range(12)]
    alone = [ids(await run(engine, call)) for call in calls]
    together = [ids(outputs) for outputs in await asyncio.gather(*(run(engine, call) for call in calls))]
    assert together == alone
    assert len({tuple(i) for i in alone}) > 6


async def test_prefix_cache_is_not_shared_across_programs(engine: Engine) -> None:
    long, sampling = prompt(engine, 300), greedy(8)
    plain, steered = Call(long, sampling), Call(long, sampling, push(engine, 0.7, 1))
    first = ids(await run(engine, steered))
    fresh = await run(engine, plain)
    assert outcome(fresh).cached_tokens == 0
    again = await run(engine, steered)
    assert outcome(again).cached_tokens >= 128, "the same program does share its cache"
    assert ids(again) == first != ids(fresh)


async def test_tokens_generated_under_a_program_are_not_reused_from_the_prefix_cache(engine: Engine) -> None:
    call = Call(prompt(engine, 100, 7), greedy(200), push(engine, 0.7, 2, pb.PHASE_GENERATED))
    answer = ids(await run(engine, call))
    second_turn = await run(engine, Call((*call.prompt_ids, *answer), greedy(4)))
    assert outcome(second_turn).cached_tokens == 0
    # With the same program the former answer is prompt now, and prompt tokens are not edited.
    same_program = await run(engine, Call((*call.prompt_ids, *answer), greedy(4), call.compiled))
    assert outcome(same_program).cached_tokens == 0


async def test_tenants_do_not_share_a_prefix_cache(engine: Engine) -> None:
    long, sampling = prompt(engine, 200, 31), greedy(1)
    tenant_a, tenant_b = replace(ANONYMOUS, tenant="a"), replace(ANONYMOUS, tenant="b")
    await run(engine, Call(long, sampling, caller=tenant_a))
    assert outcome(await run(engine, Call(long, sampling, caller=tenant_b))).cached_tokens == 0
    assert outcome(await run(engine, Call(long, sampling, caller=tenant_a))).cached_tokens > 0


async def test_prompt_is_reported_whole_when_it_is_cached(engine: Engine) -> None:
    row = pb.Row(feature=pb.Feature(index=int(frequency(engine).argmax())))
    watch = compile_watch([(SITE, row)], engine.registry, "watch", prompt=True)
    call = Call(prompt(engine, 200, 63), greedy(2), watch=watch)
    for _ in range(2):
        assert positions(await run(engine, call)) == list(range(201))


def frequency(engine: Engine) -> Any:
    """Return the share of tokens on which each latent is active."""
    return next(iter(engine.bundles.values())).statistics.frequency


def preemptions() -> float:
    """Return vLLM's count of preemptions."""
    samples = [sample for family in preempted[0].collect() for sample in family.samples]
    total: float = sum(sample.value for sample in samples if sample.name.endswith("_total"))
    return total


async def test_preempted_requests_give_the_same_tokens_and_counts(engine: Engine) -> None:
    calls = [
        Call(prompt(engine, 60, seed), greedy(190), push(engine, 0.5, seed, pb.PHASE_GENERATED)) for seed in range(10)
    ]
    alone = [await run(engine, call) for call in calls]
    before = preemptions()
    together = await asyncio.gather(*(run(engine, call) for call in calls))
    assert preemptions() > before, "nothing was preempted: this test shows nothing"
    assert [ids(outputs) for outputs in together] == [ids(outputs) for outputs in alone]
    assert (
        [outcome(outputs).moved for outputs in together]
        == [outcome(outputs).moved for outputs in alone]
        == [(189,)] * 10
    )


async def test_requests_resumed_from_the_prefix_cache_are_counted_as_if_never_preempted(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """11 blocks of 128 tokens: the last request is preempted in its second block, and goes on behind its first one."""
    resumed: list[int] = []
    begin_span = Inbox.begin_span

    def recorded(inbox: Inbox, span: Span) -> None:
        if 0 < span.start < inbox.num_computed_tokens:
            resumed.append(span.start)
        begin_span(inbox, span)

    monkeypatch.setattr(Inbox, "begin_span", recorded)
    sizes = [(370, 120), (370, 120), (140, 100), (150, 90)]
    calls = [
        Call(prompt(engine, tokens, 9 * seed), greedy(generated), push(engine, 0.5, seed))
        for seed, (tokens, generated) in enumerate(sizes)
    ]
    alone = [await run(engine, call) for call in calls]
    assert not resumed
    # Not served from what the calls alone have left in the cache.
    together = await asyncio.gather(*(run(engine, replace(call, cache_salt="again")) for call in calls))
    assert resumed, "nothing was resumed within the prefix cache: this test shows nothing"
    assert [ids(outputs) for outputs in together] == [ids(outputs) for outputs in alone]
    for outputs, size in zip((*alone, *together), sizes * 2, strict=True):
        # All tokens but the last one generated; BOS is not edited.
        computed = sum(size) - 1
        assert (outcome(outputs).moved, outcome(outputs).tokens_seen) == ((computed - 1,), computed)


@pytest.mark.parametrize(("phase", "touched"), [(pb.PHASE_PROMPT, 299), (pb.PHASE_GENERATED, 9), (pb.PHASE_BOTH, 308)])
async def test_phases_do_not_depend_on_prefill_chunks(engine: Engine, phase: pb.Phase, touched: int) -> None:
    outputs = await run(engine, Call(prompt(engine, 300, 11), greedy(10), push(engine, 0.3, 3, phase)))
    assert outcome(outputs).moved == (touched,)
    assert outcome(outputs).tokens_seen == 309


async def test_seed_gives_the_same_tokens_in_chunks_and_from_the_prefix_cache(engine: Engine) -> None:
    """A draw behind each chunk but the last is taken back; without that, vLLM ends on a CPU."""
    sampling = SamplingParams(temperature=1.0, seed=7, max_tokens=12, ignore_eos=True)
    call = Call(prompt(engine, 350, 11), sampling)
    chunked = await run(engine, call)
    cached = await run(engine, call)
    assert ids(chunked) == ids(cached)


async def test_sequence_gate_does_not_depend_on_chunks_or_the_batch(engine: Engine) -> None:
    score = pb.Row(probe=pb.Probe(name="one", weights=[1e-9] * engine.model.hidden_size, bias=1.0))
    gate = pb.Gate(
        site=SITE, sequence=pb.SequenceCondition(score=score, cusum=pb.Cusum(drift=0.5), level=100.2, latch=True)
    )
    edits = pb.SiteEdits(
        site=LATE, edits=[pb.Edit(row=pb.Row(vector=pb.Vector(values=[1.0] * engine.model.hidden_size)), add=1.0)]
    )
    program = compile_program(pb.Program(sites=[edits], gate=gate), engine.registry)
    call = Call(prompt(engine, 290, 5), greedy(20), program)
    # 0.5 a token over the 308 counted tokens: above 100.2 from token 201 on.
    noise = [Call(prompt(engine, 70 + 9 * n, n), greedy(15), push(engine, 0.5, n)) for n in range(6)]
    results = await asyncio.gather(run(engine, call), *(run(engine, c) for c in noise))
    assert outcome(results[0]).moved == (308 - 200,)


async def test_abort_in_mid_stream_releases_everything(engine: Engine) -> None:
    stream = engine.stream(Call(prompt(engine, 30), greedy(400), push(engine, 0.5)))
    received = 0
    async for _ in stream:
        received += 1
        if received == 3:
            break
    await stream.aclose()
    assert await usage(engine) == {"slots": 0, "rows": [0, 0, 0], "requests": 0}


async def test_abandoned_call_reports_what_ran(engine: Engine) -> None:
    ended: list[Outcome] = []
    # A prompt of its own: what the prefix cache has is not edited again.
    call = Call(prompt(engine, 30, 7), greedy(400), push(engine, 0.5))
    stream = engine.stream(call, on_abandoned=ended.append)
    outputs = [await anext(stream) for _ in range(5)]
    await stream.aclose()
    (last,) = ended
    assert (last.finish_reason, last.prompt_tokens, last.generated_tokens) == ("abort", 30, len(ids(outputs)))
    # BOS is not edited; the worker may be some steps ahead of the outputs.
    assert last.tokens_seen >= 30 + len(ids(outputs)) - 1
    assert last.moved == (last.tokens_seen - 1,)
    outputs = [output async for output in engine.stream(Call(prompt(engine, 9), greedy(2)), on_abandoned=ended.append)]
    assert len(ended) == 1, "a call that ends with an outcome is not abandoned"


async def test_abort_before_the_first_step_releases_everything(engine: Engine) -> None:
    tasks = [
        asyncio.create_task(run(engine, Call(prompt(engine, 90, n), greedy(50), push(engine, 0.5, n))))
        for n in range(6)
    ]
    for delay, task in enumerate(tasks):
        await asyncio.sleep(0.002 * delay)
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    assert (await usage(engine))["slots"] == 0


async def test_full_bank_queues_requests_then_refuses_them(engine: Engine) -> None:
    calls = [Call(prompt(engine, 10, n), greedy(30), push(engine, 0.5, n)) for n in range(30)]
    results = await asyncio.gather(*(run(engine, call) for call in calls), return_exceptions=True)
    refused = [r for r in results if isinstance(r, QueueFull)]
    served = [r for r in results if isinstance(r, list)]
    # 12 slots and 8 places in the queue.
    assert (len(served), len(refused)) == (20, 10)
    assert {r.resource for r in refused} <= {"slots", "rows"}
    assert all(outcome(outputs).moved == (38,) for outputs in served)
    assert (await usage(engine))["slots"] == 0


async def test_release_of_a_finished_request_needs_no_rpc(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    methods: list[str] = []
    rpc = engine.llm.collective_rpc

    async def recorded(method: str, *args: Any, **kwargs: Any) -> Any:
        methods.append(method)
        return await rpc(method, *args, **kwargs)

    monkeypatch.setattr(engine.llm, "collective_rpc", recorded)
    for seed in range(3):
        await asyncio.gather(
            *(run(engine, Call(prompt(engine, 10, n), greedy(5), push(engine, 0.5, seed))) for n in range(4))
        )
        await asyncio.sleep(2 * RELEASE_TIMEOUT_S)
    assert methods == []
    assert not engine.hub.inboxes


async def test_unread_frames_of_a_released_request_are_not_attributed_to_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server reads no frame until the worker has confirmed that it released the request."""
    monkeypatch.setattr("rudder.server.engine.engine.RELEASE_TIMEOUT_S", 0.05)
    row = pb.Row(feature=pb.Feature(index=0))
    calls = [
        Call(prompt(engine, 20, n), greedy(tokens), watch=compile_watch([(SITE, row)], engine.registry, "watch"))
        for n, tokens in enumerate((150, 400, 3))
    ]
    reading = True
    messages, rpc = engine.hub.channel.messages, engine.llm.collective_rpc

    async def until_released(method: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal reading
        answer = await rpc(method, *args, **kwargs)
        reading = reading or (method == "rudder_holds" and not any(answer))
        return answer

    monkeypatch.setattr(engine.llm, "collective_rpc", until_released)
    monkeypatch.setattr(engine.hub.channel, "messages", lambda: messages() if reading else [])
    first = asyncio.create_task(run(engine, calls[0]))
    aborted = engine.stream(calls[1])
    await anext(aborted)
    reading = False
    later = asyncio.create_task(run(engine, calls[2]))
    await asyncio.sleep(0.2)
    await aborted.aclose()
    for outputs, tokens in ((await first, 150), (await later, 3)):
        assert positions(outputs) == list(range(20, 20 + tokens - 1))
    assert reading
    assert engine.hub.lost is None


async def test_lost_telemetry_fails_requests_that_run_and_that_wait_for_the_bank(engine: Engine) -> None:
    calls = [Call(prompt(engine, 10, n), greedy(400), push(engine, 0.5, n)) for n in range(13)]
    tasks = [asyncio.create_task(run(engine, call)) for call in calls]
    for _ in range(500):
        await asyncio.sleep(0.01)
        if engine.admission.waiting:
            break
    engine.hub.lost = TelemetryLost("a gap")
    done, running = await asyncio.wait(tasks, timeout=5)
    engine.hub.lost = None
    engine.hub.ended.clear()
    engine.spawn(engine.listen())
    assert not running
    assert [type(task.exception()) for task in done] == [TelemetryLost] * 13
    for _ in range(500):
        if not (await usage(engine))["slots"]:
            return
        await asyncio.sleep(0.01)
    pytest.fail("slots were not released")


async def test_reused_slots_and_rows_keep_no_state(engine: Engine) -> None:
    plain = Call(prompt(engine, 15), greedy(12))
    alone = ids(await run(engine, plain))
    for seed in range(3):
        await asyncio.gather(
            *(
                run(engine, Call(plain.prompt_ids, greedy(4), push(engine, 2.0, 10 * seed + n, site=LATE)))
                for n in range(12)
            )
        )
    weak = Call(plain.prompt_ids, plain.sampling, push(engine, 1e-6))
    results = await asyncio.gather(*(run(engine, weak) for _ in range(12)))
    assert {tuple(ids(outputs)) for outputs in results} == {tuple(alone)}


async def test_features_belong_to_the_positions_they_are_reported_for(engine: Engine) -> None:
    bundle = next(iter(engine.bundles.values()))
    watched = np.argsort(-bundle.statistics.frequency.numpy())[:5].tolist()
    named = [(SITE, pb.Row(feature=pb.Feature(index=i))) for i in watched]
    rows = compile_watch(named, engine.registry, "watch", prompt=True)
    noise = [Call(prompt(engine, 40 + n, n), greedy(6), push(engine, 0.5, n)) for n in range(4)]
    call = Call(
        prompt(engine, 150, 3), greedy(6), watch=rows, top_k=40, top_k_sites=(SITE,), top_k_prompt=True, capture=True
    )
    outputs, *_ = await asyncio.gather(run(engine, call), *(run(engine, c) for c in noise))
    residual = np.concatenate(
        [
            np.frombuffer(c.before, "<f4")
            for c in outcome(outputs).captures
            if c.site == engine.registry.layout.sites.index(SITE)
        ]
    )
    encoded = bundle.sae.encode(torch_of(residual.reshape(-1, engine.model.hidden_size)[:155])).numpy()
    active = np.concatenate([output.features.activations for output in outputs])
    np.testing.assert_allclose(active, encoded[:, watched], rtol=1e-3, atol=1e-3)
    values = np.concatenate([output.features.top_values for output in outputs])[:, 0]
    np.testing.assert_allclose(values, -np.sort(-encoded, axis=1)[:, :40], rtol=1e-3, atol=1e-3)


def torch_of(array: Any) -> Any:
    """Convert an array to a tensor."""
    import torch

    return torch.from_numpy(array.copy())


@pytest.mark.parametrize("reason", ["error", "abort"])
async def test_call_that_fails_before_its_first_token_ends_with_its_reason(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    """Such a call may never have run, so there is no telemetry to wait for."""
    choice = SimpleNamespace(text="", token_ids=[], logprobs=None, finish_reason=reason, stop_reason=None)
    result = SimpleNamespace(outputs=[choice], num_cached_tokens=None, prompt_logprobs=None)

    async def failed(*_: Any) -> Any:
        return SimpleNamespace(get_nowait=lambda: result, request_id="failed")

    monkeypatch.setattr("rudder.server.engine.engine.add_request", failed)
    (output,) = await asyncio.wait_for(run(engine, Call(prompt(engine, 20), greedy(5), push(engine, 0.5))), 5)
    assert outcome([output]).finish_reason == reason
    assert (outcome([output]).moved, outcome([output]).tokens_seen) == ((0,), 0)
    assert (await usage(engine))["slots"] == 0
