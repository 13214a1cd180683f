"""Tokenise a prompt: text, token ids or chat messages."""

from typing import Any

from jinja2 import TemplateError

from rudder.sae_models.token_text import token_texts as token_texts
from rudder.server.service.errors import invalid
from rudder.server.service.limits import Bounds
from rudder.v1 import inference_pb2


def prompt_ids(prompt: inference_pb2.Prompt, tokenizer: Any, bounds: Bounds) -> tuple[int, ...]:
    """Return the token ids of a prompt that passed `limits.check`, with one BOS token if the model uses it.

    Raises Refusal FIELD_INVALID: no token, too many, or a chat that the template rejects.
    """
    kind = prompt.WhichOneof("prompt")
    match kind:
        case "text":
            ids = without_double_bos(tokenizer.encode(prompt.text), tokenizer.bos_token_id)
        case "chat":
            ids = chat_ids(prompt.chat, tokenizer)
        case _:
            ids = tuple(prompt.token_ids.ids)
    maximum = bounds.limits.max_prompt_tokens or 0
    if not 1 <= len(ids) <= maximum:
        raise invalid(f"prompt.{kind}", f"has {len(ids)} tokens, must have from 1 to {maximum}")
    return ids


def without_double_bos(ids: list[int], bos: int | None) -> tuple[int, ...]:
    """Drop the BOS token that the tokenizer puts before a text which spells it itself."""
    double = len(ids) > 1 and ids[0] == ids[1] == bos
    return tuple(ids[1:] if double else ids)


def chat_ids(chat: inference_pb2.Chat, tokenizer: Any) -> tuple[int, ...]:
    """Return the ids of the messages in the model's chat template, up to the assistant's turn."""
    if not tokenizer.chat_template:
        raise invalid("prompt.chat", "the model has no chat template")
    messages = [{"role": message.role, "content": message.content} for message in chat.messages]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise invalid("prompt.chat.messages", f"the model's chat template rejects them: {error}") from error
    # The template has written the special tokens, BOS among them.
    return tuple(tokenizer.encode(text, add_special_tokens=False))
