"""From a request to its calls: what a policy forbids, whose prefix cache is read, and what is refused untokenised."""

from dataclasses import replace
from math import inf
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf import json_format
from transformers import AutoTokenizer

from rudder.sae_models import PRETRAINED
from rudder.server import config as configuration
from rudder.server.caller import ANONYMOUS, Caller
from rudder.server.engine.call import Call, salt
from rudder.server.monitoring.metrics import Metrics
from rudder.server.monitoring.series import SHADOW_REFUSALS
from rudder.server.program.compile import compile_program
from rudder.server.program.named import NamedProgram
from rudder.server.safety.binding import UNBOUND, Binding
from rudder.server.service.errors import Refusal, refusal_of
from rudder.server.service.prepare import hidden_latents, prepare
from rudder.server.service.serving import WATCH_CACHE_BYTES, Serving
from rudder.v1 import inference_pb2, program_pb2
from tests.unit.policies import REGISTRY, editing, latent, policy
from tests.unit.programs import OTHER, PROBE, SITE, feature
from tests.unit.reference import BUNDLE, WIDTH

UP = {"row": {"vector": {"values": [1.0] * WIDTH}}, "add": 1.0}
PROBED = {"site": SITE, "row": PROBE, "weight": 1}
TENANT = Caller("alice", "acme", ANONYMOUS.roles)
KINDS = (inference_pb2.GenerateRequest, inference_pb2.CompleteRequest, inference_pb2.InspectRequest)


class OneTokenPerWord:
    """A tokenizer that counts how often it is used."""

    bos_token_id, chat_template = None, "{{ messages }}"
    used = 0

    def __deepcopy__(self, _: Any) -> "OneTokenPerWord":
        return self

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join("x" for _ in ids)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text)}

    def encode(self, text: str, **_: Any) -> list[int]:
        self.used += 1
        return [1] * len(text.split())

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return " ".join(message["content"] for message in messages)


def named(*edits: dict[str, Any], site: str = SITE) -> NamedProgram:
    message = json_format.ParseDict({"sites": [{"site": site, "edits": list(edits)}]}, program_pb2.Program())
    return NamedProgram(message, compile_program(message, REGISTRY))


def capped(edit: dict[str, Any], site: str = SITE) -> str:
    """Return the digest of a program whose displacement is at most the norm of x: beyond the bank's limit, where a
    caller's own edit could be, a policy's edit behind it would be rejected.
    """
    document = {"sites": [{"site": site, "edits": [edit], "maxDisplacement": 1.0}]}
    return compile_program(json_format.ParseDict(document, program_pb2.Program()), REGISTRY).digest


def serving_of(overrides: dict[str, str] | None = None) -> Serving:
    engine: Any = SimpleNamespace(
        model=SimpleNamespace(name="m", max_model_len=100, vocab_size=1000, bos_token_id=None),
        bundles={}, registry=REGISTRY, tokenizer=OneTokenPerWord(), epoch="e1", healthy=True, stalled=False,
        programs={"late": named(UP, site=OTHER), "locked": named({"row": feature(5), "ablate": True}), "ok": named(UP)},
    )  # fmt: skip
    return Serving.around(engine, configuration.load(None, overrides), Metrics.create())


def request_of(kind: Any = inference_pb2.CompleteRequest, text: str = "a b c", **fields: Any) -> Any:
    return json_format.ParseDict({"prompt": {"text": text}} | fields, kind())


async def refused(serving: Serving, request: Any, binding: Binding = UNBOUND) -> tuple[str, str]:
    """Return reason and field of the refusal of a request."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        await prepare(serving, ANONYMOUS, request, binding)
    refusal: Refusal = refusal_of(caught.value)
    return refusal.reason, refusal.violations[0].field


OWN = {"edit_latents": True, "raw_vectors": True}
POLICY = Binding((policy(program=editing(5), rights=OWN),))
STEERED = [
    ({"program": {"sites": [{"site": OTHER, "edits": [UP]}]}}, "POLICY_FORBIDS", "steering.program.sites[0].site"),
    (
        {"program": {"sites": [{"site": SITE, "edits": [{"row": feature(5), "add": -9.0}]}]}},
        "ROW_LOCKED",
        "steering.program.sites[0].edits[0].row",
    ),
    ({"name": "late"}, "POLICY_FORBIDS", "steering.name.sites[0].site"),
    ({"name": "locked"}, "ROW_LOCKED", "steering.name.sites[0].edits[0].row"),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("steering", "reason", "field"), STEERED)
async def test_bound_caller_cannot_undo_the_policy(kind: Any, steering: Any, reason: str, field: str) -> None:
    assert await refused(serving_of(), request_of(kind, steering=steering), POLICY) == (reason, field)
    assert (await prepare(serving_of(), ANONYMOUS, request_of(kind, steering=steering))).calls


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
async def test_bound_caller_without_rights_runs_programs_that_have_names(kind: Any) -> None:
    binding = Binding((policy(program=editing(5)),))
    own = {"program": {"sites": [{"site": SITE, "edits": [UP]}]}}
    assert await refused(serving_of(), request_of(kind, steering=own), binding) == (
        "POLICY_FORBIDS",
        "steering.program",
    )
    job = await prepare(serving_of(), ANONYMOUS, request_of(kind, steering={"name": "ok"}), binding)
    assert job.program_digest == capped(UP)


async def test_policy_may_leave_edits_behind_it_but_rows_stay_locked() -> None:
    serving, binding = serving_of(), Binding((policy(program=editing(5), rights={"edit_behind_policy": True}),))
    job = await prepare(serving, ANONYMOUS, request_of(steering={"name": "late"}), binding)
    assert job.program_digest == capped(UP, OTHER)
    assert (await refused(serving, request_of(steering={"name": "locked"}), binding))[0] == "ROW_LOCKED"


async def test_every_choice_runs_the_policies() -> None:
    binding = Binding((policy("a", program=editing(5)), policy("b"), policy("c", program=editing(3))))
    job = await prepare(serving_of(), ANONYMOUS, request_of(steering={"name": "ok"}, sampling={"n": 3}), binding)
    programs = tuple(bound.program for bound in binding.policies if bound.program)
    assert [call.policies for call in job.calls] == [programs] * 3


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
async def test_forbidden_field_is_refused_in_every_method(kind: Any) -> None:
    binding = Binding((policy(forbiddenFields=["report.top_k", "prompt.text"]),))
    assert await refused(serving_of(), request_of(kind), binding) == ("POLICY_FORBIDS", "prompt.text")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
async def test_forbidden_reports_of_prompts_are_refused_in_inspect_too(kind: Any) -> None:
    """It reports them without being asked."""
    binding = Binding((policy(forbiddenFields=["report.prompt"]),))
    inspects = kind is inference_pb2.InspectRequest
    request = request_of(kind, report={} if inspects else {"prompt": True})
    assert await refused(serving_of(), request, binding) == ("POLICY_FORBIDS", "report.prompt")
    if not inspects:
        assert (await prepare(serving_of(), ANONYMOUS, request_of(kind), binding)).calls


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
async def test_locked_rows_are_not_reported(kind: Any) -> None:
    report = {"features": [{"site": SITE, "row": feature(3)}, {"site": SITE, "row": feature(5)}]}
    assert await refused(serving_of(), request_of(kind, report=report), POLICY) == (
        "ROW_LOCKED",
        "report.features[1].row",
    )


def test_locked_latents_are_left_out_of_the_strongest() -> None:
    serving = serving_of()
    bundle = SimpleNamespace(manifest=SimpleNamespace(site=SITE))
    serving.engine.bundles = {BUNDLE: bundle}  # type: ignore[dict-item]
    locked = Binding((policy(locked=[{"site": SITE, "row": latent(2)}, {"site": SITE, "row": latent(1)}]),))
    assert hidden_latents(serving, (OTHER, SITE), locked) == ((), (1, 2))
    assert hidden_latents(serving, (OTHER,), locked) == ()
    assert hidden_latents(serving, (SITE,), UNBOUND) == ()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
async def test_token_ids_of_a_bound_caller_must_be_canonical(kind: Any) -> None:
    canonical, other = ({"tokenIds": {"ids": ids}} for ids in ([1, 1], [1, 2]))
    binding = Binding((policy(),))
    assert (await prepare(serving_of(), ANONYMOUS, request_of(kind, prompt=canonical), binding)).calls
    assert (await prepare(serving_of(), ANONYMOUS, request_of(kind, prompt=other))).calls
    refusal = await refused(serving_of(), request_of(kind, prompt=other), binding)
    assert refusal == ("POLICY_FORBIDS", "prompt.token_ids")


SHIPPED = AutoTokenizer.from_pretrained(PRETRAINED / "textbook-lm")
CUT = "prompt.truncate_prompt_tokens"
# Characters that the tokenizer has as bytes: a cut may begin inside of one.
WORDS = "Staphylococcus and 病毒, archaebacteria 🦠"


async def test_prompt_of_a_bound_caller_is_not_cut_into_ids_that_nobody_writes() -> None:
    """What a guard judges is what the model reads: the text of the rest, in the ids that the tokenizer gives it."""
    serving, binding, whole = serving_of(), Binding((policy(),)), tuple(SHIPPED.encode(WORDS))
    serving.engine.tokenizer = SHIPPED  # type: ignore[misc]
    serving.bounds = replace(serving.bounds, vocab_size=len(SHIPPED))
    seen = {"canonical": 0, "split": 0}
    for kept in range(1, len(whole) + 3):
        ids = whole[-kept:]
        start = 1 if ids[0] == SHIPPED.bos_token_id else 0
        canonical = tuple(SHIPPED.encode(SHIPPED.decode(ids[start:]), add_special_tokens=False)) == ids[start:]
        seen["canonical" if canonical else "split"] += 1
        for prompt in ({"text": WORDS}, {"tokenIds": {"ids": whole}}):
            request = request_of(prompt=prompt | {"truncatePromptTokens": kept})
            assert (await prepare(serving, ANONYMOUS, request)).calls[0].prompt_ids == ids
            if canonical:
                assert (await prepare(serving, ANONYMOUS, request, binding)).calls[0].prompt_ids == ids
            else:
                assert await refused(serving, request, binding) == ("POLICY_FORBIDS", CUT)
    assert min(seen.values()) > 1
    request = request_of(prompt=chat_of(user=WORDS) | {"truncatePromptTokens": 90})
    assert (await prepare(serving, ANONYMOUS, request, binding)).calls


async def test_ids_that_are_cut_off_are_not_judged() -> None:
    serving, binding = serving_of(), Binding((policy(),))
    request = request_of(prompt={"tokenIds": {"ids": [7, 1, 1]}, "truncatePromptTokens": 2})
    assert (await prepare(serving, ANONYMOUS, request, binding)).calls[0].prompt_ids == (1, 1)
    request.prompt.truncate_prompt_tokens = 3
    assert await refused(serving, request, binding) == ("POLICY_FORBIDS", "prompt.token_ids")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
async def test_prompt_that_is_truncated_has_a_bound_too(kind: Any) -> None:
    """Four times that of others: to tokenise a megabyte for its last ten tokens takes a thread's time from others."""
    serving = serving_of()
    serving.tokenizers.chars_per_token = 5
    longest = {"text": "x" * 1985, "truncatePromptTokens": 10}
    assert (await prepare(serving, ANONYMOUS, request_of(kind, prompt=longest))).calls
    used = serving.engine.tokenizer.used
    assert await refused(serving, request_of(kind, prompt=longest | {"text": "x" * 1986})) == (
        "FIELD_INVALID",
        "prompt.text",
    )
    assert serving.engine.tokenizer.used == used


async def salts(serving: Serving, caller: Caller, **fields: Any) -> set[str]:
    """Return the prefix-cache salts of two equal requests of each method."""
    calls: list[Call] = []
    for kind in (*KINDS, *KINDS):
        calls += (await prepare(serving, caller, request_of(kind, **fields))).calls
    return {salt(b"secret", call) for call in calls}


async def test_anonymous_calls_share_no_prefix_cache_unless_they_share_a_salt() -> None:
    serving = serving_of()
    assert len(await salts(serving, ANONYMOUS)) == 6
    assert len(await salts(serving, ANONYMOUS, cacheSalt="mine")) == 1
    assert not await salts(serving, ANONYMOUS, cacheSalt="mine") & await salts(serving, ANONYMOUS, cacheSalt="other")
    # Neither do those of another connection.
    other = replace(ANONYMOUS, origin="ipv4:1.2.3.4:5")
    assert not await salts(serving, ANONYMOUS) & await salts(serving, other)


async def test_choices_of_one_anonymous_call_share_their_prompt() -> None:
    job = await prepare(serving_of(), ANONYMOUS, request_of(sampling={"n": 4}))
    assert len({salt(b"secret", call) for call in job.calls}) == 1


async def test_tenants_share_a_prefix_cache_within_but_not_across() -> None:
    serving = serving_of()
    own = await salts(serving, TENANT)
    assert len(own) == 1
    for other in (replace(TENANT, tenant="other"), ANONYMOUS):
        assert not own & await salts(serving, other)
        assert not await salts(serving, TENANT, cacheSalt="s") & await salts(serving, other, cacheSalt="s")


async def test_operator_may_have_anonymous_callers_share() -> None:
    serving = serving_of({"engine.share_anonymous_prefixes": "true"})
    assert len(await salts(serving, ANONYMOUS)) == 1


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "prompt",
    [{"text": "x" * 1_000_000}, {"text": "é" * 501}, {"chat": {"messages": [{"role": "user", "content": "x" * 501}]}}],
    ids=["long text", "one character too long", "chat"],
)
async def test_text_that_must_be_too_long_is_refused_before_it_is_tokenised(kind: Any, prompt: Any) -> None:
    serving = serving_of()
    serving.tokenizers.chars_per_token = 5
    field = f"prompt.{next(iter(prompt))}"
    assert await refused(serving, request_of(kind, prompt=prompt)) == ("FIELD_INVALID", field)
    assert serving.engine.tokenizer.used == 0


def chat_of(**messages: str) -> dict[str, Any]:
    return {"chat": {"messages": [{"role": role, "content": content} for role, content in messages.items()]}}


async def test_text_that_may_fit_is_tokenised() -> None:
    serving = serving_of()
    serving.tokenizers.chars_per_token = 5
    for prompt in (
        {"text": "x" * 500},
        {
            "chat": {
                "messages": [{"role": "user", "content": " " * 900 + "x"}, {"role": "assistant", "content": "x" * 900}]
            }
        },
    ):
        assert (await prepare(serving, ANONYMOUS, request_of(prompt=prompt))).calls
    serving.tokenizers.chars_per_token = inf
    assert (await prepare(serving, ANONYMOUS, request_of(text="x" * 1_000_000))).calls


async def test_remembered_reports_have_a_budget_in_bytes() -> None:
    serving = serving_of({"limits.max_message_bytes": str(1 << 30)})
    serving.engine.registry = replace(REGISTRY, max_name_chars=1_000_000)
    for number in range(150):
        probe = {"weights": [1.0 + number] * WIDTH, "bias": float(number), "name": "n" * 400_000}
        report = {"features": [{"site": SITE, "row": {"probe": probe}}]}
        request = request_of(report=report)
        first, second = [(await prepare(serving, ANONYMOUS, request)).calls[0].watch for _ in range(2)]
        assert first is second
        assert serving.watched.used <= WATCH_CACHE_BYTES
    kept = sum(len(key) for key in serving.watched.entries if isinstance(key, bytes))
    assert kept <= serving.watched.used <= WATCH_CACHE_BYTES


GUARDED = Binding(
    (policy(guards=[{"name": "g", "score": {"terms": [PROBED]}, "level": 1, "action": "GUARD_ACTION_STOP"}]),)
)


async def test_guarded_answer_leaves_room_for_the_token_that_judges_its_last_one() -> None:
    """The model takes 100 tokens."""
    serving = serving_of()
    assert (await prepare(serving, ANONYMOUS, request_of(sampling={"maxTokens": 97}))).calls
    job = await prepare(serving, ANONYMOUS, request_of(sampling={"maxTokens": 96}), GUARDED)
    assert job.calls[0].sampling.max_tokens == 96
    at_fault = ("FIELD_INVALID", "sampling.max_tokens")
    assert await refused(serving, request_of(sampling={"maxTokens": 97}), GUARDED) == at_fault
    long = request_of(text="a " * 98)
    assert (await prepare(serving, ANONYMOUS, long, GUARDED)).calls[0].sampling.max_tokens == 1
    longer = request_of(text="a " * 99)
    assert (await prepare(serving, ANONYMOUS, longer)).calls[0].sampling.max_tokens == 1
    assert await refused(serving, longer, GUARDED) == ("FIELD_INVALID", "prompt")
    inspected = await prepare(serving, ANONYMOUS, request_of(inference_pb2.InspectRequest, "a " * 99), GUARDED)
    assert inspected.inspects


TRIED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "field": ({"forbiddenFields": ["sampling.n"]}, {"sampling": {"n": 2}}, "POLICY_FORBIDS"),
    "program": ({}, {"steering": {"program": {"sites": [{"site": SITE, "edits": [UP]}]}}}, "POLICY_FORBIDS"),
    "named": ({"locked": [{"site": SITE, "row": latent(5)}]}, {"steering": {"name": "locked"}}, "ROW_LOCKED"),
    "report": ({}, {"report": {"features": [{"site": SITE, "row": PROBE}]}}, "POLICY_FORBIDS"),
    "ids": ({}, {"prompt": {"tokenIds": {"ids": [1, 2]}}}, "POLICY_FORBIDS"),
    "nothing": ({}, {}, ""),
}


@pytest.mark.parametrize("case", TRIED)
async def test_policy_in_shadow_mode_counts_what_it_would_refuse_and_refuses_nothing(case: str) -> None:
    fields, asked, reason = TRIED[case]
    serving, request = serving_of(), request_of(**asked)
    shadow = Binding((policy("shadow", mode="POLICY_MODE_SHADOW", **fields),))
    assert (await prepare(serving, ANONYMOUS, request, shadow)).calls
    (family,) = serving.metrics.values[SHADOW_REFUSALS].collect()
    counted = [(s.labels, s.value) for s in family.samples if s.name.endswith("_total")]
    assert counted == ([({"policy": "shadow", "reason": reason}, 1)] if reason else [])
    if reason:
        assert (await refused(serving, request, Binding((policy(**fields),))))[0] == reason
