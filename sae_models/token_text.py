"""The text of single tokens, such that the texts of a sequence join to the text of the sequence.

Decoding tokens one by one does not do that: a token may hold a part of a character's UTF-8 bytes, which decodes to
U+FFFD, and SentencePiece tokenizers drop the space in front of the first token.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, but bytes that form none may precede it; this bounds the work on a run of them.
MAX_TOKENS_PER_SPAN = 32
# Tokens that may hold the beginning of a character.
MAX_TOKENS_BEFORE = 3
CLEANS_UP = "clean_up_tokenization_spaces"
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Span(NamedTuple):
    """Consecutive tokens [first, last) that end at a character's end, most often one, and their text."""

    first: int
    last: int
    text: str


def _gpt2_bytes() -> dict[str, int]:
    """Return the byte that each character of a byte-level BPE vocabulary stands for (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


GPT2_BYTES = _gpt2_bytes()


def decoder_of(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Return a function that decodes ids verbatim: special tokens are kept, and spaces are not cleaned up."""
    verbatim = {CLEANS_UP: False} if getattr(tokenizer, CLEANS_UP, False) else {}

    def decode(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(list(ids), **verbatim)
        return text

    return decode


def spans(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> Iterator[Span]:
    """Yield the spans of a sequence. Their texts join to its text; bytes that never complete a character are U+FFFD."""
    # One token of context shows the space in front of a span; it ends at a character's end, as every span does.
    context, first = list[int](), 0
    for last in range(1, len(ids) + 1):
        before = decode(context) if context else ""
        text = decode([*context, *ids[first:last]]).removeprefix(before)
        incomplete = text.endswith(REPLACEMENT) and last - first < MAX_TOKENS_PER_SPAN
        if incomplete and last < len(ids):
            continue
        yield Span(first, last, text)
        # Bytes that form no character, as context, could combine with those that follow.
        context, first = [] if text.endswith(REPLACEMENT) else list(ids[first:last]), last


def vocabulary_texts(tokenizer: Any) -> list[str]:
    """Return the text of each token of the vocabulary inside a text, with the space in front of it; a token that is no
    whole characters has U+FFFD.
    """
    decode = decoder_of(tokenizer)
    context = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    before = decode(context)
    return [decode([*context, token]).removeprefix(before) for token in range(len(tokenizer))]


def spans_by_vocabulary(ids: Sequence[int], texts: Sequence[str], tokenizer: Any) -> list[Span]:
    """Return the spans of a sequence from the `vocabulary_texts`; decode only where a token is no whole characters."""
    result, first = list[Span](), 0
    while first < len(ids):
        last = first
        while last < len(ids) and REPLACEMENT in texts[ids[last]]:
            last += 1
        if last == first:
            result.append(Span(first, first + 1, texts[ids[first]]))
            first += 1
        else:
            parts = spans(ids[first:last], decoder_of(tokenizer))
            result += [Span(first + part.first, first + part.last, part.text) for part in parts]
            first = last
    return result


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Return a text for each token; they join to the text of all. A character that several tokens spell belongs to the
    last of them, the others are empty.
    """
    texts: list[str] = []
    for span in spans(ids, decoder_of(tokenizer)):
        texts += [""] * (span.last - span.first - 1) + [span.text]
    return texts


def token_name(token: int, tokenizer: Any) -> str:
    """Return the text of one token by itself; where it is not whole characters, its bytes, such as `\\xf0\\x9f`."""
    text = decoder_of(tokenizer)([token])
    if REPLACEMENT not in text:
        return text
    raw = tokenizer.convert_ids_to_tokens(token)
    if match := BYTE_TOKEN.fullmatch(raw):
        return f"\\x{match[1].lower()}"
    if all(character in GPT2_BYTES for character in raw):
        content = bytes(GPT2_BYTES[character] for character in raw)
        return text if content.decode(errors="replace") != text else content.decode(errors="backslashreplace")
    return str(raw)
