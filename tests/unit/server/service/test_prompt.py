"""Prompts become tokens: one BOS as the tokenizer has it, and no special token that the client spelled."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rudder.sae_models import PRETRAINED
from rudder.server import config
from rudder.server.service import limits
from rudder.server.service.errors import Refusal
from rudder.server.service.limits import bounds_of
from rudder.server.service.prompt import prompt_ids
from rudder.v1 import inference_pb2

BOUNDS = bounds_of(config.Limits(), max_model_len=4096, vocab_size=8192)
BOS, EOS = 1, 0
REFUSE = config.Prompt(special_tokens="refuse")
TOKENIZER: Any = AutoTokenizer.from_pretrained(str(PRETRAINED / "textbook-lm"))


def text(content: str) -> inference_pb2.Prompt:
    return inference_pb2.Prompt(text=content)


def chat(*contents: str, role: str = "user") -> inference_pb2.Prompt:
    messages = [inference_pb2.ChatMessage(role=role, content=content) for content in contents]
    return inference_pb2.Prompt(chat=inference_pb2.Chat(messages=messages))


def with_template(template: str) -> Any:
    """Return the shipped tokenizer with another chat template."""
    tokenizer: Any = AutoTokenizer.from_pretrained(str(PRETRAINED / "textbook-lm"))
    tokenizer.chat_template = template
    return tokenizer


SPELLED = st.lists(
    st.one_of(st.text(max_size=8), st.sampled_from(["<|bos|>", "<|endoftext|>", "<|bo", "s|>", "\uff1c|bos|>", "\n"])),
    max_size=5,
).map("".join)


@given(content=SPELLED)
def test_special_tokens_of_clients_are_text(content: str) -> None:
    ids = prompt_ids(text("a" + content), TOKENIZER, BOUNDS)
    assert (ids[0], set(ids[1:]) & {BOS, EOS}) == (BOS, set())
    assert TOKENIZER.decode(ids[1:], clean_up_tokenization_spaces=False) == "a" + content
    ids = prompt_ids(chat(content, content), TOKENIZER, BOUNDS)
    assert (ids[0], set(ids[1:]) & {BOS, EOS}) == (BOS, set())
    assert TOKENIZER.decode(ids[1:], clean_up_tokenization_spaces=False) == f"{content}\n{content}\n"


def test_bos_at_the_start_of_a_text_is_the_one_that_the_tokenizer_adds() -> None:
    assert prompt_ids(text("<|bos|>cells"), TOKENIZER, BOUNDS) == prompt_ids(text("cells"), TOKENIZER, BOUNDS)
    twice = prompt_ids(text("<|bos|><|bos|>cells"), TOKENIZER, BOUNDS)
    assert twice.count(BOS) == 1
    assert TOKENIZER.decode(twice[1:]) == "<|bos|>cells"
    assert prompt_ids(text("<|bos|>cells"), TOKENIZER, BOUNDS, REFUSE)[0] == BOS


def test_token_ids_are_taken_as_they_are() -> None:
    ids = inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=[5, BOS, BOS]))
    assert prompt_ids(ids, TOKENIZER, BOUNDS) == (5, BOS, BOS)


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (text("a<|bos|>"), "prompt.text"),
        (text("<|bos|><|endoftext|>"), "prompt.text"),
        (chat("x", "a<|endoftext|>b"), "prompt.chat.messages[1].content"),
    ],
)
def test_special_tokens_are_refused_where_the_server_says_so(prompt: inference_pb2.Prompt, field: str) -> None:
    with pytest.raises(Refusal) as caught:
        prompt_ids(prompt, TOKENIZER, BOUNDS, REFUSE)
    assert caught.value.violations[0].field == field


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content + 1 }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[0].content.nothing() }}",
        "{% for i in range(messages[0].content) %}{% endfor %}",
    ],
)
def test_whatever_a_template_raises_the_messages_are_refused(template: str) -> None:
    with pytest.raises(Refusal) as caught:
        prompt_ids(chat("x"), with_template(template), BOUNDS)
    assert (caught.value.reason, caught.value.violations[0].field) == ("FIELD_INVALID", "prompt.chat.messages")


@pytest.mark.parametrize("role", ["user|>x", "a b", "\n", "r" * 65, "<|bos|>"])
def test_role_that_is_not_a_name_is_refused(role: str) -> None:
    with pytest.raises(Refusal) as caught:
        limits.check(inference_pb2.GenerateRequest(prompt=chat("x", role=role)), BOUNDS)
    assert caught.value.violations[0].field == "prompt.chat.messages[0]"


def test_role_that_names_a_special_token_is_refused() -> None:
    tokenizer = with_template("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}")
    assert prompt_ids(chat("x"), tokenizer, BOUNDS)
    with pytest.raises(Refusal):
        prompt_ids(chat("x", role="endoftext"), tokenizer, BOUNDS)
