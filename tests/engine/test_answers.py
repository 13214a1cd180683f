"""A chat corpus holds the model's own answers, in lines that training reads, and goes on where it was stopped."""

import json
from pathlib import Path

import pytest

from rudder.sae_models.activations import corpus
from rudder.sae_models.activations.prompts import Prompt
from rudder.sae_models.errors import UserError
from rudder.server import config as configuration
from rudder.server.engine import answers
from rudder.server.engine.answers import Sampling
from rudder.server.engine.engine import Engine

PROMPT = Prompt("What is a cell?", "microbiology")


async def test_an_answer_becomes_a_chat_of_the_corpus(engine: Engine, tmp_path: Path) -> None:
    text, tokens = await answers.answer(engine, PROMPT.text, Sampling(max_tokens=8))
    assert 0 < tokens <= 8
    assert text
    with (tmp_path / "chats.jsonl").open("w") as file:
        answers.write_line(file, 7, PROMPT, text)
    (document,) = corpus.read(tmp_path / "chats.jsonl")
    assert document.messages == (("user", PROMPT.text), ("assistant", text))
    assert (document.book, document.module) == ("microbiology", "chat-7")
    assert answers.numbers_in(tmp_path / "chats.jsonl") == {7}


async def test_prompts_that_are_answered_are_not_answered_again(tmp_path: Path) -> None:
    """No engine starts, so none needs to be there."""
    with (tmp_path / "chats.jsonl").open("w") as file:
        answers.write_line(file, 0, PROMPT, "A unit.")
    before = (tmp_path / "chats.jsonl").read_bytes()
    assert await answers.write_answers("no-such-model", [PROMPT], tmp_path / "chats.jsonl", Sampling()) == 0
    assert (tmp_path / "chats.jsonl").read_bytes() == before


async def test_a_prompt_that_is_too_long_is_refused(engine: Engine) -> None:
    with pytest.raises(UserError, match=r"^prompt: 'cell cell .* has \d+ tokens, at most 16 are possible"):
        await answers.answer(engine, "cell " * 50, Sampling(max_prompt_tokens=16))


@pytest.mark.parametrize("line", ["{", "[]", json.dumps({"module": "m1"}), json.dumps({"text": "x"})])
def test_a_file_that_holds_something_else_is_left_alone(tmp_path: Path, line: str) -> None:
    (tmp_path / "chats.jsonl").write_text(line)
    with pytest.raises(UserError, match=r"^out: .*chats.jsonl: line 1 is not a chat"):
        answers.numbers_in(tmp_path / "chats.jsonl")
    with pytest.raises(UserError, match="does not end in"):
        answers.numbers_in(tmp_path / "chats.txt")


def test_the_engine_of_the_answers_has_a_valid_configuration() -> None:
    config = configuration.load(None, answers.engine_fields("model", Sampling(seed=3)))
    assert (config.engine.seed, config.engine.max_num_seqs) == (3, answers.ANSWERS_AT_ONCE)
