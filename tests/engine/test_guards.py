"""Guards over a real engine: what leaves is what plain vLLM gives, up to the tokens that wait for the alarm."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from google.protobuf import json_format
from prometheus_client import CollectorRegistry

from rudder.server import config as configuration
from rudder.server.caller import ANONYMOUS
from rudder.server.engine.call import Call
from rudder.server.engine.engine import Engine
from rudder.server.monitoring.metrics import Metrics
from rudder.server.monitoring.traces import Correlation
from rudder.server.program.watch import compile_watch
from rudder.server.safety.binding import Binding
from rudder.server.safety.policy import Policy, compile_policy
from rudder.server.service import inference
from rudder.server.service.errors import Refusal
from rudder.server.service.record import CallRecord
from rudder.server.service.serving import Serving
from rudder.v1 import inference_pb2, policy_pb2, program_pb2
from tests.engine.test_traps import LATE, SITE, TEXT, greedy, preemptions, prompt, run

LENGTH, PROBES = 24, 12
REFUSED = inference_pb2.FINISH_REASON_REFUSED


def probe(engine: Engine, seed: int) -> dict[str, Any]:
    """Return a probe of random weights, in JSON form."""
    weights = np.random.default_rng(seed).normal(size=engine.model.hidden_size)
    return {"probe": {"name": f"random {seed}", "weights": weights.round(4).tolist()}}


def guard(engine: Engine, seed: int, level: float, **fields: Any) -> dict[str, Any]:
    """Return a guard on the probe of this seed."""
    term = {"site": LATE, "row": probe(engine, seed), "weight": 1}
    return {"name": "hazard", "score": {"terms": [term]}, "level": level, "action": "GUARD_ACTION_STOP"} | fields


def policy(engine: Engine, *guards: dict[str, Any], **fields: Any) -> Policy:
    """Compile a policy of these guards, with which callers may edit and read what no guard reads."""
    document = {
        "name": "p", "version": 1, "binds": {"all": True}, "guards": list(guards), "refusal": "Not here.",
        "rights": {"edit_latents": True},
    } | fields  # fmt: skip
    return compile_policy(json_format.ParseDict(document, policy_pb2.Policy()), engine.registry, Path())


@dataclass
class Answer:
    """A whole answer of Generate, with its messages, and the record of its call."""

    messages: list[inference_pb2.GenerateResponse]
    record: CallRecord

    def choice(self, index: int = 0) -> inference_pb2.ChoiceDelta:
        """Merge the deltas of a choice."""
        whole = inference_pb2.ChoiceDelta()
        for delta in (delta for message in self.messages for delta in message.choices if delta.index == index):
            text = whole.text + delta.text
            whole.MergeFrom(delta)
            whole.text = text
        return whole


def serving(engine: Engine) -> Serving:
    """Return what calls share; each token leaves by itself."""
    loaded = configuration.load(None, {"stream.message_budget_per_s": "1000000"})
    return Serving.around(engine, loaded, Metrics.create(CollectorRegistry()))


def request(text: str = TEXT, **sampling: Any) -> inference_pb2.GenerateRequest:
    """Return a request of greedy text without an end of its own."""
    chosen = {"temperature": 0.0, "ignore_eos": True, "max_tokens": LENGTH} | sampling
    return inference_pb2.GenerateRequest(
        prompt=inference_pb2.Prompt(text=text), sampling=inference_pb2.Sampling(**chosen)
    )


async def generate(engine: Engine, one: inference_pb2.GenerateRequest, *policies: Policy) -> Answer:
    """Run Generate as a caller whom these policies bind."""
    record = CallRecord("InferenceService.Generate", ANONYMOUS, Correlation(), binding=Binding(policies))
    answer = Answer([], record)

    async def send(message: inference_pb2.GenerateResponse) -> None:
        answer.messages.append(message)

    await inference.generate(serving(engine), record, one, send)
    record.end("OK")
    return answer


async def scores(engine: Engine, seeds: Sequence[int], ids: Sequence[int], tokens: int) -> Any:
    """Return the activations of probes at all tokens of prompt and answer, [positions, probes]."""
    rows = [(LATE, json_format.ParseDict(probe(engine, seed), program_pb2.Row())) for seed in seeds]
    watch = compile_watch(rows, engine.registry, "watch", prompt=True)
    outputs = await run(engine, Call(tuple(ids), greedy(tokens + 1), guard=watch))
    return np.concatenate([output.guard_features.activations for output in outputs])


@dataclass(frozen=True)
class Alarm:
    """A probe whose activation at the answer's token number `token` exceeds that of every token before it.

    `level`: between the two. `prompt_tokens`: of TEXT. `plain`: the answer without a guard.
    """

    seed: int
    token: int
    level: float
    prompt_tokens: int
    plain: inference_pb2.ChoiceDelta


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def alarm(engine: Engine) -> Alarm:
    """Find a probe whose alarm is at one of the answer's tokens 10 to 19."""
    plain = (await generate(engine, request())).choice()
    ids = (engine.model.bos_token_id, *engine.tokenizer.encode(TEXT, add_special_tokens=False))
    values = await scores(engine, range(PROBES), ids, LENGTH)
    for seed, token in product(range(PROBES), range(10, 20)):
        before, at = values[1 : len(ids) + token, seed].max(), values[len(ids) + token, seed]
        if at > before + 0.05 * abs(before):
            return Alarm(seed, token, float(before + at) / 2, len(ids), plain)
    raise AssertionError("no probe has its alarm there")


@pytest.mark.parametrize("hold_back", [0, 4, 8])
async def test_text_stops_so_many_tokens_before_the_alarm(engine: Engine, alarm: Alarm, hold_back: int) -> None:
    bound = policy(engine, guard(engine, alarm.seed, alarm.level, hold_back=hold_back))
    one = request(logprobs=2)
    one.report.features.add(site=SITE, row=program_pb2.Row(feature=program_pb2.Feature(index=3)))
    one.report.top_k = 4
    answer = await generate(engine, one, bound)
    choice, sent = answer.choice(), alarm.token - hold_back
    assert list(choice.token_ids) == list(alarm.plain.token_ids[:sent])
    assert alarm.plain.text.startswith(choice.text)
    assert len(choice.logprobs.chosen) == sent
    assert choice.finish_reason == REFUSED
    refusal = choice.refusal
    assert (refusal.policy, refusal.rule, refusal.text) == ("p", "hazard", "Not here.")
    assert refusal.position == alarm.prompt_tokens + alarm.token
    assert not refusal.HasField("score")
    assert max(choice.activations.positions) < alarm.prompt_tokens + sent
    assert choice.usage.generated_tokens == sent
    (applied,) = choice.attestation.policies
    assert [(v.rule, v.position) for v in applied.verdicts] == [("hazard", refusal.position)]
    assert answer.record.outcome == "POLICY_REFUSED"


async def test_score_is_for_callers_with_the_right_to_read_guards(engine: Engine, alarm: Alarm) -> None:
    rights = {"read_guards": True, "edit_latents": True}
    bound = policy(engine, guard(engine, alarm.seed, alarm.level), rights=rights)
    refusal = (await generate(engine, request(), bound)).choice().refusal
    assert refusal.score > alarm.level


def ending(engine: Engine, kind: str, alarm: Alarm, tokens: int) -> inference_pb2.GenerateRequest:
    """Return a request whose answer ends with the token before number `tokens`."""
    match kind:
        case "stop string":
            text = engine.tokenizer.decode(alarm.plain.token_ids[tokens - 8 : tokens])
            assert text not in engine.tokenizer.decode(alarm.plain.token_ids[: tokens - 1])
            return request(stop=[text])
        case "EOS":
            return request(min_tokens=tokens, ignore_eos=False, logit_bias={engine.tokenizer.eos_token_id: 100.0})
    return request(max_tokens=tokens)


@pytest.mark.parametrize("kind", ["length", "stop string", "EOS"])
async def test_answer_that_no_guard_stops_is_that_of_plain_vllm(engine: Engine, alarm: Alarm, kind: str) -> None:
    one = ending(engine, kind, alarm, alarm.token)
    one.report.top_k = 3
    bound = policy(engine, guard(engine, alarm.seed, 1e9))
    plain, guarded = (await generate(engine, one)).choice(), (await generate(engine, one, bound)).choice()
    for name in ("text", "token_ids", "finish_reason", "stop_reason", "usage", "logprobs"):
        assert getattr(guarded, name) == getattr(plain, name), name
    assert guarded.activations.positions == plain.activations.positions
    np.testing.assert_allclose(guarded.activations.activations, plain.activations.activations, rtol=1e-4, atol=1e-4)
    more = {"length": 1, "stop string": 1, "EOS": 0}[kind]
    assert guarded.attestation.tokens_seen == plain.attestation.tokens_seen + more


@pytest.mark.parametrize("kind", ["length", "stop string"])
async def test_last_token_is_judged(engine: Engine, alarm: Alarm, kind: str) -> None:
    one = ending(engine, kind, alarm, alarm.token + 1)
    bound = policy(engine, guard(engine, alarm.seed, alarm.level, hold_back=0))
    choice = (await generate(engine, one, bound)).choice()
    assert choice.finish_reason == REFUSED
    assert list(choice.token_ids) == list(alarm.plain.token_ids[: alarm.token])
    assert choice.refusal.position == alarm.prompt_tokens + alarm.token


async def test_stop_string_that_ends_behind_the_last_token_is_not_found(engine: Engine, alarm: Alarm) -> None:
    """Its first characters wait in the engine for the rest, which is of the token that is dropped."""
    stop = engine.tokenizer.decode(alarm.plain.token_ids[3:11])
    bound = policy(engine, guard(engine, alarm.seed, 1e9))
    for include in (False, True):
        one = request(max_tokens=10, stop=[stop], include_stop=include)
        plain, guarded = (await generate(engine, one)).choice(), (await generate(engine, one, bound)).choice()
        assert plain.finish_reason == inference_pb2.FINISH_REASON_LENGTH
        assert (guarded.text, guarded.finish_reason, guarded.stop_reason) == (plain.text, plain.finish_reason, "")
        assert guarded.token_ids == plain.token_ids


async def test_prompt_needs_room_for_one_token_more(engine: Engine) -> None:
    bound = policy(engine, guard(engine, 0, 1e9))
    room = engine.model.max_model_len - len(prompt(engine, 400)) - 1
    ids = inference_pb2.Prompt(text=engine.tokenizer.decode(prompt(engine, 400)[1:]))
    with pytest.raises(Refusal, match="max_tokens"):
        await generate(engine, replace_prompt(request(max_tokens=room + 1), ids), bound)
    choice = (await generate(engine, replace_prompt(request(max_tokens=room), ids), bound)).choice()
    assert choice.usage.generated_tokens == room


def replace_prompt(one: inference_pb2.GenerateRequest, prompt: inference_pb2.Prompt) -> inference_pb2.GenerateRequest:
    """Return the request with another prompt."""
    one.prompt.CopyFrom(prompt)
    return one


@pytest.mark.parametrize("spares", [False, True])
async def test_one_refused_choice_ends_the_others_unless_it_spares_them(engine: Engine, spares: bool) -> None:
    one = request(n=3, temperature=1.0, seed=5)
    plain = await generate(engine, one)
    answers = [plain.choice(index).token_ids for index in range(3)]
    ids = (engine.model.bos_token_id, *engine.tokenizer.encode(TEXT, add_special_tokens=False))
    values = [(await scores_of(engine, (*ids, *answer)))[1:] for answer in answers]
    seed, level, bad = stopping_one(values, len(ids) - 1)
    bound = policy(engine, guard(engine, seed, level, spare_other_choices=spares, hold_back=0))
    guarded = await generate(engine, one, bound)
    for index in range(3):
        choice = guarded.choice(index)
        stopped = index == bad or not spares
        assert (choice.finish_reason == REFUSED) == stopped
        assert list(choice.token_ids) == list(answers[index][: len(choice.token_ids)])
        assert stopped or len(choice.token_ids) == LENGTH


def stopping_one(values: Sequence[Any], prompt_tokens: int) -> tuple[int, float, int]:
    """Return a probe, a level that it exceeds in one of three answers alone and well before the end, and that answer.

    `values`: activations of each answer's tokens behind those of its prompt, [positions, probes].
    """
    for seed in range(PROBES):
        maxima = [value[:, seed].max() for value in values]
        level, bad = float(np.sort(maxima)[1:].mean()), int(np.argmax(maxima))
        first = int((values[bad][:, seed] > level).argmax())
        if min(maxima) < level and prompt_tokens <= first < prompt_tokens + LENGTH - 6:
            return seed, level, bad
    raise AssertionError("no probe tells one answer from the others")


async def scores_of(engine: Engine, ids: Sequence[int]) -> Any:
    """Return the activations of all probes at all tokens of a text."""
    return await scores(engine, range(PROBES), ids, 0)


async def test_inspection_is_refused_or_unchanged(engine: Engine) -> None:
    one = inference_pb2.InspectRequest(prompt=inference_pb2.Prompt(text=TEXT))
    one.report.top_k = 4

    async def inspected(*policies: Policy) -> inference_pb2.InspectResponse:
        record = CallRecord("InferenceService.Inspect", ANONYMOUS, Correlation(), binding=Binding(policies))
        return await inference.inspect(serving(engine), record, one)

    plain = await inspected()
    ids = plain.token_ids
    values = (await scores(engine, [0], ids, 0))[1:, 0]
    free = await inspected(policy(engine, guard(engine, 0, float(values.max()) + 1)))
    assert (free.activations, free.pooled) == (plain.activations, plain.pooled)
    with pytest.raises(Refusal) as refused:
        await inspected(policy(engine, guard(engine, 0, float(np.sort(values)[-2:].mean()))))
    assert refused.value.reason == "POLICY_REFUSED"
    assert f"rule 'hazard', token {1 + values.argmax()}" in refused.value.message


async def test_rejected_prompt_gives_nothing_of_it(engine: Engine) -> None:
    one = request(prompt_logprobs=1, logprobs=1)
    one.report.top_k, one.report.prompt, one.report.pooled = 3, True, True
    rejects = guard(engine, 0, -1e9, action="GUARD_ACTION_REJECT")
    choice = (await generate(engine, one, policy(engine, rejects))).choice()
    assert (choice.text, len(choice.token_ids), choice.finish_reason) == ("", 0, REFUSED)
    assert not choice.HasField("prompt_logprobs")
    assert not choice.HasField("logprobs")
    assert not choice.activations.positions
    assert not choice.pooled
    # BOS is not judged.
    assert choice.refusal.position == 1


FORCED: dict[str, Any] = {
    "sites": [{"site": LATE, "edits": [{"row": {"vector": {"values": []}}, "add": 0.8, "unit": "UNIT_RESIDUAL_NORM"}]}],
}


async def test_clamp_from_start_is_the_program_without_its_gate(engine: Engine) -> None:
    direction = np.random.default_rng(3).normal(size=engine.model.hidden_size).tolist()
    FORCED["sites"][0]["edits"][0]["row"]["vector"]["values"] = direction
    never = {"site": SITE, "any_of": [{"row": probe(engine, 1), "above": 1e9}]}
    clamps = guard(engine, 0, -1e9, action="GUARD_ACTION_CLAMP_FROM_START")
    one = request(logprobs=0)
    gated = (await generate(engine, one, policy(engine, program=FORCED | {"gate": never}))).choice()
    forced = await generate(engine, one, policy(engine, program=FORCED))
    answer = await generate(engine, one, policy(engine, clamps, program=FORCED | {"gate": never}))
    choice = answer.choice()
    assert list(choice.token_ids) == list(forced.choice().token_ids) != list(gated.token_ids)
    touched = [[edit.tokens_touched for edit in a.record.choices[0].edits] for a in (answer, forced)]
    # The last token ran as well.
    assert touched[0] == touched[1] != []
    (applied,) = choice.attestation.policies
    assert [v.rule for v in applied.verdicts] == ["hazard"]


async def test_chunks_and_preemption_do_not_change_verdicts(engine: Engine) -> None:
    """Seven calls, of which some are preempted: each stops where it stops alone."""
    texts = [engine.tokenizer.decode(prompt(engine, 110, seed)[1:]) for seed in range(7)]
    calls = [request(text, max_tokens=60) for text in texts]
    ids = [(engine.model.bos_token_id, *engine.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    level = float(np.median((await scores(engine, [2], ids[0], 60))[len(ids[0]) :, 0]))
    # The KV cache is full before the guard may hold.
    fields = {"moving_average": {"decay": 0.12}, "min_tokens": 40, "hold_back": 4, "phase": "PHASE_GENERATED"}
    bound = policy(engine, guard(engine, 2, level, **fields))
    alone = [(await generate(engine, one, bound)).choice() for one in calls]
    before = preemptions()
    together = await asyncio.gather(*(generate(engine, one, bound) for one in calls))
    assert preemptions() > before, "nothing was preempted: this test shows nothing"
    assert REFUSED in {choice.finish_reason for choice in alone}
    for ours, expected in zip((answer.choice() for answer in together), alone, strict=True):
        assert (ours.refusal, ours.finish_reason) == (expected.refusal, expected.finish_reason)
        # Outputs of several tokens wait for the last of them.
        assert list(ours.token_ids) == list(expected.token_ids[: len(ours.token_ids)])
        assert len(ours.token_ids) >= len(expected.token_ids) - (8 if ours.finish_reason == REFUSED else 0)


async def test_prompt_in_chunks_is_judged_at_the_same_token(engine: Engine) -> None:
    text = engine.tokenizer.decode(prompt(engine, 330, 4)[1:])
    ids = (engine.model.bos_token_id, *engine.tokenizer.encode(text, add_special_tokens=False))
    values = (await scores(engine, [6], ids, 1))[1 : len(ids), 0]
    bound = policy(engine, guard(engine, 6, float(np.sort(values)[-2:].mean()), action="GUARD_ACTION_REJECT"))
    noise = [request(engine.tokenizer.decode(prompt(engine, 70 + n, n)[1:])) for n in range(5)]
    # The second time, the prefix cache has the prompt.
    for _ in range(2):
        answer, *_ = await asyncio.gather(
            generate(engine, request(text), bound), *map(partial(generate, engine), noise)
        )
        assert answer.choice().refusal.position == 1 + values.argmax()
