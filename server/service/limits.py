"""The one table of limits of a request. Every field of the contract that is a number, a text or a list is in it."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message
from msgspec import structs

from rudder.server import config
from rudder.server.service.errors import Refusal, Violation

# vLLM's default.
DEFAULT_MAX_TOKENS = 16
# Minimum of numbers that must be positive.
MIN_POSITIVE = 1e-6
MAX_SEED = 2**63 - 1
MAX_ROLE_CHARS = 64
ROLE = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_ROLE_CHARS}}}")


@dataclass(frozen=True)
class Bound:
    """Minimum and maximum of a number, or of the length of a list or text. `maximum` may name a field of Limits."""

    field: str
    minimum: float
    maximum: float | str


@dataclass(frozen=True)
class EntryCheck:
    """A check of each entry of a list, or of each (key, value) of a map. `check` returns what is wrong, or None."""

    field: str
    check: Callable[[Any, "Bounds"], str | None]


@dataclass(frozen=True)
class Bounds:
    """The configured limits, with the model's where they are null. `vocab_size`: width of the logits."""

    limits: config.Limits
    vocab_size: int


BOUNDS = (
    Bound("prompt.text", 1, "max_prompt_chars"),
    Bound("prompt.token_ids.ids", 1, "max_prompt_tokens"),
    Bound("prompt.chat.messages", 1, "max_messages"),
    Bound("prompt.chat.template_arguments", 0, "max_prompt_chars"),
    Bound("prompt.truncate_prompt_tokens", 1, "max_prompt_tokens"),
    Bound("sampling.max_tokens", 1, "max_tokens"),
    # vLLM's maximum.
    Bound("sampling.temperature", 0, 2),
    Bound("sampling.top_p", MIN_POSITIVE, 1),
    Bound("sampling.top_k", 0, 2**31 - 1),
    Bound("sampling.min_p", 0, 1),
    Bound("sampling.presence_penalty", -2, 2),
    Bound("sampling.frequency_penalty", -2, 2),
    Bound("sampling.repetition_penalty", MIN_POSITIVE, 100),
    # Room for one seed per choice.
    Bound("sampling.seed", 0, MAX_SEED - 2**16),
    Bound("sampling.stop", 0, "max_stop_strings"),
    Bound("sampling.stop_token_ids", 0, "max_stop_strings"),
    Bound("sampling.logprobs", 0, "max_logprobs"),
    Bound("sampling.prompt_logprobs", 0, "max_prompt_logprobs"),
    Bound("sampling.n", 1, "max_choices"),
    Bound("sampling.logit_bias", 0, "max_logit_bias"),
    Bound("sampling.bad_words", 0, "max_bad_words"),
    Bound("sampling.allowed_token_ids", 0, "max_allowed_token_ids"),
    Bound("sampling.structured.json_schema", 1, "max_structured_chars"),
    Bound("sampling.structured.regex", 1, "max_structured_chars"),
    Bound("sampling.structured.grammar", 1, "max_structured_chars"),
    Bound("sampling.structured.choice.texts", 1, "max_structured_choices"),
    Bound("steering.topic.topic", 1, "max_name_chars"),
    Bound("steering.topic.strength", MIN_POSITIVE, 1),
    Bound("steering.topic.kl", MIN_POSITIVE, 100),
    Bound("report.features", 0, "max_reported_features"),
    Bound("report.sites", 0, "max_reported_features"),
    Bound("report.top_k", 0, "max_top_k"),
    Bound("stream_interval", 0, "max_tokens"),
    Bound("cache_salt", 0, "max_salt_chars"),
    Bound("query", 0, "max_query_chars"),
    Bound("page_size", 0, "max_page_size"),
    Bound("limit", 0, "max_page_size"),
)


def check_token_id(token: int, bounds: Bounds) -> str | None:
    """Require a token id below the width of the logits, which may be less than the tokenizer has."""
    return None if token < bounds.vocab_size else f"token id {token} is not below {bounds.vocab_size}"


def check_stop(text: str, bounds: Bounds) -> str | None:
    """Require a stop string, a bad word or a choice of bounded length; an empty one would match everywhere."""
    maximum = bounds.limits.max_stop_chars
    return None if 1 <= len(text) <= maximum else f"has {len(text)} characters, must have from 1 to {maximum}"


def check_logit_bias(entry: tuple[int, float], bounds: Bounds) -> str | None:
    """Require a valid token id and a bias that vLLM accepts."""
    token, bias = entry
    return check_token_id(token, bounds) or (None if abs(bias) <= 100 else f"{bias:g} is not in [-100, 100]")


def check_message(message: Any, bounds: Bounds) -> str | None:
    """Require a role that is a name, and a content within the limit of prompt text."""
    if not message.role:
        return "has no role"
    # A chat template writes the role beside its own markers.
    if not ROLE.fullmatch(message.role):
        return f"has a role that is not a name of at most {MAX_ROLE_CHARS} letters, digits, - and _"
    maximum = bounds.limits.max_prompt_chars
    return None if len(message.content) <= maximum else f"has {len(message.content)} characters, at most {maximum}"


ENTRY_CHECKS = (
    EntryCheck("prompt.token_ids.ids", check_token_id),
    EntryCheck("prompt.chat.messages", check_message),
    EntryCheck("sampling.stop", check_stop),
    EntryCheck("sampling.stop_token_ids", check_token_id),
    EntryCheck("sampling.logit_bias", check_logit_bias),
    EntryCheck("sampling.bad_words", check_stop),
    EntryCheck("sampling.allowed_token_ids", check_token_id),
    EntryCheck("sampling.structured.choice.texts", check_stop),
)


def bounds_of(limits: config.Limits, max_model_len: int, vocab_size: int) -> Bounds:
    """Return the limits of a server: where they are null, or beyond the model's, those of the model."""
    longest = max_model_len - 1
    prompt, tokens = limits.max_prompt_tokens or longest, limits.max_tokens or longest
    return Bounds(
        structs.replace(limits, max_prompt_tokens=min(prompt, longest), max_tokens=min(tokens, longest)), vocab_size
    )


def check(request: Message, bounds: Bounds) -> None:
    """Check a request against every line of the table whose field it has. Raises one Refusal with all violations."""
    violations = [*out_of_bounds(request, bounds)]
    # Entries of a list that is too long are not checked: that would cost the time that the limit saves.
    too_long = {violation.field for violation in violations}
    for entry_check in (entry_check for entry_check in ENTRY_CHECKS if entry_check.field not in too_long):
        violations += invalid_entries(request, entry_check, bounds)
    violations += conflicts(request)
    if violations:
        first = violations[0]
        raise Refusal("FIELD_INVALID", f"{first.field}: {first.description}", violations)


def out_of_bounds(request: Message, bounds: Bounds) -> Iterator[Violation]:
    """Yield a violation for each field outside its Bound."""
    for bound in BOUNDS:
        value = value_at(request, bound.field)
        if value is None:
            continue
        maximum = getattr(bounds.limits, bound.maximum) if isinstance(bound.maximum, str) else bound.maximum
        number = value if isinstance(value, int | float) else len(value)
        # Written so that NaN is out of bounds.
        if not bound.minimum <= number <= maximum:
            has = f"{number:g}" if number is value else f"has {number} {unit_of(value)},"
            yield Violation(bound.field, f"{has} must be from {bound.minimum:g} to {maximum}")


def unit_of(value: Any) -> str:
    """Return the unit of a value's length."""
    return "characters" if isinstance(value, str) else "entries"


def invalid_entries(request: Message, entry_check: EntryCheck, bounds: Bounds) -> Iterator[Violation]:
    """Yield violations of the entries of a list, by index, or of a map, by key."""
    value = value_at(request, entry_check.field)
    entries: Iterable[tuple[Any, Any]] = enumerate(value or ())
    if isinstance(value, Mapping):
        entries = ((key, (key, item)) for key, item in value.items())
    for key, entry in entries:
        if problem := entry_check.check(entry, bounds):
            yield Violation(f"{entry_check.field}[{key}]", problem)


def conflicts(request: Message) -> Iterator[Violation]:
    """Yield violations of rules between fields, and of oneofs that are not set."""
    names = request.DESCRIPTOR.fields_by_name
    if "prompt" in names and value_at(request, "prompt.prompt") is None:
        yield Violation("prompt", "is empty")
    steering = value_at(request, "steering")
    if steering is not None and steering.WhichOneof("steering") is None:
        yield Violation("steering", "names no program")
    structured = value_at(request, "sampling.structured")
    form = "" if structured is None else structured.WhichOneof("structured")
    if form is None or (form == "json_object" and not structured.json_object):
        yield Violation("sampling.structured", "names no form")
    minimum = value_at(request, "sampling.min_tokens")
    maximum = value_at(request, "sampling.max_tokens") or DEFAULT_MAX_TOKENS
    if minimum is not None and minimum > maximum:
        yield Violation("sampling.min_tokens", f"{minimum} is more than max_tokens, {maximum}")


def value_at(message: Any, path: str) -> Any:
    """Return the value at a dotted path; of a oneof, the name of its member; None if a field on the way is absent."""
    for name in path.split("."):
        descriptor = message.DESCRIPTOR
        if name in descriptor.oneofs_by_name:
            return message.WhichOneof(name)
        field = descriptor.fields_by_name.get(name)
        if field is None or (field.has_presence and not message.HasField(name)):
            return None
        message = getattr(message, name)
    return message
