"""Invalid requests get an error that names the field, and the server keeps serving."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from rudder.v1 import inference_pb2, inference_pb2_grpc, program_pb2
from rudder_client import Chat, Client, Feature, Program, Report, RudderError, Structured, Vector
from rudder_client.errors import error_of
from rudder_client.requests import generate_request
from tests.e2e.conftest import Running

pytestmark = pytest.mark.e2e
SITE = "layers.2.resid_post"
NAN = float("nan")


@pytest.fixture(autouse=True)
def keeps_serving(client: Client) -> Iterator[None]:
    yield
    assert len(client.complete("x", max_tokens=2, ignore_eos=True).choices[0].token_ids) == 2


def at() -> Program:
    return Program().at(SITE)


REFUSED: list[tuple[Any, dict[str, Any], str, str, str]] = [
    ("", {}, "INVALID_ARGUMENT", "FIELD_INVALID", "prompt.text"),
    ("x", {"max_tokens": 2_000_000_000}, "INVALID_ARGUMENT", "FIELD_INVALID", "sampling.max_tokens"),
    ("x", {"max_tokens": 0}, "INVALID_ARGUMENT", "FIELD_INVALID", "sampling.max_tokens"),
    ("x", {"max_tokens": 1023}, "INVALID_ARGUMENT", "FIELD_INVALID", "sampling.max_tokens"),
    ("x", {"temperature": NAN}, "INVALID_ARGUMENT", "FIELD_INVALID", "sampling.temperature"),
    ("x", {"n": 10_000}, "INVALID_ARGUMENT", "FIELD_INVALID", "sampling.n"),
    ("x", {"stop": ["y"] * 1000}, "INVALID_ARGUMENT", "FIELD_INVALID", "sampling.stop"),
    ("x", {"logit_bias": {2**31: 1.0}}, "INVALID_ARGUMENT", "FIELD_INVALID", f"sampling.logit_bias[{2**31}]"),
    ("x", {"logprobs": 10**9}, "INVALID_ARGUMENT", "FIELD_INVALID", "sampling.logprobs"),
    ("x", {"cache_salt": "s" * 129}, "INVALID_ARGUMENT", "FIELD_INVALID", "cache_salt"),
    ("x", {"stream_interval": 2**31}, "INVALID_ARGUMENT", "FIELD_INVALID", "stream_interval"),
    ("word " * 3000, {}, "INVALID_ARGUMENT", "FIELD_INVALID", "prompt.text"),
    ("x" * 1_000_001, {}, "INVALID_ARGUMENT", "FIELD_INVALID", "prompt.text"),
    ("x", {"steer": "no such program"}, "NOT_FOUND", "PROGRAM_UNKNOWN", "steering.name"),
    ("x", {"steer": Program()}, "INVALID_ARGUMENT", "FIELD_INVALID", "steering.program.sites"),
    (
        "x",
        {"steer": at().ablate(10**6)},
        "NOT_FOUND",
        "FEATURE_UNKNOWN",
        "steering.program.sites[0].edits[0].row.feature.index",
    ),
    (
        "x",
        {"steer": at().ablate(Feature(1, "other"))},
        "NOT_FOUND",
        "FEATURE_UNKNOWN",
        "steering.program.sites[0].edits[0].row.feature.bundle",
    ),
    (
        "x",
        {"steer": Program().at("layers.99.resid_post").ablate(1)},
        "NOT_FOUND",
        "SITE_UNKNOWN",
        "steering.program.sites[0].site",
    ),
    (
        "x",
        {"steer": at().set(feature=1, to=NAN)},
        "INVALID_ARGUMENT",
        "FIELD_INVALID",
        "steering.program.sites[0].edits[0].set",
    ),
    (
        "x",
        {"steer": at().add(vector=[1.0, 2.0])},
        "INVALID_ARGUMENT",
        "FIELD_INVALID",
        "steering.program.sites[0].edits[0].row.vector.values",
    ),
    ("x", {"temperature": 2.5}, "INVALID_ARGUMENT", "FIELD_INVALID", "sampling.temperature"),
    ([5] * 1019, {"min_tokens": 10}, "INVALID_ARGUMENT", "FIELD_INVALID", "sampling.min_tokens"),
    ("x", {"allowed_token_ids": [8192]}, "INVALID_ARGUMENT", "FIELD_INVALID", "sampling.allowed_token_ids[0]"),
    ("x", {"bad_words": ["w"] * 65}, "INVALID_ARGUMENT", "FIELD_INVALID", "sampling.bad_words"),
    (
        "x",
        {"bad_words": ["zqxj" * 64 + str(i) for i in range(60)]},
        "INVALID_ARGUMENT",
        "FIELD_INVALID",
        "sampling.bad_words[0]",
    ),
    (
        "x",
        {"bad_words": ["zqxj" * 60 + str(i) for i in range(60)]},
        "INVALID_ARGUMENT",
        "FIELD_INVALID",
        "sampling.bad_words",
    ),
    ("x", {"structured": Structured(regex="(")}, "INVALID_ARGUMENT", "FIELD_INVALID", "sampling.structured"),
    ("x", {"structured": Structured(json_schema="{")}, "INVALID_ARGUMENT", "FIELD_INVALID", "sampling.structured"),
    ("x", {"structured": Structured(grammar="no grammar")}, "INVALID_ARGUMENT", "FIELD_INVALID", "sampling.structured"),
    (
        "x",
        {"structured": Structured(json_schema={"$ref": "#/nowhere"})},
        "INVALID_ARGUMENT",
        "FIELD_INVALID",
        "sampling.structured",
    ),
    (
        "x",
        {"structured": Structured(regex="a" * 20_000)},
        "INVALID_ARGUMENT",
        "FIELD_INVALID",
        "sampling.structured.regex",
    ),
    (
        Chat([{"role": "user", "content": "x"}], {"nothing": 1}),
        {},
        "INVALID_ARGUMENT",
        "FIELD_INVALID",
        "prompt.chat.template_arguments",
    ),
    (
        Chat([{"role": "user", "content": "x"}], {"chat_template": "y"}),
        {},
        "INVALID_ARGUMENT",
        "FIELD_INVALID",
        "prompt.chat.template_arguments",
    ),
    (
        "x",
        {"steer": at().add(vector=Vector([1.0] * 192, name="n" * 129), value=1.0)},
        "INVALID_ARGUMENT",
        "FIELD_INVALID",
        "steering.program.sites[0].edits[0].row.vector.name",
    ),
    ("x", {"steer": "n" * 1_000_000}, "NOT_FOUND", "PROGRAM_UNKNOWN", "steering.name"),
    ("x", {"report": Report(top_k=65)}, "INVALID_ARGUMENT", "FIELD_INVALID", "report.top_k"),
    ("x", {"report": Report(top_k=1, sites=["nowhere"])}, "NOT_FOUND", "SITE_UNKNOWN", "report.sites[0]"),
    (
        "x",
        {"report": Report(features={SITE: [0, 10**6]})},
        "NOT_FOUND",
        "FEATURE_UNKNOWN",
        "report.features[1].row.feature.index",
    ),
    ("x", {"report": Report(features={"nowhere": [0]})}, "NOT_FOUND", "SITE_UNKNOWN", "report.features[0].site"),
]


@pytest.mark.parametrize(("prompt", "arguments", "code", "reason", "field"), REFUSED, ids=lambda value: str(value)[:40])
def test_refusal_names_the_field(
    client: Client, prompt: Any, arguments: dict[str, Any], code: str, reason: str, field: str
) -> None:
    methods: list[Callable[..., Any]] = [lambda *a, **k: list(client.generate(*a, **k))]
    if "stream_interval" not in arguments:
        methods.append(client.complete)
    for method in methods:
        with pytest.raises(RudderError) as caught:
            method(prompt, **arguments)
        error = caught.value
        assert (error.code, error.reason, error.violations[0].field) == (code, reason, field)
        assert error.metadata["request_id"]


def edits(number: int) -> program_pb2.Program:
    row = program_pb2.Row(feature=program_pb2.Feature(index=1))
    return program_pb2.Program(
        sites=[program_pb2.SiteEdits(site=SITE, edits=[program_pb2.Edit(row=row, ablate=True)] * number)]
    )


@pytest.mark.parametrize(
    ("number", "code", "reason"),
    [
        (257, "INVALID_ARGUMENT", "FIELD_INVALID"),
        (300_000, "INVALID_ARGUMENT", "FIELD_INVALID"),
        (10**6, "RESOURCE_EXHAUSTED", ""),
    ],
)
def test_too_many_edits(client: Client, number: int, code: str, reason: str) -> None:
    with pytest.raises(RudderError) as caught:
        client.complete("x", steer=edits(number))
    assert (caught.value.code, caught.value.reason) == (code, reason)


def test_message_above_the_size_limit_is_refused(client: Client) -> None:
    with pytest.raises(RudderError) as caught:
        client.complete("x" * (5 << 20))
    assert (caught.value.code, caught.value.reason) == ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE")
    assert caught.value.metadata["request_id"]
    with pytest.raises(RudderError) as caught:
        client.complete("x" * (9 << 20))
    assert caught.value.code == "RESOURCE_EXHAUSTED"


def test_malformed_message_is_refused_with_a_reason(client: Client) -> None:
    call = client.channel.unary_unary("/rudder.v1.InferenceService/Complete", lambda b: b, lambda b: b)
    with pytest.raises(grpc.RpcError) as caught:
        call(b"\xff\xff\xff not a message", timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error_of(caught.value).reason == "FIELD_INVALID"


def test_empty_requests_and_empty_parts_are_refused(client: Client) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(client.channel)
    for request, field in (
        (inference_pb2.CompleteRequest(), "prompt"),
        (inference_pb2.CompleteRequest(prompt=inference_pb2.Prompt(chat=inference_pb2.Chat())), "prompt.chat.messages"),
        (
            inference_pb2.CompleteRequest(prompt=inference_pb2.Prompt(token_ids=inference_pb2.TokenIds())),
            "prompt.token_ids.ids",
        ),
        (
            inference_pb2.CompleteRequest(prompt=inference_pb2.Prompt(text="x"), steering=inference_pb2.Steering()),
            "steering",
        ),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            stub.Complete(request, timeout=10)
        assert error_of(caught.value).violations[0].field == field


def test_token_ids_beyond_the_logits_are_refused(client: Client) -> None:
    with pytest.raises(RudderError) as caught:
        client.complete([1, 8192])
    assert caught.value.violations[0].field == "prompt.token_ids.ids[1]"


def test_a_thousand_violations_fit_the_trailer(client: Client) -> None:
    with pytest.raises(RudderError) as caught:
        client.complete([10**6] * 1000)
    assert len(caught.value.violations) == 16
    assert caught.value.metadata["violations"] == "1000"


def test_refusals_are_counted_by_reason(client: Client, server: Running) -> None:
    labels = {"method": "InferenceService.Complete", "outcome": "PROGRAM_UNKNOWN"}
    before = server.metric("rudder_requests_total", **labels)
    with pytest.raises(RudderError):
        client.complete("x", steer="no such program")
    assert server.metric("rudder_requests_total", **labels) == before + 1


def test_cache_salts_and_programs_separate_the_prefix_cache(client: Client) -> None:
    prompt = (
        "The cells of the body are made of many kinds of proteins and of water and of many other small molecules. " * 12
    )

    def cached(**arguments: Any) -> int:
        usage = client.complete(prompt, max_tokens=1, **arguments).choices[0].usage
        assert usage is not None
        return usage.cached_tokens

    cached(cache_salt="one")
    assert cached(cache_salt="one") > 0
    assert cached(cache_salt="two") == 0
    program = at().set(feature=7, to=1.0, phase="generated")
    assert cached(cache_salt="one", steer=program) == 0
    assert cached(cache_salt="one", steer=program) > 0


def test_prefix_cache_tells_an_anonymous_caller_nothing_of_others(client: Client, server: Running) -> None:
    secret = "The account of the patient of the clinic of the city of the river of the north is closed for now. " * 12
    wrong = secret.replace("patient", "teacher")
    client.complete(secret, max_tokens=1)
    with Client(server.address, timeout=60) as other:
        counts = set()
        for guess in (secret, wrong, secret):
            choice = other.complete(guess, max_tokens=1).choices[0]
            assert choice.usage is not None
            assert choice.attestation is not None
            counts.add((choice.usage.cached_tokens, choice.attestation.tokens_seen == choice.usage.prompt_tokens))
    assert counts == {(0, True)}


def test_inspect_has_a_prefix_cache_of_its_own(client: Client) -> None:
    prompt = "The leaves of the trees of the forest are made of many kinds of cells and of water. " * 12
    client.inspect(prompt, cache_salt="one")

    def cached(salt: str) -> int:
        usage = client.complete(prompt, max_tokens=1, cache_salt=salt).choices[0].usage
        assert usage is not None
        return usage.cached_tokens

    assert cached("two") == 0
    assert cached("one") > 0
    with pytest.raises(RudderError) as caught:
        client.inspect(prompt, cache_salt="s" * 129)
    assert caught.value.violations[0].field == "cache_salt"


def test_choices_beyond_the_queue_are_refused_with_a_time_to_retry(client: Client, server: Running) -> None:
    # The engine runs 128 choices, and 100 may wait.
    with ThreadPoolExecutor(20) as threads:
        calls = [threads.submit(client.complete, "x", n=16, max_tokens=200, ignore_eos=True) for _ in range(20)]
        queued = 0.0
        while not all(call.done() for call in calls):
            queued = max(queued, server.metric("rudder_queue_requests"))
            time.sleep(0.05)
        refused = [error for error in (call.exception() for call in calls) if error is not None]
    assert 0 < queued <= 100
    assert 0 < len(refused) <= 20 - (128 + 100) // 16 + 1
    for error in refused:
        assert isinstance(error, RudderError)
        assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
        assert (error.retry_after or 0) >= 1
    server.wait_idle(30)


def test_generate_refuses_before_its_first_message(client: Client) -> None:
    stub = inference_pb2_grpc.InferenceServiceStub(client.channel)
    call = stub.Generate(generate_request("x", "no such program", None, "", 0, {}))
    with pytest.raises(grpc.RpcError):
        next(call)
    assert error_of(call).reason == "PROGRAM_UNKNOWN"
