"""The one table of what a request may hold; every field of the contract that can be absurd has a row in it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message
from msgspec.structs import replace

from rudder.server import config
from rudder.server.service.errors import Refusal, Violation

# vLLM's, where a request names none.
DEFAULT_MAX_TOKENS = 16
# Of numbers that must be above 0.
LEAST_POSITIVE = 1e-6
MOST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Bound:
    """Least and most of a number, or of the length of a list or text; `most` may name a field of Limits."""

    field: str
    least: float
    most: float | str


@dataclass(frozen=True)
class Each:
    """A check of each entry of a list, or of each key and value of a map."""

    field: str
    problem: Callable[[Any, "Bounds"], str | None]


@dataclass(frozen=True)
class Bounds:
    """The configured limits with the model's own in place of null, and the width of the logits."""

    limits: config.Limits
    vocab_size: int


BOUNDS = (
    Bound("prompt.text", 1, "max_prompt_chars"),
    Bound("prompt.token_ids.ids", 1, "max_prompt_tokens"),
    Bound("prompt.chat.messages", 1, "max_messages"),
    Bound("sampling.max_tokens", 1, "max_tokens"),
    Bound("sampling.temperature", 0, 100),
    Bound("sampling.top_p", LEAST_POSITIVE, 1),
    Bound("sampling.top_k", 0, 2**31 - 1),
    Bound("sampling.min_p", 0, 1),
    Bound("sampling.presence_penalty", -2, 2),
    Bound("sampling.frequency_penalty", -2, 2),
    Bound("sampling.repetition_penalty", LEAST_POSITIVE, 100),
    # Room for one seed per choice.
    Bound("sampling.seed", 0, MOST_SEED - 2**16),
    Bound("sampling.stop", 0, "max_stop_strings"),
    Bound("sampling.stop_token_ids", 0, "max_stop_strings"),
    Bound("sampling.logprobs", 0, "max_logprobs"),
    Bound("sampling.n", 1, "max_choices"),
    Bound("sampling.logit_bias", 0, "max_logit_bias"),
    Bound("report.features", 0, "max_reported_features"),
    Bound("report.sites", 0, "max_reported_features"),
    Bound("report.top_k", 0, "max_top_k"),
    Bound("stream_interval", 0, "max_tokens"),
    Bound("cache_salt", 0, "max_salt_chars"),
    Bound("query", 0, "max_query_chars"),
    Bound("page_size", 0, "max_page_size"),
    Bound("limit", 0, "max_page_size"),
)


def problem_of_id(token: int, bounds: Bounds) -> str | None:
    """Ids are held to the width of the logits: a tokenizer may know more."""
    return None if token < bounds.vocab_size else f"token id {token} is not below {bounds.vocab_size}"


def problem_of_stop(text: str, bounds: Bounds) -> str | None:
    """An empty stop string would end everything at once."""
    most = bounds.limits.max_stop_chars
    return None if 1 <= len(text) <= most else f"has {len(text)} characters, must have from 1 to {most}"


def problem_of_bias(entry: tuple[int, float], bounds: Bounds) -> str | None:
    """A token id and what is added to its logit."""
    token, bias = entry
    return problem_of_id(token, bounds) or (None if abs(bias) <= 100 else f"{bias:g} is not in [-100, 100]")


def problem_of_message(message: Any, bounds: Bounds) -> str | None:
    """A chat message needs a role; its content counts as prompt text."""
    if not message.role:
        return "has no role"
    most = bounds.limits.max_prompt_chars
    return None if len(message.content) <= most else f"has {len(message.content)} characters, at most {most}"


EACH = (
    Each("prompt.token_ids.ids", problem_of_id),
    Each("prompt.chat.messages", problem_of_message),
    Each("sampling.stop", problem_of_stop),
    Each("sampling.stop_token_ids", problem_of_id),
    Each("sampling.logit_bias", problem_of_bias),
)


def bounds_of(limits: config.Limits, max_model_len: int, vocab_size: int) -> Bounds:
    """The limits of a server: what is not configured is what the model takes."""
    most = max_model_len - 1
    prompt, tokens = limits.max_prompt_tokens or most, limits.max_tokens or most
    return Bounds(replace(limits, max_prompt_tokens=min(prompt, most), max_tokens=min(tokens, most)), vocab_size)


def check(request: Message, bounds: Bounds) -> None:
    """Hold a request to every row of the table that it has the field of. Refusal: all that is wrong."""
    violations = [*out_of_bounds(request, bounds)]
    # A list that is too long is not looked through.
    spoilt = {violation.field for violation in violations}
    for row in (row for row in EACH if row.field not in spoilt):
        violations += bad_entries(request, row, bounds)
    violations += conflicts(request)
    if violations:
        first = violations[0]
        raise Refusal("FIELD_INVALID", f"{first.field}: {first.description}", violations)


def out_of_bounds(request: Message, bounds: Bounds) -> Iterator[Violation]:
    """The rows of BOUNDS that do not hold."""
    for row in BOUNDS:
        value = value_at(request, row.field)
        if value is None:
            continue
        most = getattr(bounds.limits, row.most) if isinstance(row.most, str) else row.most
        number = value if isinstance(value, int | float) else len(value)
        if not row.least <= number <= most:
            has = f"{number:g}" if number is value else f"has {number} {unit_of(value)},"
            yield Violation(row.field, f"{has} must be from {row.least:g} to {most}")


def unit_of(value: Any) -> str:
    """What the length of a value counts."""
    return "characters" if isinstance(value, str) else "entries"


def bad_entries(request: Message, row: Each, bounds: Bounds) -> Iterator[Violation]:
    """Violations of the entries of a list, by index, or of a map, by key."""
    value = value_at(request, row.field)
    entries: Iterable[tuple[Any, Any]] = enumerate(value or ())
    if isinstance(value, Mapping):
        entries = ((key, (key, item)) for key, item in value.items())
    for place, entry in entries:
        if problem := row.problem(entry, bounds):
            yield Violation(f"{row.field}[{place}]", problem)


def conflicts(request: Message) -> Iterator[Violation]:
    """What no field alone shows."""
    names = request.DESCRIPTOR.fields_by_name
    if "prompt" in names and value_at(request, "prompt.prompt") is None:
        yield Violation("prompt", "is empty")
    steering = value_at(request, "steering")
    if steering is not None and steering.WhichOneof("steering") is None:
        yield Violation("steering", "names no program")
    least, most = (
        value_at(request, "sampling.min_tokens"),
        value_at(request, "sampling.max_tokens") or DEFAULT_MAX_TOKENS,
    )
    if least is not None and least > most:
        yield Violation("sampling.min_tokens", f"{least} is more than max_tokens, {most}")


def value_at(message: Any, path: str) -> Any:
    """The value at a dotted path; for a oneof the name of its member; None where anything on the way is absent."""
    for name in path.split("."):
        descriptor = message.DESCRIPTOR
        if name in descriptor.oneofs_by_name:
            return message.WhichOneof(name)
        field = descriptor.fields_by_name.get(name)
        if field is None or (field.has_presence and not message.HasField(name)):
            return None
        message = getattr(message, name)
    return message
