"""Encode text of others: a special token that a document, prompt or chat message spells stays text.

A tokenizer matches its added tokens in any text, so whoever writes `<|im_end|>` into a message ends the turn. Here only
what the tokenizer or the chat template itself writes becomes a control token.
"""

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import accumulate
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer

from rudder.sae_models.errors import UserError

# Roles that a template may join to a control token, as in '<|' + role + '|>'.
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
# Conversations that show which tokens a chat template writes.
PROBE_CHATS = (("user",), ("system", "user"), ("user", "assistant", "user"), ("user", "assistant", "tool"))
# Substitutes for the first characters of control tokens, of the private use planes: one that no message has.
SUBSTITUTES = range(0xF0002, 0x10FFFE)
MARKER_ENDS = chr(0xF0000), chr(0xF0001)
# Shorter special tokens, such as a padding token `!`, are ordinary characters of the vocabulary.
MIN_CONTROL_CHARACTERS = 3


class SpecialTokenError(UserError):
    """A text spells a control token that cannot be encoded as text; `token` is its text."""

    def __init__(self, token: str) -> None:
        super().__init__(f"spells the special token {token!r}")
        self.token = token


class TextEncoder:
    """Encodes text, prompts and chats with one tokenizer.

    `control`: id by text of each control token: the special tokens, and other added tokens that the chat template
    writes. `bos`: text of the BOS token if the tokenizer itself puts it before a text, else empty.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.control = control_tokens(tokenizer)
        # A character that the vocabulary lacks becomes the unknown token.
        self.reserved_ids = frozenset(self.control.values()) - {getattr(tokenizer, "unk_token_id", None)}
        # The longest token wins, as in the tokenizer.
        by_length = sorted(self.control, key=len, reverse=True)
        self.spelled = re.compile("|".join(map(re.escape, by_length)) or r"(?!)")
        self.first_characters = frozenset(text[0] for text in self.control)
        self.bos = added_bos(tokenizer)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        # Control tokens of this copy are spelled as markers that nobody can guess; their own texts are text.
        self.markers = new_markers(self.control)
        self.backend = with_markers(backend, self.control, self.markers) if isinstance(backend, Tokenizer) else None
        vocabulary = self.backend.get_added_tokens_decoder() if self.backend else {}
        numbers = {str(token.content): number for number, token in vocabulary.items()}
        self.marker_ids = {numbers[m]: self.control[text] for text, m in self.markers.items() if m in numbers}

    def find(self, text: str) -> str | None:
        """Return the first control token that `text` spells."""
        match = self.spelled.search(text)
        return match.group() if match else None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text alone, no control token among them.

        Raises SpecialTokenError if this tokenizer cannot encode a control token's text as text.
        """
        if self.backend:
            return self.require_text(self.backend.encode(text, add_special_tokens=False).ids)
        self.require_no_control_token([text])
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a text with the special tokens that the tokenizer puts around it.

        A text that spells the BOS token at its start, as a rendered chat does, gets no second one.
        """
        text = self.without_bos(text)
        if self.backend:
            encoding = self.backend.encode(text, add_special_tokens=False)
            self.require_text(encoding.ids)
            return list(self.backend.post_process(encoding, None, True).ids)
        self.require_no_control_token([text])
        return list(self.tokenizer.encode(text))

    def without_bos(self, text: str) -> str:
        """Return the text without the BOS token that it spells at its start, if the tokenizer itself adds one."""
        return text.removeprefix(self.bos)

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], arguments: Mapping[str, Any] | None = None, **flags: bool
    ) -> list[int]:
        """Return the ids of messages in the chat template.

        Contents, and all strings in `arguments` (variables of the template), are text of others. A template cannot
        tell that they spell a control token. `flags`: those of `apply_chat_template`. Raises SpecialTokenError, and
        whatever the template raises.
        """
        text, count = self.render_chat(messages, arguments or {}, flags)
        if self.backend is None:
            return list(self.tokenizer.encode(text, add_special_tokens=False))
        return self.chat_ids(self.backend.encode(text, add_special_tokens=False), count)

    def encode_chat_contents(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[bool]]:
        """Return the ids of messages in the chat template, and whether each token is of a message's content alone.

        Raises what `encode_chat` raises, and UserError if the tokenizer does not tell of which characters a token is,
        or the template changes contents.
        """
        if self.backend is None:
            raise UserError("messages: this tokenizer does not tell of which characters a token is")
        bracket = next(spare_characters([message["content"] for message in messages]), "")
        bracketed = [{**message, "content": f"{bracket}{message['content']}{bracket}"} for message in messages]
        rendered, count = self.render_chat(bracketed, {}, {})
        # Every second part is the content of a message.
        parts = rendered.split(bracket)
        ends = list(accumulate(map(len, parts)))
        encoding = self.backend.encode("".join(parts), add_special_tokens=False)
        ids = self.chat_ids(encoding, count)
        if parts[1::2] != [message["content"] for message in messages] or ids != self.encode_chat(messages):
            raise UserError("messages: the chat template changes their contents")
        spans = list(zip(ends[0::2], ends[1::2], strict=False))
        return ids, [any(a <= first < last <= b for a, b in spans) for first, last in encoding.offsets]

    def render_chat(
        self, messages: Sequence[Mapping[str, str]], arguments: Mapping[str, Any], flags: Mapping[str, bool]
    ) -> tuple[str, int]:
        """Return the text of messages in the chat template, and the number of markers in it.

        With a backend, a marker stands for each control token that the template writes.
        """
        others = list(strings([*(message["content"] for message in messages), *arguments.values()]))
        for message in messages:
            self.require_role(message["role"])
        if self.backend is None:
            self.require_no_control_token(others)
        chosen = self.substitutes(others)
        table = str.maketrans(chosen)
        rendered = self.tokenizer.apply_chat_template(
            [{**message, "content": message["content"].translate(table)} for message in messages],
            tokenize=False,
            **flags,
            **{name: substituted(value, table) for name, value in arguments.items()},
        )
        if self.backend is None:
            return rendered, 0
        # What spells a control token now was written by the template.
        rendered, count = self.spelled.subn(lambda match: self.markers[match.group()], rendered)
        return rendered.translate({ord(substitute): character for character, substitute in chosen.items()}), count

    def chat_ids(self, encoding: Encoding, count: int) -> list[int]:
        """Return the ids of a rendered chat that has `count` markers. Raises SpecialTokenError if it has others."""
        self.require_text(token for token in encoding.ids if token not in self.marker_ids)
        if sum(token in self.marker_ids for token in encoding.ids) != count:
            raise SpecialTokenError("a marker of the chat template")
        return [self.marker_ids.get(token, token) for token in encoding.ids]

    def substitutes(self, texts: Iterable[str]) -> dict[str, str]:
        """Return, for each first character of a control token that a text has, a character that no text has.

        A text without first characters spells no control token, not even together with the text behind it.
        """
        characters: set[str] = set().union(*texts)
        spare = spare_characters(texts)
        chosen = {character: next(spare, "") for character in sorted(characters & self.first_characters)}
        for character, substitute in chosen.items():
            if not substitute:
                raise SpecialTokenError(character)
        return chosen

    def require_text(self, ids: Iterable[int]) -> list[int]:
        """Return ids that are all text. Raises SpecialTokenError if a control token is among them."""
        checked = list(ids)
        if reserved := self.reserved_ids.intersection(checked):
            raise SpecialTokenError(next(text for text, number in self.control.items() if number in reserved))
        return checked

    def require_no_control_token(self, texts: Iterable[str]) -> None:
        """Raise SpecialTokenError if a text spells a control token."""
        for text in texts:
            if token := self.find(text):
                raise SpecialTokenError(token)

    def require_role(self, role: str) -> None:
        """Raise SpecialTokenError if a role is the name of a control token: templates write `<|role|>`."""
        for text in self.control:
            if role not in ROLES and role == re.sub(r"^\W+|\W+$", "", text):
                raise SpecialTokenError(text)


@lru_cache(maxsize=8)
def text_encoder(tokenizer: Any) -> TextEncoder:
    """Return the encoder of a tokenizer. It is built once, since it copies the vocabulary."""
    return TextEncoder(tokenizer)


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Return id by text of the special tokens, and of the other added tokens that the chat template writes.

    Other added tokens are text, such as runs of spaces; so is a padding token that is an ordinary character.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    template = template_text(tokenizer) if added else ""
    return {
        str(token): number
        for number, token in sorted(added.items())
        if len(str(token).strip()) >= MIN_CONTROL_CHARACTERS
        and (token.special or (re.search(r"[^\w\s\u2581]", str(token)) and str(token) in template))
    }


def template_text(tokenizer: Any) -> str:
    """Return the source of the chat template, and what it writes around some messages."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return ""
    parts = list(template.values()) if isinstance(template, dict) else [template]
    return "\n".join([*parts, *rendered_chats(tokenizer)])


def rendered_chats(tokenizer: Any, content: str = "x") -> list[str]:
    """Return what the chat template makes of some conversations, with messages of this content."""
    rendered = []
    for roles in PROBE_CHATS:
        messages = [{"role": role, "content": content} for role in roles]
        # A template may refuse these roles, with whatever exception.
        with suppress(Exception):
            rendered.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return rendered


def added_bos(tokenizer: Any) -> str:
    """Return the text of the BOS (or CLS) token if the tokenizer puts it before every text, else an empty string."""
    first = bos_token_id(tokenizer)
    return "" if first is None else special_text(tokenizer, first)


def special_text(tokenizer: Any, number: int) -> str:
    """Return the text of the BOS, CLS or EOS token with this id; empty if none has it, or it has no text."""
    names = (f"{name}_token" for name in ("bos", "cls", "eos"))
    name = next((name for name in names if getattr(tokenizer, f"{name}_id", None) == number), "")
    return getattr(tokenizer, name, None) or ""


def bos_token_id(tokenizer: Any) -> int | None:
    """Return the id of the BOS (or CLS) token if the tokenizer puts it before every text, else None.

    This is the one rule for training, import, evaluation and serving: a text begins as the tokenizer begins it.
    """
    known = [getattr(tokenizer, name, None) for name in ("bos_token_id", "cls_token_id")]
    wrapped, plain = (list(tokenizer.encode("a", add_special_tokens=added)) for added in (True, False))
    # Some tokenizers append EOS, which may be the same token.
    return wrapped[0] if wrapped[:1] != plain[:1] and wrapped[0] in known else None


def spare_characters(texts: Iterable[str]) -> Iterator[str]:
    """Yield the SUBSTITUTES that no text has."""
    characters: set[str] = set().union(*texts)
    return (chr(code) for code in SUBSTITUTES if chr(code) not in characters)


def new_markers(control: Iterable[str]) -> dict[str, str]:
    """Return a marker by control token, which no text of others spells."""
    nonce = secrets.token_hex(16)
    opening, closing = MARKER_ENDS
    return {text: f"{opening}{nonce}:{number}{closing}" for number, text in enumerate(control)}


def with_markers(backend: Tokenizer, control: Mapping[str, int], markers: Mapping[str, str]) -> Tokenizer:
    """Return a copy of a tokenizer that matches markers in place of control tokens, whose texts it encodes as text."""
    state = json.loads(backend.to_str())
    added = {token["content"]: token for token in state["added_tokens"]}
    for text, token in added.items():
        token["special"] = text in control
    copy = Tokenizer.from_str(json.dumps(state))
    copy.encode_special_tokens = True
    copy.no_padding()
    copy.no_truncation()
    for text, marker in markers.items():
        sides = {side: added[text][side] for side in ("lstrip", "rstrip")}
        copy.add_tokens([AddedToken(marker, special=False, normalized=False, **sides)])
    return copy


def strings(value: Any) -> Iterator[str]:
    """Yield all strings in a value, the keys of objects included."""
    match value:
        case str():
            yield value
        case Mapping():
            for key, item in value.items():
                yield key
                yield from strings(item)
        case Sequence():
            for item in value:
                yield from strings(item)


def substituted(value: Any, table: Mapping[int, str]) -> Any:
    """Return a value with characters of all its strings replaced."""
    match value:
        case str():
            return value.translate(table)
        case Mapping():
            return {key.translate(table): substituted(item, table) for key, item in value.items()}
        case Sequence():
            return [substituted(item, table) for item in value]
    return value
