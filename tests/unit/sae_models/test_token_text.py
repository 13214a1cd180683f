"""Texts of tokens join to the text; a token that is a part of a character is named by its bytes."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rudder.sae_models import token_text
from rudder.sae_models.activations import corpus, harvest
from rudder.sae_models.activations.corpus import Document
from rudder.sae_models.evaluation import activity
from rudder.sae_models.token_text import REPLACEMENT
from tests.unit import tiny

BYTE_LEVEL = harvest.load_tokenizer(tiny.TEXTBOOK_LM)


def byte_fallback() -> Any:
    """Return a tokenizer like SentencePiece's: a few words with a leading space, bytes for all else."""
    vocabulary = [(word, -1.0) for word in ("<unk>", "\u2581Hello", "\u2581the", "\u2581", "a", "b")]
    vocabulary += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {"byte level": BYTE_LEVEL, "byte fallback": byte_fallback()}
TEXTS = ["Hello \N{HOT PEPPER}", "Hello", "\N{HOT PEPPER}", "a\N{HOT PEPPER}b \u4e16\u754c the", "caf\xe9 \u0436"]
TEXTS.append(f"a{REPLACEMENT}b")


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_texts_of_tokens_join_to_the_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_text.token_texts(ids, tokenizer)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40))
def test_any_text_joins_to_itself(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(token_text.token_texts(ids, tokenizer)) == tokenizer.decode(ids)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, len(BYTE_LEVEL) - 1) | st.integers(160, 260), max_size=30))
def test_any_ids_join_to_their_text(ids: list[int]) -> None:
    decoded = BYTE_LEVEL.decode(ids)
    assert "".join(token_text.token_texts(ids, BYTE_LEVEL)) == decoded
    spans = token_text.spans_by_vocabulary(ids, token_text.vocabulary_texts(BYTE_LEVEL), BYTE_LEVEL)
    assert "".join(span.text for span in spans) == decoded
    assert [span.first for span in spans] == [0, *(span.last for span in spans)][: len(spans)]


def test_text_that_ends_inside_a_character_ends_with_a_replacement_character() -> None:
    ids = BYTE_LEVEL("Hello \N{HOT PEPPER}", add_special_tokens=False)["input_ids"]
    assert token_text.token_texts(ids[:-1], BYTE_LEVEL)[-2:] == ["", REPLACEMENT]
    assert token_text.token_texts([], BYTE_LEVEL) == []


def test_token_that_is_part_of_a_character_is_named_by_its_bytes() -> None:
    for tokenizer in TOKENIZERS.values():
        ids = tokenizer("a\N{HOT PEPPER}", add_special_tokens=False)["input_ids"]
        names = [token_text.token_name(token, tokenizer) for token in ids]
        assert names[-2:] == [r"\x8c", r"\xb6"]
        assert not any(REPLACEMENT in name for name in names)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_words_and_contexts_of_a_catalogue_hold_whole_characters(name: str) -> None:
    tokenizer, text = TOKENIZERS[name], "Hello the \N{HOT PEPPER} \u4e16\u754c\u4e16 Hello"
    windows = corpus.windows([Document("book", "m", text)], tokenizer, 40)
    sample = activity.sample_of(windows, [Document("book", "m", text)], tokenizer)
    assert not any(REPLACEMENT in word for word in sample.vocabulary)
    assert {"hello", "the", "\u4e16\u754c\u4e16"} <= set(sample.vocabulary)
    first = int(windows.counted[0].nonzero()[0])
    for position in range(first, int(windows.size[0])):
        context = activity.context_at(sample, 0, position, 1.0)
        assert REPLACEMENT not in context.before + context.token + context.after
        assert context.token
        assert (context.before + context.token + context.after).lstrip() in text
