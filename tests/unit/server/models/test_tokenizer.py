"""Tokenizers of GGUF files: token ids equal those of Transformers and SentencePiece."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from rudder.server.models.convert import convert
from rudder.server.models.gguf_file import GGUFFile, ModelFileError, read
from rudder.server.models.tokenizer import PRE_TOKENIZERS, WHOLE_TOKENS, files_of
from tests.unit.gguf_files import CONTROL, TEMPLATE, tiny_llama

TEXTS = ("What causes the flu?", "In 2024, 1212 people don't   stop\n\nnow \t x", "café 日本語 🙂", "A_b(C){d};  // E")
CORPUS = ["the quick brown fox jumps over the lazy dog", "a stitch in time saves nine", "it is the time of the fox"]


def tokenizer_with(folder: Path, **changes: Any) -> Tokenizer:
    """Return the tokenizer of a tiny model with changed metadata."""
    return tokenizer_of(read(tiny_llama(**changes).write(folder / "model.gguf")))


def tokenizer_of(file: GGUFFile) -> Tokenizer:
    """Return the tokenizer of a file."""
    config = {"vocab_size": 100_000, "max_position_embeddings": 128}
    return Tokenizer.from_str(files_of(file, config)["tokenizer.json"])


@pytest.fixture(scope="module")
def sentences() -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece BPE with bytes as its fallback, as Llama 2 has."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, model_type="bpe", vocab_size=330, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def converted(sentences: sentencepiece.SentencePieceProcessor, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The same, converted."""
    return tokenizer_with(tmp_path_factory.mktemp("sentences"), **metadata_of(sentences))


def metadata_of(processor: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """Return the metadata that llama.cpp writes for a SentencePiece model."""
    ids = range(processor.vocab_size())

    def kind(number: int) -> int:
        special = {processor.is_unknown: 2, processor.is_control: 3, processor.is_byte: 6}
        return next((value for check, value in special.items() if check(number)), 1)

    return {
        "tokenizer__ggml__model": "llama", "tokenizer__ggml__pre": None, "tokenizer__ggml__merges": None,
        "tokenizer__ggml__tokens": [processor.id_to_piece(number) for number in ids],
        "tokenizer__ggml__scores": [float(processor.get_score(number)) for number in ids],
        "tokenizer__ggml__token_type": [kind(number) for number in ids], "tokenizer__ggml__unknown_token_id": 0,
        "tokenizer__ggml__add_bos_token": None, "tokenizer__ggml__padding_token_id": None,
    }  # fmt: skip


def test_folder_loads_in_transformers(tmp_path: Path) -> None:
    convert(tiny_llama().write(tmp_path / "model.gguf"), tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token, loaded.unk_token) == (
        "<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>",
    )  # fmt: skip
    assert set(loaded.all_special_ids) == {0, 1, 2}
    assert loaded.model_max_length == 128
    assert loaded.chat_template == TEMPLATE == (tmp_path / "out" / "chat_template.jinja").read_text()
    plain = tokenizer_of(read(tmp_path / "model.gguf"))
    for text in TEXTS:
        assert loaded(text).input_ids == plain.encode(text).ids
        assert loaded.decode(loaded(text).input_ids) == text
    chat = loaded.apply_chat_template([{"role": "user", "content": "the 12"}], tokenize=False)
    assert loaded(chat).input_ids[0] == 1


def test_smollm_splits_digits_and_merges_the_rest(tmp_path: Path) -> None:
    assert tokenizer_with(tmp_path).encode("the the 12").tokens == ["t", "he", "Ġthe", "Ġ", "1", "2"]
    assert tokenizer_with(tmp_path, tokenizer__ggml__pre="gpt-2").encode("the 12").tokens == ["t", "he", "Ġ", "12"]


@pytest.mark.parametrize("rule", sorted(PRE_TOKENIZERS.keys() & GGUF_PRE_TOKENIZER_SPLITS.keys()))
@settings(deadline=None, max_examples=40)
@given(text=st.text() | st.text("aZ é'sd09.!\n\t日"))
def test_rules_split_text_as_in_transformers(rule: str, text: str) -> None:
    split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[rule]), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs = pre_tokenizers.Sequence([split, byte_level])
    model = {"type": "BPE", "vocab": {}, "merges": []}
    pre = {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[rule]}
    ours = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": pre, "model": model}))
    assert ours.pre_tokenizer.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


def test_control_tokens_are_whole_and_special(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(tmp_path)
    assert tokenizer.encode("<|im_start|>the<|im_end|>").ids[0] == CONTROL.index("<|im_start|>")
    assert tokenizer.decode(tokenizer.encode("the<|im_end|>").ids) == "the"


def test_user_defined_tokens_are_whole_and_not_special(tmp_path: Path) -> None:
    metadata = tiny_llama().metadata
    tokens = [*metadata["tokenizer.ggml.tokens"], "<think>"]
    types = [*metadata["tokenizer.ggml.token_type"], 4]
    changes = {"tokenizer__ggml__tokens": tokens, "tokenizer__ggml__token_type": types}
    tokenizer = tokenizer_with(tmp_path, **changes)
    assert tokenizer.encode("a<think>").tokens[-1] == "<think>"
    assert tokenizer.decode(tokenizer.encode("a<think>").ids) == "a<think>"


@pytest.mark.parametrize(
    ("changes", "begins", "ends"),
    [
        ({}, False, False),
        ({"tokenizer__ggml__add_bos_token": None}, False, False),
        ({"tokenizer__ggml__add_bos_token": None, "tokenizer__ggml__pre": "llama-bpe"}, True, False),
        ({"tokenizer__ggml__pre": "llama-bpe"}, False, False),
        ({"tokenizer__ggml__add_bos_token": True}, True, False),
        ({"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__add_eos_token": True}, True, True),
        ({"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__bos_token_id": None}, False, False),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(
    changes: dict[str, Any], begins: bool, ends: bool, tmp_path: Path
) -> None:
    ids = tokenizer_with(tmp_path, **changes).encode("the").ids
    assert (ids[0] == 1, ids[-1] == 2) == (begins, ends)
    pair = tokenizer_with(tmp_path, **changes).encode("the", "the").ids
    assert pair == ids * 2
    assert tokenizer_with(tmp_path, **changes).encode("the", add_special_tokens=False).ids == [
        number for number in ids if number > 2
    ]


@settings(deadline=None, max_examples=80)
@given(text=st.text("the quickbrownfx  é日\n0") | st.text(st.characters(exclude_categories=["Cs", "Cc"])))
def test_sentencepiece_ids_equal_those_of_the_library(
    sentences: sentencepiece.SentencePieceProcessor, converted: Tokenizer, text: str
) -> None:
    # SentencePiece takes its own sign of a space for a space.
    text = text.replace("▁", "_")
    assert converted.encode(text, add_special_tokens=False).ids == (sentences.encode(text) if text else [])
    assert converted.decode(converted.encode(text).ids) == text


def test_sentencepiece_begins_with_bos_and_may_have_no_prefix(
    sentences: sentencepiece.SentencePieceProcessor, tmp_path: Path
) -> None:
    metadata = metadata_of(sentences)
    assert tokenizer_with(tmp_path, **metadata).encode("the").tokens[:2] == ["<s>", "▁the"]
    metadata["tokenizer__ggml__add_space_prefix"] = False
    tokenizer = tokenizer_with(tmp_path, **metadata)
    assert not tokenizer.encode("the").tokens[1].startswith("▁")
    assert tokenizer.decode(tokenizer.encode(" the").ids) == " the"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"pre": "qwen9"}, "tokenizer.ggml.pre: the rule qwen9 cannot be converted; gpt-2, smollm, "),
        ({"pre": None}, "tokenizer.ggml.pre is missing"),
        ({"pre": "default"}, "tokenizer.ggml.pre: the rule default cannot be converted"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokens": ["a", "a"]}, "tokenizer.ggml.tokens: is empty, or has a token twice"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens has items that are not of type str"),
        ({"tokens": [str(number) for number in range(289)]}, "tokenizer.ggml.tokens: 289 for 288 embeddings"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type: 1 for 265 tokens"),
        ({"token_type": None}, "tokenizer.ggml.token_type is missing"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"merges": ["a b"]}, "tokenizer.ggml.merges: 'a b' does not merge two tokens to a third"),
        ({"merges": ["ab"]}, "tokenizer.ggml.merges: 'ab' does not merge two tokens to a third"),
        ({"eos_token_id": 265}, "tokenizer.ggml.eos_token_id is 265, beyond the vocabulary"),
        ({"eot_token_id": 1 << 31}, "tokenizer.ggml.eot_token_id is 2147483648, beyond the vocabulary"),
        ({"model": "llama"}, "tokenizer.ggml.scores is missing"),
        ({"model": "llama", "scores": [0.5]}, "tokenizer.ggml.scores: 1 for 265 tokens"),
        ({"model": "llama", "unknown_token_id": None}, "tokenizer.ggml.unknown_token_id is missing"),
    ],
)
def test_other_vocabularies_are_refused_by_name(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    path = tiny_llama(**{f"tokenizer__ggml__{key}": value for key, value in changes.items()}).write(tmp_path / "m.gguf")
    with pytest.raises(ModelFileError, match=f"^m.gguf: {problem}"):
        convert(path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


def test_rules_with_whole_tokens_are_rules() -> None:
    assert set(WHOLE_TOKENS) < PRE_TOKENIZERS.keys()
