"""A real instruct model: it answers as Transformers does, and its programs do what they say, by numbers.

Bounds are loose: the questions are not those by which the programs were chosen.
"""

import math
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rudder.server.models import known, served
from rudder.server.models.package import DownloadError
from rudder_client import Client, Report
from rudder_client.requests import Chat
from tests.e2e.conftest import Running, running
from tests.e2e.documents import not_shown

pytestmark = [pytest.mark.e2e, pytest.mark.network]
TEXT = "Tuberculosis is caused by a bacterium, and the Moon goes round the Earth once a month."
# Mean log-probability of a token, in nats, that the plain model gives to what is language, if not its own.
LANGUAGE = -3.0
ABOUT_SKY = "The stars and planets of the galaxy can be seen with a telescope."
# Pairs of a question and what the model knows.
MICROBIOLOGY = (
    ("What kind of disease is tuberculosis?", "Tuberculosis is a bacterial infection of the lungs."),
    ("What do antibiotics do?", "Antibiotics kill bacteria or stop them from growing."),
    ("What is a virus?", "A virus is a tiny infectious agent that replicates inside living cells."),
)
OTHER = (
    ("What is the capital of Spain?", "The capital of Spain is Madrid."),
    ("What does a baker do?", "A baker makes bread and cakes."),
    ("Who wrote Hamlet?", "Hamlet was written by William Shakespeare."),
)
NEIGHBOURS = (
    ("What does the liver do?", "The liver cleans the blood and makes bile."),
    ("What causes diabetes?", "Diabetes is caused by a lack of insulin, or by cells that do not respond to it."),
    ("How do plants make food?", "Plants make sugar from water, carbon dioxide and sunlight."),
)


@pytest.fixture(scope="module")
def model() -> Path:
    try:
        return known.get(served.INSTRUCT)
    except DownloadError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def smollm2(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of what the demo shows."""
    served.require_programs()
    fields = served.fields_of(served.INSTRUCT, pytest.fail) | {"engine.max_model_len": "1024", "watch": "[]"}
    assert fields["engine.model"] == str(model)
    with running(tmp_path_factory.mktemp("smollm2"), **fields) as started:
        yield started


@pytest.fixture(scope="module")
def chat(smollm2: Running) -> Iterator[Client]:
    with Client(smollm2.address, timeout=120) as connected:
        yield connected


def question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def log_prob(client: Client, asked: str, answer: str, steer: str | None = None) -> float:
    """Return the mean log-probability of an answer's tokens, in nats."""
    messages = [*question(asked), {"role": "assistant", "content": answer}]
    begun = len(client.tokenize(question(asked)))
    whole = Chat(messages, continue_final_message=True)
    choice = client.complete(whole, steer=steer, max_tokens=1, prompt_logprobs=0).choices[0]
    assert choice.prompt_logprobs is not None
    return statistics.fmean(choice.prompt_logprobs.chosen[begun - 1 :])


def reply(client: Client, asked: str, steer: str | None = None) -> str:
    return client.complete(question(asked), steer=steer, temperature=0.0, max_tokens=40).choices[0].text


def difference(client: Client, pairs: Sequence[tuple[str, str]], steer: str) -> list[float]:
    """Return what a program adds to the log-probability of each answer."""
    return [log_prob(client, *pair, steer) - log_prob(client, *pair) for pair in pairs]


def test_log_probabilities_are_those_of_transformers(chat: Client, model: Path) -> None:
    ids = [token.id for token in chat.tokenize(TEXT)]
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
    choice = chat.complete(ids, max_tokens=1, prompt_logprobs=0).choices[0]
    assert choice.prompt_logprobs is not None
    wanted = [float(expected[place, token]) for place, token in enumerate(ids[1:])]
    assert choice.prompt_logprobs.chosen == pytest.approx(wanted, abs=2e-3)


def test_chat_is_written_in_the_model_s_template(chat: Client, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer.apply_chat_template(question("Hello?"), add_generation_prompt=True, return_dict=False)
    assert [token.id for token in chat.tokenize(question("Hello?"))] == list(ids)


def test_answer_is_streamed_and_ends_by_itself(chat: Client) -> None:
    asked = question("What is the capital of France? Answer in one word.")
    chunks = list(chat.generate(asked, temperature=0.0, max_tokens=60, stream_interval=1))
    assert len(chunks) > 2
    assert "Paris" in "".join(chunk.text for chunk in chunks)
    assert chunks[-1].finish_reason == "stop"


@pytest.mark.parametrize(("ending", "least"), [("-light", 0.2), ("", 0.4)])
def test_topic_comes_into_answers_that_stay_language(chat: Client, ending: str, least: float) -> None:
    asked, program = "How do you feel today?", f"more-astronomy{ending}"
    assert difference(chat, [(asked, ABOUT_SKY)], program)[0] > least
    assert log_prob(chat, asked, reply(chat, asked, program)) > LANGUAGE


def test_topic_leaves_answers(chat: Client) -> None:
    asked = "What do astronomers study?"
    assert difference(chat, [(asked, ABOUT_SKY)], "less-astronomy")[0] < -0.2
    assert log_prob(chat, asked, reply(chat, asked, "less-astronomy")) > LANGUAGE


def test_answers_on_microbiology_are_forgotten_and_others_are_not(chat: Client) -> None:
    assert statistics.fmean(difference(chat, MICROBIOLOGY, "forget-microbiology")) < -0.5
    assert statistics.fmean(map(abs, difference(chat, OTHER, "forget-microbiology"))) < 0.1
    assert statistics.fmean(map(abs, difference(chat, NEIGHBOURS, "forget-microbiology"))) < 0.2
    for asked, _ in (*MICROBIOLOGY, *OTHER, *NEIGHBOURS):
        assert log_prob(chat, asked, reply(chat, asked, "forget-microbiology")) > LANGUAGE


def test_labelled_features_are_watched(chat: Client) -> None:
    tokens = chat.inspect(TEXT, report=Report(top_k=16)).tokens
    assert any(a.feature.label for token in tokens for a in token.activations)
    assert all(math.isfinite(a.value) for token in tokens for a in token.activations)


def test_tour_of_it_is_as_the_readme_shows_and_leaves_other_topics_alone(smollm2: Running) -> None:
    """Nearly: processors round differently, so an answer may take another turn."""
    metrics = f"http://127.0.0.1:{smollm2.metrics_port}/metrics"
    command = [sys.executable, "-m", "rudder_client.tour", smollm2.address, metrics]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same, letter by letter") == 3
    assert not_shown(done.stdout) <= 0.5, done.stdout
