"""Nothing leaves before its verdict; what leaves is what the engine gave, in order, whole and once."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rudder.sae_models.statistics import Statistic, exceeds
from rudder.sae_models.token_model import TokenModel
from rudder.server.engine.adapter import SamplingParams
from rudder.server.engine.call import Call, FinishReason
from rudder.server.engine.telemetry.frame import TelemetryLost
from rudder.server.program.compile import NOTHING
from rudder.server.safety.guards import ANNOTATE, CLAMP_FROM_START, COUNT, REJECT
from rudder.server.safety.holdback import released, tokens_beyond
from rudder.server.safety.verdicts import Findings, Refusing, Siblings, Verdict
from tests.unit.server.safety.scripted import EOS, Engine, Result, Script, guard, policy, run, text

PROMPT, LENGTH = 4, 20
STATISTICS: list[Any] = [("none",), ("moving_average", 0.3), ("cusum", 0.2), ("agreement", 0.3, 3)]


def trips_at(position: int, total: int = PROMPT + LENGTH + 1) -> Any:
    """Return activations of one row that is above any level at one position."""
    values = np.zeros((total, 1))
    values[position:] = 1.0
    return values


def first_held(values: Any, statistic: Any, level: float, end: int) -> int | None:
    """Return where a guard holds, judged offline."""
    holds = np.flatnonzero(exceeds(Statistic(*statistic).update(np.asarray(values[:end], "<f4").sum(1)), level))
    return int(holds[0]) if len(holds) else None


@settings(max_examples=200, deadline=None)
@given(data=st.data(), seed=st.integers(0, 999))
async def test_what_leaves_is_judged_whole_in_order_and_once(data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompt, length = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 24))
    ends = data.draw(st.sampled_from(["length", "eos", "string"]))
    hold_back, statistic = data.draw(st.integers(0, 9)), data.draw(st.sampled_from(STATISTICS))
    ids = rng.integers(10, 90, length + 3).tolist()
    script = Script(prompt, ids, rng.normal(0, 0.4, (prompt + length + 4, 1)))
    script.chunks = data.draw(st.lists(st.integers(1, 6), max_size=8))
    if ends != "length":
        script.ids, script.ends = ids[:length], FinishReason.STOP
        script.stop_reason = "x" if ends == "string" else None
        script.ids[-1:] = [EOS] if ends == "eos" else [ids[length - 1]]
    engine = Engine(script)
    one = guard(0, statistic=statistic, level=data.draw(st.sampled_from([0.2, 0.8, 9.0])), hold_back=hold_back)
    result = await run(engine, policy(one), max_tokens=length if ends == "length" else length + 5)
    # EOS is the only token that is not judged.
    end = prompt + length - (ends == "eos")
    held = first_held(script.values, statistic, one.level, end)
    expected = list(script.ids[:length])
    for output, delivered in zip(result.outputs, result.delivered, strict=True):
        last = output.first_position + len(output.token_ids) - 1
        assert last + hold_back < delivered or not output.token_ids
    if held is None:
        assert (result.ids, result.text) == (expected, text(expected))
        assert result.outcome.finish_reason == ("length" if ends == "length" else "stop")
        assert result.outcome.generated_tokens == length
        # As without a guard: the last token has no activations.
        assert result.positions == list(range(prompt + length - 1))
        logprobs = [value for o in result.outputs for entry in o.logprobs or () for value in entry.values()]
        assert logprobs == list(range(prompt, prompt + length))
    else:
        sent = len(result.ids)
        assert result.ids == expected[:sent]
        assert result.text == text(expected[:sent])
        assert prompt + sent - 1 + hold_back < held or not sent
        assert result.outcome.finish_reason == "refused"
        assert result.outcome.generated_tokens == sent
        assert result.findings.refusing
        assert result.findings.refusing.verdict.position == held
        assert result.findings.refusing.text == "The policy's text."
        assert not result.positions or result.positions[-1] < prompt + sent
    assert not result.abandoned or ends == "string"


@pytest.mark.parametrize("hold_back", [0, 4, 8])
async def test_text_stops_so_many_tokens_before_the_alarm(hold_back: int) -> None:
    engine = Engine(Script(PROMPT, [*range(10, 40)], trips_at(PROMPT + 12)))
    result = await run(engine, policy(guard(0, hold_back=hold_back)), max_tokens=LENGTH)
    assert len(result.ids) == 12 - hold_back
    assert engine.aborted == 1
    assert engine.waits


async def test_prompt_is_judged_before_the_first_token() -> None:
    for action, phase in ((REJECT, False), (REJECT, True)):
        one = guard(0, action=action, generated=phase)
        engine = Engine(Script(PROMPT, [*range(10, 40)], trips_at(1)))
        result = await run(engine, policy(one), max_tokens=LENGTH)
        assert (result.ids, result.text, result.positions) == ([], "", [])
        assert [output.prompt_logprobs for output in result.outputs] == [None]
        assert result.findings.refusing
        assert result.findings.refusing.verdict[1:5] == ("rule", "reject", False, 1)


def test_a_call_needs_room_for_a_token_more_only_where_the_last_one_is_judged() -> None:
    model = TokenModel(np.zeros(1 << 10, np.float32), 0.0, 1, "")
    by_ids = replace(guard(), token_model=model)
    assert tokens_beyond([policy(guard(0))]) == 1
    assert tokens_beyond([policy(guard(0, generated=False))]) == 0
    assert tokens_beyond([policy(guard(0), shadow=True)]) == 0
    assert tokens_beyond([policy(by_ids)]) == 0


async def test_prompts_guard_alone_holds_nothing_back_once_it_has_judged() -> None:
    engine = Engine(Script(PROMPT, [*range(10, 40)], trips_at(PROMPT)))
    result = await run(engine, policy(guard(0, action=REJECT, generated=False)), max_tokens=LENGTH)
    assert result.ids == list(range(10, 10 + LENGTH))
    assert result.delivered[0] == PROMPT
    assert engine.calls[0].sampling.max_tokens == LENGTH


@pytest.mark.parametrize("position", [PROMPT + LENGTH - 1, PROMPT + 2])
async def test_last_token_by_length_is_judged_and_the_one_behind_it_is_not(position: int) -> None:
    engine = Engine(Script(PROMPT, [*range(10, 40)], trips_at(position)))
    result = await run(engine, policy(guard(0, hold_back=0)), max_tokens=LENGTH)
    assert result.ids == list(range(10, 10 + position - PROMPT))
    beyond = Engine(Script(PROMPT, [*range(10, 40)], trips_at(PROMPT + LENGTH)))
    whole = await run(beyond, policy(guard(0, hold_back=0)), max_tokens=LENGTH)
    assert whole.ids == list(range(10, 10 + LENGTH))
    assert whole.text == text(range(10, 10 + LENGTH))


async def test_last_token_before_a_stop_string_is_judged_by_a_call_of_its_own() -> None:
    for position, sent in ((PROMPT + 9, 9), (PROMPT + 10, 10)):
        script = Script(PROMPT, [*range(10, 20)], trips_at(position), FinishReason.STOP, "<19>")
        engine = Engine(script)
        result = await run(engine, policy(guard(0, hold_back=0)), max_tokens=LENGTH)
        assert len(result.ids) == sent
        again = engine.calls[1]
        assert (len(again.prompt_ids), again.answer, again.prompt_tokens) == (PROMPT + 10, 10, PROMPT)
        assert not again.reads_prompt
        assert [outcome.finish_reason for outcome in result.abandoned] == ["abort"]


async def test_a_last_token_that_is_not_read_ends_the_call() -> None:
    class Silent(Engine):
        def features(self, call: Any, end: int) -> Any:
            return super().features(replace(call, guard=()) if call.answer else call, end)

    engine = Silent(Script(PROMPT, [*range(10, 20)], trips_at(99), FinishReason.STOP, "<19>"))
    with pytest.raises(TelemetryLost, match="position 13"):
        await run(engine, policy(guard(0)), max_tokens=LENGTH)


async def test_lost_telemetry_ends_the_call_and_what_waits_never_leaves() -> None:
    engine = Engine(Script(PROMPT, [*range(10, 40)], trips_at(99)), lose_at=15)
    result = Result()
    with pytest.raises(TelemetryLost):
        result = await run(engine, policy(guard(0, hold_back=8)), max_tokens=LENGTH)
    assert result.ids == []


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR])
async def test_what_waits_of_a_broken_answer_never_leaves(reason: FinishReason) -> None:
    engine = Engine(Script(PROMPT, [*range(10, 20)], trips_at(99), reason))
    result = await run(engine, policy(guard(0, hold_back=7)), max_tokens=LENGTH)
    assert result.outcome.finish_reason == reason
    # Tokens behind it are judged as far as there are any.
    assert result.ids == [10]
    assert result.outcome.generated_tokens == 1


@pytest.mark.parametrize("spares", [False, True])
async def test_refusal_of_a_choice_ends_the_others_unless_the_guard_spares_them(spares: bool) -> None:
    siblings, one = Siblings(), guard(0, hold_back=0, spare_other_choices=spares)
    bad = await run(
        Engine(Script(PROMPT, [*range(10, 40)], trips_at(PROMPT))), policy(one), max_tokens=3, siblings=siblings
    )
    other = await run(
        Engine(Script(PROMPT, [*range(10, 40)], trips_at(99))), policy(one), max_tokens=3, siblings=siblings
    )
    assert bad.outcome.finish_reason == "refused"
    assert other.outcome.finish_reason == ("length" if spares else "refused")
    assert len(other.ids) == (3 if spares else 0)
    assert other.findings.verdicts == []
    if not spares:
        assert other.findings.refusing
        assert other.findings.refusing.others


async def test_running_choice_stops_at_its_next_output() -> None:
    siblings, engine = Siblings(), Engine(Script(PROMPT, [*range(10, 40)], trips_at(99)))

    stand_in: Any = engine
    call = Call(tuple(range(PROMPT)), SamplingParams(max_tokens=9))
    stream = released(stand_in, call, [policy(guard(0, hold_back=2))], Findings(), siblings)
    first = await anext(stream)
    assert first.token_ids == [10]
    siblings.refusing = Refusing(Verdict("p", "r", "stop", False, 5, 1.0), "No.")
    last = await anext(stream)
    assert (last.token_ids, last.outcome and last.outcome.finish_reason) == ([], "refused")
    assert engine.aborted == 1


async def test_prompt_runs_again_with_the_gate_open_once() -> None:
    forced, gated = replace(NOTHING, digest="forced"), replace(NOTHING, digest="gated")
    one = guard(0, action=CLAMP_FROM_START, generated=False)
    engine = Engine(Script(PROMPT, [*range(10, 40)], trips_at(1)))
    bound = policy(one, guard(0, name="note", action=ANNOTATE), program=gated, forced=forced)
    result = await run(engine, bound, max_tokens=5)
    assert [[program.digest for program in call.policies] for call in engine.calls] == [[], ["forced"]]
    assert result.ids == list(range(10, 15))
    assert result.findings.programs == (forced,)
    assert sorted(v.rule for v in result.findings.verdicts) == ["note", "rule"]
    assert result.abandoned == []


async def test_rejected_prompt_does_not_run_again() -> None:
    guards = guard(0, action=CLAMP_FROM_START, generated=False), guard(0, action=REJECT, generated=False, name="no")
    engine = Engine(Script(PROMPT, [*range(10, 40)], trips_at(1)))
    result = await run(engine, policy(*guards, program=NOTHING, forced=NOTHING), max_tokens=5)
    assert len(engine.calls) == 1
    assert result.outcome.finish_reason == "refused"


async def test_token_model_rejects_a_prompt_that_the_engine_never_sees() -> None:
    model = TokenModel(np.ones(1 << 10, np.float32), 0.0, 1, "")
    one = replace(guard(action=REJECT, generated=False), token_model=model)
    engine = Engine(Script(PROMPT, [*range(10, 40)], trips_at(99)))
    result = await run(engine, policy(one), max_tokens=5)
    assert engine.calls == []
    assert result.outcome.finish_reason == "refused"


async def test_inspection_lets_no_generated_token_out_and_judges_the_prompt() -> None:
    for position, reason in ((PROMPT - 1, "refused"), (99, "length")):
        engine = Engine(Script(PROMPT, [*range(10, 40)], trips_at(position)))
        result = await run(engine, policy(guard(0)), max_tokens=1, inspects=True)
        assert (result.ids, result.text) == ([], "")
        assert result.positions == ([] if reason == "refused" else list(range(PROMPT)))
        assert result.outcome.finish_reason == reason
        assert engine.calls[0].sampling.max_tokens == 1


@pytest.mark.parametrize("action", [COUNT, ANNOTATE])
async def test_counting_and_annotating_guards_change_nothing_that_leaves(action: Any) -> None:
    engine = Engine(Script(PROMPT, [*range(10, 40)], trips_at(PROMPT + 3)))
    result = await run(engine, policy(guard(0, action=action), guard(0, level=7.0, action=action)), max_tokens=LENGTH)
    assert result.ids == list(range(10, 10 + LENGTH))
    assert [verdict.position for verdict in result.findings.verdicts] == [PROMPT + 3]
    assert [(benign.maximum, benign.level) for benign in result.findings.benign] == [(1.0, 7.0)]


async def test_shadow_counts_and_neither_waits_nor_refuses() -> None:
    engine = Engine(Script(PROMPT, [*range(10, 40)], trips_at(PROMPT + 3)))
    result = await run(engine, policy(guard(0, hold_back=8), shadow=True), max_tokens=LENGTH)
    assert result.ids == list(range(10, 10 + LENGTH))
    assert [output.token_ids for output in result.outputs] == [[10 + n] for n in range(LENGTH)]
    assert engine.calls[0].sampling.max_tokens == LENGTH
    assert [(v.position, v.shadow) for v in result.findings.verdicts] == [(PROMPT + 3, True)]


async def test_without_guards_the_engine_is_not_wrapped() -> None:
    engine = Engine(Script(PROMPT, [*range(10, 40)], trips_at(99)))
    result = await run(engine, policy(), max_tokens=3)
    assert result.ids == [10, 11, 12]
    assert engine.waits == []
