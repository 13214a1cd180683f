"""Tokenise a prompt: text, token ids or chat messages."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import meta
from transformers.utils.chat_template_utils import _compile_jinja_template

from rudder.sae_models.token_text import token_texts as token_texts
from rudder.sae_models.tokens import SpecialTokenError, TextEncoder, text_encoder
from rudder.server import config
from rudder.server.service.errors import Refusal, invalid
from rudder.server.service.limits import Bounds
from rudder.v1 import inference_pb2

DEFAULT_RULES = config.Prompt()
# Variables of chat templates that other fields set, and functions.
OWN_VARIABLES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize",
     "raise_exception", "strftime_now", "range", "namespace", "dict", "lipsum", "cycler", "joiner"}
)  # fmt: skip


def prompt_ids(
    prompt: inference_pb2.Prompt, tokenizer: Any, bounds: Bounds, rules: config.Prompt = DEFAULT_RULES
) -> tuple[int, ...]:
    """Return the token ids of a prompt that passed `limits.check`.

    A text begins as the tokenizer begins it; a chat is what its template writes; token ids are taken as they are. Text
    of the client never becomes a special token. Raises Refusal FIELD_INVALID: no token, too many, a special token that
    is spelled where the rules or the tokenizer do not allow it, or a chat that the template rejects.
    """
    return read_ids(prompt, tokenizer, bounds, rules).ids


class ReadIds(NamedTuple):
    """The token ids of a prompt that the model reads. `cut`: there were others before them."""

    ids: tuple[int, ...]
    cut: bool


def read_ids(
    prompt: inference_pb2.Prompt, tokenizer: Any, bounds: Bounds, rules: config.Prompt = DEFAULT_RULES
) -> ReadIds:
    """Implement `prompt_ids`."""
    kind = prompt.WhichOneof("prompt")
    match kind:
        case "text":
            whole = text_ids(prompt.text, text_encoder(tokenizer), rules)
        case "chat":
            whole = chat_ids(prompt.chat, text_encoder(tokenizer), rules)
        case _:
            whole = tuple(prompt.token_ids.ids)
    ids = whole[-prompt.truncate_prompt_tokens :] if prompt.HasField("truncate_prompt_tokens") else whole
    maximum = bounds.limits.max_prompt_tokens or 0
    if not 1 <= len(ids) <= maximum:
        raise invalid(f"prompt.{kind}", f"has {len(ids)} tokens, must have from 1 to {maximum}")
    return ReadIds(ids, len(ids) < len(whole))


def written_ids(ids: Sequence[int], tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that the tokenizer writes for the text of these, a BOS token in front aside; none if it cannot."""
    bos = tuple(ids[:1]) if ids[:1] == (tokenizer.bos_token_id,) else ()
    text = tokenizer.decode(ids[len(bos) :], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    try:
        return (*bos, *text_encoder(tokenizer).encode(text))
    except SpecialTokenError:
        return ()


def text_ids(text: str, encoder: TextEncoder, rules: config.Prompt) -> tuple[int, ...]:
    """Return the ids of a text, with the BOS token if the tokenizer adds one, whether or not the text spells it."""
    if rules.special_tokens == "refuse":
        require_no_special_token("prompt.text", encoder.without_bos(text), encoder)
    try:
        return tuple(encoder.encode_prompt(text))
    except SpecialTokenError as error:
        raise invalid("prompt.text", f"{error}, which this tokenizer cannot encode as text") from error


def chat_ids(chat: inference_pb2.Chat, encoder: TextEncoder, rules: config.Prompt) -> tuple[int, ...]:
    """Return the ids of the messages in the model's chat template, up to the assistant's turn or its last message."""
    if not encoder.tokenizer.chat_template:
        raise invalid("prompt.chat", "the model has no chat template")
    if rules.special_tokens == "refuse":
        for i, message in enumerate(chat.messages):
            require_no_special_token(f"prompt.chat.messages[{i}].content", message.content, encoder)
    messages = [{"role": message.role, "content": message.content} for message in chat.messages]
    arguments = template_arguments(chat.template_arguments, encoder, rules)
    final = chat.continue_final_message
    try:
        ids = encoder.encode_chat(messages, arguments, add_generation_prompt=not final, continue_final_message=final)
        return tuple(ids)
    except SpecialTokenError as error:
        raise invalid("prompt.chat.messages", f"{error}, which cannot be encoded as text here") from error
    # A template is a program that runs on the client's messages: whatever it raises, they are the reason.
    except Exception as error:
        raise template_refusal(error) from error


def template_arguments(text: str, encoder: TextEncoder, rules: config.Prompt) -> dict[str, Any]:
    """Return the variables that a client sets in the chat template. Raises Refusal if they are not the template's."""
    field = "prompt.chat.template_arguments"
    if not text:
        return {}
    if rules.special_tokens == "refuse":
        require_no_special_token(field, text, encoder)
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid(field, "is not JSON") from error
    if not isinstance(arguments, dict):
        raise invalid(field, "is not a JSON object")
    known = template_variables(encoder.tokenizer.get_chat_template()) - OWN_VARIABLES
    known -= encoder.tokenizer.special_tokens_map.keys()
    if unknown := sorted(arguments.keys() - known):
        raise invalid(
            field, f"the chat template has no variable {unknown[0]!r}, but {', '.join(sorted(known)) or 'none'}"
        )
    return arguments


@lru_cache(maxsize=8)
def template_variables(template: str) -> frozenset[str]:
    """Return the names of the variables that a chat template reads and does not set."""
    environment = _compile_jinja_template(template).environment
    return frozenset(meta.find_undeclared_variables(environment.parse(template)))


def template_refusal(error: Exception) -> Refusal:
    """Return the refusal of a chat that the template rejects."""
    return invalid("prompt.chat.messages", f"the model's chat template rejects them: {error or type(error).__name__}")


def require_no_special_token(field: str, text: str, encoder: TextEncoder) -> None:
    """Raise Refusal if a text spells a special token."""
    if token := encoder.find(text):
        raise invalid(field, f"spells the special token {token!r}")
