"""Text of others never becomes a control token, in any tokenizer; what the template writes stays as it was."""

import copy
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rudder.sae_models import PRETRAINED
from rudder.sae_models.activations import corpus
from rudder.sae_models.activations.corpus import Document
from rudder.sae_models.errors import UserError
from rudder.sae_models.tokens import SpecialTokenError, TextEncoder, bos_token_id, control_tokens, text_encoder

CHATML = (
    "{{ bos_token or '' }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if thinking %}<think>{{ thinking }}{% endif %}"
    "{% endif %}"
)
ROLE_MARKERS = "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{{ m['content'] | trim }}<|end|>{% endfor %}"
# `<think>` is not flagged special, as in Qwen 3; runs of spaces are text, as in Pythia.
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|end|>", "<|endoftext|>")
PLAIN_ADDED = ("<think>", "  ", "    ")


def byte_level(template: str = CHATML, **options: Any) -> Any:
    """A byte-level BPE tokenizer without merges, BOS added by the tokenizer."""
    vocabulary = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return finished(backend, template, **options)


def metaspace(template: str = CHATML) -> Any:
    """A BPE tokenizer with byte fallback and a leading space mark, as of Llama 2."""
    characters = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *map(chr, range(33, 127))]
    vocabulary = {character: number for number, character in enumerate(characters)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return finished(backend, template, unk_token="<unk>")


def finished(backend: Tokenizer, template: str, **options: Any) -> Any:
    """Add special tokens, BOS and a chat template."""
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN_ADDED])
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template, **options
    )


TOKENIZERS: dict[str, Any] = {
    "shipped": AutoTokenizer.from_pretrained(str(PRETRAINED / "textbook-lm")),
    "byte level": byte_level(),
    "metaspace": metaspace(),
    "role markers": byte_level(ROLE_MARKERS),
}
ENCODERS = {name: TextEncoder(tokenizer) for name, tokenizer in TOKENIZERS.items()}
CONTROL_TEXTS = sorted({text for encoder in ENCODERS.values() for text in encoder.control})
# Control tokens whole, cut, nested and doubled, among any text.
PIECES = st.one_of(
    st.text(),
    st.sampled_from(CONTROL_TEXTS),
    st.sampled_from([text[:cut] for text in CONTROL_TEXTS for cut in (1, 2, -1)]),
    st.sampled_from([text[:4] + text + text[4:] for text in CONTROL_TEXTS]),
    st.sampled_from([chr(0xF0000), chr(0xF0001), chr(0x10FFFD), "\uff5c", "  ", "\n"]),
)
CONTENTS = st.lists(PIECES, max_size=6).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(content=CONTENTS)
def test_text_has_no_control_token_and_decodes_to_itself(name: str, content: str) -> None:
    encoder, tokenizer = ENCODERS[name], TOKENIZERS[name]
    ids = encoder.encode(content)
    assert not set(ids) & set(encoder.control.values())
    # This tokenizer itself puts a space before each part that its added tokens, runs of spaces, separate.
    if name != "metaspace" or "  " not in content:
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == content


@pytest.mark.parametrize("name", TOKENIZERS)
@given(content=CONTENTS)
def test_prompt_has_one_bos_and_no_other_control_token(name: str, content: str) -> None:
    encoder = ENCODERS[name]
    bos = bos_token_id(TOKENIZERS[name])
    ids = encoder.encode_prompt(content)
    assert ids == [bos, *encoder.encode(content.removeprefix(encoder.bos))]
    assert ids == encoder.encode_prompt(encoder.bos + content) or content.startswith(encoder.bos)


def frame(name: str, ids: list[int]) -> list[int]:
    """Return the control tokens among `ids`."""
    return [token for token in ids if token in ENCODERS[name].control.values()]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(contents=st.lists(CONTENTS, min_size=1, max_size=3))
def test_chat_has_the_control_tokens_of_its_template_alone(name: str, contents: list[str]) -> None:
    chat = [{"role": "user", "content": content} for content in contents]
    harmless = [{"role": "user", "content": "x"} for _ in contents]
    encoder, tokenizer = ENCODERS[name], TOKENIZERS[name]
    expected = tokenizer.apply_chat_template(harmless, add_generation_prompt=True, return_dict=False)
    ids = encoder.encode_chat(chat, add_generation_prompt=True)
    assert frame(name, ids) == frame(name, expected)
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    if name != "metaspace":
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("name", TOKENIZERS)
@given(content=st.text(st.characters(codec="ascii"), max_size=20))
def test_harmless_chat_and_text_are_encoded_as_by_the_tokenizer(name: str, content: str) -> None:
    encoder, tokenizer = ENCODERS[name], TOKENIZERS[name]
    if encoder.find(content) is None:
        chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "y"}]
        expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert encoder.encode_chat(chat, add_generation_prompt=True) == expected
        assert encoder.encode_prompt(content) == tokenizer.encode(content)


def test_variables_of_the_template_are_text_too() -> None:
    encoder = ENCODERS["byte level"]
    chat = [{"role": "user", "content": "x"}]
    ids = encoder.encode_chat(chat, {"thinking": "<|im_end|>"}, add_generation_prompt=True)
    plain = encoder.encode_chat(chat, {"thinking": "y"}, add_generation_prompt=True)
    assert frame("byte level", ids) == frame("byte level", plain)


def test_control_tokens_are_special_or_written_by_the_template() -> None:
    assert control_tokens(TOKENIZERS["byte level"]).keys() == {*SPECIAL, "<think>"}
    assert control_tokens(TOKENIZERS["role markers"]).keys() == {*SPECIAL}
    assert control_tokens(TOKENIZERS["metaspace"]).keys() == {*SPECIAL, "<think>", "<unk>"}


@pytest.mark.parametrize("role", ["end", "im_start", "s", "endoftext"])
def test_role_that_names_a_control_token_is_refused(role: str) -> None:
    with pytest.raises(SpecialTokenError):
        ENCODERS["role markers"].encode_chat([{"role": role, "content": "x"}])


def test_tokenizer_that_cannot_encode_a_control_token_as_text_refuses_it() -> None:
    """A unigram vocabulary holds `<s>` as a piece with the best score of all."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), *((character, -5.0) for character in "abcs<>")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")
    encoder = TextEncoder(tokenizer)
    with pytest.raises(SpecialTokenError, match="<s>"):
        encoder.encode("a<s>b")
    assert encoder.encode("a\u4e00b") == [2, 0, 3]


def test_padding_token_that_is_an_ordinary_character_stays_text() -> None:
    tokenizer = byte_level(pad_token="!")
    assert tokenizer.decode(TextEncoder(tokenizer).encode("hello!")) == "hello!"


def test_documents_of_a_corpus_have_no_control_tokens() -> None:
    tokenizer = TOKENIZERS["shipped"]
    documents = [Document("b", "1", "<|bos|>cells <|endoftext|>of<|bos|> the body"), Document("b", "2", "plain")]
    windows = corpus.windows(documents, tokenizer, 16)
    counted = windows.tokens[windows.counted]
    assert not set(counted.tolist()) & {0, 1}
    assert windows.tokens[:, 0].eq(1).all()


def test_encoder_is_built_once() -> None:
    tokenizer = TOKENIZERS["shipped"]
    assert text_encoder(tokenizer) is text_encoder(tokenizer)


def test_first_characters_are_substituted_even_when_the_text_has_many_private_ones() -> None:
    encoder = ENCODERS["byte level"]
    content = "<|im_end|>" + "".join(map(chr, random.Random(0).sample(range(0xF0000, 0xF1000), 4000)))
    ids = encoder.encode_chat([{"role": "user", "content": content}])
    assert content in TOKENIZERS["byte level"].decode(ids)


@given(contents=st.lists(CONTENTS, min_size=1, max_size=3))
def test_tokens_of_contents_are_told_from_those_of_the_template(contents: list[str]) -> None:
    encoder = ENCODERS["byte level"]
    chat = [{"role": "user", "content": content} for content in contents]
    ids, of_contents = encoder.encode_chat_contents(chat)
    assert ids == encoder.encode_chat(chat)
    template, _ = encoder.encode_chat_contents([{"role": "user", "content": ""} for _ in contents])
    assert [token for token, inside in zip(ids, of_contents, strict=True) if not inside] == template


def test_a_template_that_changes_contents_is_refused() -> None:
    tokenizer = copy.deepcopy(TOKENIZERS["byte level"])
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] | upper }}<|im_end|>{% endfor %}"
    with pytest.raises(UserError, match=r"^messages: the chat template changes"):
        TextEncoder(tokenizer).encode_chat_contents([{"role": "user", "content": "x"}])
