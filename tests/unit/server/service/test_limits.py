"""The table of limits: at the limit, one above, absurd values; and no field of the contract without a limit."""

from collections.abc import Iterator
from typing import Any

import pytest

from rudder.server import config
from rudder.server.engine.adapter import check_limits
from rudder.server.service import limits
from rudder.server.service.errors import Refusal
from rudder.server.service.limits import BOUNDS, Bound, bounds_of
from rudder.server.service.sampling import sampling_of
from rudder.v1 import catalogue_pb2, inference_pb2

BOUNDED = bounds_of(
    config.Limits(
        max_prompt_chars=50, max_messages=3, max_choices=4, max_stop_strings=2, max_stop_chars=5, max_logit_bias=3,
        max_logprobs=6, max_prompt_logprobs=5,
        max_bad_words=4, max_allowed_token_ids=5, max_structured_chars=12, max_structured_choices=3,
        max_reported_features=7, max_top_k=8, max_salt_chars=9, max_page_size=10, max_query_chars=11,
    ),
    max_model_len=101,
    vocab_size=1000,
)  # fmt: skip
REQUESTS = (
    inference_pb2.GenerateRequest,
    catalogue_pb2.FeatureServiceListRequest,
    catalogue_pb2.FeatureServiceSearchRequest,
)


def request_with(path: str, value: object) -> Any:
    """Return a request that is otherwise valid, with `value` at `path`."""
    top = path.split(".")[0]
    kind = next(kind for kind in REQUESTS if top in kind.DESCRIPTOR.fields_by_name)
    request: Any = kind()
    if kind is inference_pb2.GenerateRequest:
        request.prompt.text = "x"
    if path.startswith("steering.topic."):
        request.steering.topic.topic = "x"
    if path == "prompt.chat.template_arguments":
        request.prompt.chat.messages.add(role="user", content="x")
    *parents, last = path.split(".")
    target = request
    for name in parents:
        target = getattr(target, name)
    current = getattr(target, last)
    if isinstance(current, str | int | float):
        setattr(target, last, value)
    elif hasattr(current, "update"):
        current.update(value)
    else:
        current.extend(value)
    return request


def value_of_size(bound: Bound, size: int) -> object:
    """Return a value of `size`: the number, or a text, list or map of that length."""
    match bound.field:
        case (
            "prompt.text" | "cache_salt" | "query" | "prompt.chat.template_arguments"
            | "steering.topic.topic"
            | "sampling.structured.json_schema" | "sampling.structured.regex" | "sampling.structured.grammar"
        ):  # fmt: skip
            return "x" * size
        case "prompt.token_ids.ids" | "sampling.stop_token_ids" | "sampling.allowed_token_ids":
            return [1] * size
        case "prompt.chat.messages":
            return [inference_pb2.ChatMessage(role="user", content="x")] * size
        case "sampling.stop" | "report.sites" | "sampling.bad_words" | "sampling.structured.choice.texts":
            return ["x"] * size
        case "sampling.logit_bias":
            return dict.fromkeys(range(size), 1.0)
        case "report.features":
            return [inference_pb2.SiteFeature(site="s")] * size
    return size


def violations(request: Any) -> list[str]:
    """Return the fields that the table refuses."""
    try:
        limits.check(request, BOUNDED)
    except Refusal as refusal:
        return [violation.field for violation in refusal.violations if refusal.reason == "FIELD_INVALID"]
    return []


def maximum_of(bound: Bound) -> int:
    return int(getattr(BOUNDED.limits, bound.maximum) if isinstance(bound.maximum, str) else bound.maximum)


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: bound.field)
def test_value_at_the_limit_is_accepted(bound: Bound) -> None:
    assert violations(request_with(bound.field, value_of_size(bound, maximum_of(bound)))) == []


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: bound.field)
def test_value_above_the_limit_is_refused_by_name(bound: Bound) -> None:
    assert violations(request_with(bound.field, value_of_size(bound, maximum_of(bound) + 1))) == [bound.field]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("sampling.max_tokens", 2_000_000_000),
        ("sampling.max_tokens", 0),
        ("sampling.n", 2**32 - 1),
        ("sampling.temperature", float("nan")),
        ("sampling.temperature", float("inf")),
        ("sampling.temperature", -0.1),
        ("sampling.top_p", 0.0),
        ("sampling.top_p", float("nan")),
        ("sampling.repetition_penalty", 0.0),
        ("sampling.presence_penalty", float("-inf")),
        ("sampling.seed", 2**64 - 1),
        ("report.top_k", 2**32 - 1),
        ("page_size", 2**32 - 1),
    ],
)
def test_absurd_numbers_are_refused(path: str, value: float) -> None:
    assert violations(request_with(path, value)) == [path]


def test_entries_of_too_long_lists_are_not_checked() -> None:
    assert violations(request_with("prompt.token_ids.ids", [2**32 - 1] * 500_000)) == ["prompt.token_ids.ids"]


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("prompt.token_ids.ids", [5, 1000], "prompt.token_ids.ids[1]"),
        ("sampling.stop_token_ids", [1000], "sampling.stop_token_ids[0]"),
        ("sampling.stop", ["ok", ""], "sampling.stop[1]"),
        ("sampling.stop", ["123456"], "sampling.stop[0]"),
        ("sampling.allowed_token_ids", [5, 1000], "sampling.allowed_token_ids[1]"),
        ("sampling.bad_words", ["ok", ""], "sampling.bad_words[1]"),
        ("sampling.bad_words", ["123456"], "sampling.bad_words[0]"),
        ("sampling.structured.choice.texts", ["", "x"], "sampling.structured.choice.texts[0]"),
        ("sampling.logit_bias", {1000: 1.0}, "sampling.logit_bias[1000]"),
        ("sampling.logit_bias", {7: float("nan")}, "sampling.logit_bias[7]"),
        ("sampling.logit_bias", {7: 101.0}, "sampling.logit_bias[7]"),
        ("prompt.chat.messages", [inference_pb2.ChatMessage(content="x")], "prompt.chat.messages[0]"),
        ("prompt.chat.messages", [inference_pb2.ChatMessage(role="u", content="x" * 51)], "prompt.chat.messages[0]"),
    ],
)
def test_invalid_entries_are_named_by_index_or_key(path: str, value: object, field: str) -> None:
    assert violations(request_with(path, value)) == [field]


def test_conflicts_between_fields_are_refused() -> None:
    assert violations(inference_pb2.GenerateRequest()) == ["prompt"]
    empty = inference_pb2.GenerateRequest(prompt=inference_pb2.Prompt(text="x"), steering=inference_pb2.Steering())
    assert violations(empty) == ["steering"]
    assert violations(request_with("sampling.min_tokens", 17)) == ["sampling.min_tokens"]
    assert violations(request_with("sampling.min_tokens", 16)) == []
    assert violations(request_with("sampling.min_tokens", 2**32 - 1)) == ["sampling.min_tokens"]


def test_structured_output_without_a_form_is_refused() -> None:
    request = request_with("sampling.max_tokens", 5)
    request.sampling.structured.SetInParent()
    assert violations(request) == ["sampling.structured"]
    request.sampling.structured.json_object = False
    assert violations(request) == ["sampling.structured"]
    request.sampling.structured.json_object = True
    assert violations(request) == []


@pytest.mark.parametrize("bound", [b for b in BOUNDS if b.field.startswith("sampling.")], ids=lambda b: b.field)
def test_sampling_at_each_limit_is_accepted_by_vllm(bound: Bound) -> None:
    """What the table accepts never fails in vLLM's own checks, as 3 for the temperature did."""
    for size in (max(bound.minimum, 0), maximum_of(bound)):
        is_number = bound.field.rpartition(".")[2] in sampling_numbers()
        value = value_of_size(bound, size if is_number else int(size))  # type: ignore[arg-type]
        request = request_with(bound.field, value)
        if violations(request) == []:
            sampling_of(request.sampling, 0, 0)


def sampling_numbers() -> set[str]:
    """Return the names of the fields of Sampling that hold one number each."""
    fields = inference_pb2.Sampling.DESCRIPTOR.fields
    return {field.name for field in fields if not field.is_repeated and field.message_type is None}


@pytest.mark.parametrize(
    "configured",
    [
        {"max_logprobs": 21},
        {"max_logit_bias": 1025},
        {"max_stop_strings": 129},
        {"max_bad_words": 65},
        {"max_allowed_token_ids": 1025},
    ],
    ids=str,
)
def test_limits_above_those_of_vllm_are_refused_at_the_start(configured: dict[str, int]) -> None:
    with pytest.raises(config.ConfigError, match=f"limits.{next(iter(configured))}"):
        check_limits(config.Limits(**configured))
    within = {name: value - 1 for name, value in configured.items()}
    check_limits(config.Limits(**within))


def test_eos_tokens_count_among_the_stop_token_ids() -> None:
    with pytest.raises(config.ConfigError, match=r"limits\.max_stop_strings"):
        check_limits(config.Limits(max_stop_strings=128), eos_tokens=2)


def test_every_limit_is_published() -> None:
    published = set(catalogue_pb2.Limits.DESCRIPTOR.fields_by_name)
    assert set(config.Limits.__struct_fields__) <= published
    every = {bound.maximum for bound in BOUNDS if isinstance(bound.maximum, str)}
    assert every <= published


def test_all_violations_are_reported_at_once() -> None:
    request = request_with("sampling.max_tokens", 0)
    request.sampling.top_p = 3
    request.sampling.stop.append("")
    assert violations(request) == ["sampling.max_tokens", "sampling.top_p", "sampling.stop[0]"]


def leaves(message: Any, prefix: str = "") -> Iterator[str]:
    """Yield every list, text and number of a request, except those of a program, which the compiler checks."""
    for field in message.fields:
        path = f"{prefix}{field.name}"
        entry = field.message_type
        if field.is_repeated or entry is None:
            if field.type not in (field.TYPE_BOOL, field.TYPE_ENUM):
                yield path
        elif not entry.file.name.endswith("program.proto"):
            yield from leaves(entry, f"{path}.")


def test_every_field_of_a_request_is_bounded() -> None:
    # Checked against max_tokens, the served programs, the served bundles, and by list_features.
    elsewhere = {"sampling.min_tokens", "steering.name", "bundle", "page_token"}
    fields = {path for kind in REQUESTS for path in leaves(kind.DESCRIPTOR)} - elsewhere
    assert fields == {bound.field for bound in BOUNDS}


def test_limits_default_to_those_of_the_model() -> None:
    model_limits = bounds_of(config.Limits(), max_model_len=101, vocab_size=1000).limits
    assert (model_limits.max_prompt_tokens, model_limits.max_tokens) == (100, 100)
    model_limits = bounds_of(
        config.Limits(max_prompt_tokens=10**9, max_tokens=5), max_model_len=101, vocab_size=1000
    ).limits
    assert (model_limits.max_prompt_tokens, model_limits.max_tokens) == (100, 5)


def test_sampling_fields_are_passed_to_vllm() -> None:
    sampling = inference_pb2.Sampling(
        max_tokens=9, min_tokens=2, temperature=0.5, top_p=0.25, top_k=3, min_p=0.125, presence_penalty=0.5,
        frequency_penalty=0.75, repetition_penalty=1.5, seed=40, stop=["a"], stop_token_ids=[4], ignore_eos=True,
        include_stop=True, logprobs=2, logit_bias={6: 1.5},
    )  # fmt: skip
    params = sampling_of(sampling, choice=2, stream_interval=5)
    values = {f.name: value for f, value in sampling.ListFields()}
    for name in set(values) - {"seed", "include_stop", "logit_bias", "stop", "stop_token_ids"}:
        assert getattr(params, name) == values[name], name
    assert (params.seed, params.stop, params.stop_token_ids) == (42, ["a"], [4])
    assert params.include_stop_str_in_output
    assert params.logit_bias == {6: 1.5}
    assert params.stream_interval == 5


def test_unset_sampling_is_vllm_s_default() -> None:
    from vllm import SamplingParams

    assert sampling_of(inference_pb2.Sampling(), 0, 0) == SamplingParams()
    assert SamplingParams().max_tokens == limits.DEFAULT_MAX_TOKENS
