"""From a request to its calls: what a policy forbids, whose prefix cache is read, and what is refused untokenised."""

from dataclasses import replace
from math import inf
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf import json_format

from rudder.server import config as configuration
from rudder.server.caller import ANONYMOUS, Caller
from rudder.server.engine.call import Call, salt
from rudder.server.monitoring.metrics import Metrics
from rudder.server.program.compile import compile_program
from rudder.server.program.named import NamedProgram
from rudder.server.service.errors import Refusal, refusal_of
from rudder.server.service.prepare import prepare
from rudder.server.service.serving import WATCH_CACHE_BYTES, Serving
from rudder.v1 import inference_pb2, program_pb2
from tests.unit.programs import OTHER, REGISTRY, SITE, feature
from tests.unit.reference import WIDTH

UP = {"row": {"vector": {"values": [1.0] * WIDTH}}, "add": 1.0}
TENANT = Caller("alice", "acme", ANONYMOUS.roles)
KINDS = (inference_pb2.GenerateRequest, inference_pb2.CompleteRequest, inference_pb2.InspectRequest)


class OneTokenPerWord:
    """A tokenizer that counts how often it is used."""

    bos_token_id, chat_template = None, "{{ messages }}"
    used = 0

    def __deepcopy__(self, _: Any) -> "OneTokenPerWord":
        return self

    def encode(self, text: str, **_: Any) -> list[int]:
        self.used += 1
        return [1] * len(text.split())

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return " ".join(message["content"] for message in messages)


def named(*edits: dict[str, Any], site: str = SITE) -> NamedProgram:
    message = json_format.ParseDict({"sites": [{"site": site, "edits": list(edits)}]}, program_pb2.Program())
    return NamedProgram(message, compile_program(message, REGISTRY))


def serving_of(policy: NamedProgram | None = None, overrides: dict[str, str] | None = None) -> Serving:
    engine: Any = SimpleNamespace(
        model=SimpleNamespace(name="m", max_model_len=100, vocab_size=1000, bos_token_id=None),
        bundles={}, policies={}, registry=REGISTRY, tokenizer=OneTokenPerWord(), epoch="e1", healthy=True,
        programs={"late": named(UP, site=OTHER), "locked": named({"row": feature(5), "ablate": True}), "ok": named(UP)},
        default_policy=policy.compiled if policy else None,
    )  # fmt: skip
    return Serving.around(engine, configuration.load(None, overrides), Metrics.create())


def request_of(kind: Any = inference_pb2.CompleteRequest, text: str = "a b c", **fields: Any) -> Any:
    return json_format.ParseDict({"prompt": {"text": text}} | fields, kind())


async def refused(serving: Serving, request: Any) -> tuple[str, str]:
    """Return reason and field of the refusal of a request."""
    with pytest.raises(Exception) as caught:  # noqa: PT011
        await prepare(serving, ANONYMOUS, request)
    refusal: Refusal = refusal_of(caught.value)
    return refusal.reason, refusal.violations[0].field


POLICY = named({"row": feature(5), "set": 3.0})
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
    assert await refused(serving_of(POLICY), request_of(kind, steering=steering)) == (reason, field)
    assert (await prepare(serving_of(), ANONYMOUS, request_of(kind, steering=steering))).calls


async def test_operator_may_allow_later_edits_but_rows_stay_locked() -> None:
    serving = serving_of(POLICY, {"policies.allow_later_edits": "true"})
    job = await prepare(serving, ANONYMOUS, request_of(steering={"name": "late"}))
    assert job.program_digest == serving.engine.programs["late"].compiled.digest
    assert (await refused(serving, request_of(steering={"name": "locked"})))[0] == "ROW_LOCKED"


async def test_bound_caller_may_run_what_does_not_touch_the_policy() -> None:
    job = await prepare(serving_of(POLICY), ANONYMOUS, request_of(steering={"name": "ok"}))
    assert (job.program_digest, job.policy_digest) == (named(UP).compiled.digest, POLICY.compiled.digest)


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
    serving = serving_of(None, {"engine.share_anonymous_prefixes": "true"})
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
    serving = serving_of(None, {"limits.max_message_bytes": str(1 << 30)})
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
