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

pytestmark = [pytest.mark.e2e, pytest.mark.network]
TEXT = "Tuberculosis is caused by a bacterium, and the Moon goes round the Earth once a month."
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


@pytest.fixture(scope="module")
def model() -> Path:
    try:
        return known.get(served.INSTRUCT)
    except DownloadError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def fields(model: Path) -> dict[str, str]:
    """The fields of the demo; those of the model alone where its bundles are not part of the tree."""
    try:
        return served.instruct_fields()
    except served.BundleMissing:
        return {"engine.model": str(model), "engine.bundles": "[]", "engine.sites": "[layers.14.resid_post]"} | {
            "programs.folder": "null"
        }


@pytest.fixture(scope="module")
def smollm2(fields: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    small = {"engine.max_model_len": "1024", "watch": "[]"}
    with running(tmp_path_factory.mktemp("smollm2"), **fields | small) as started:
        yield started


@pytest.fixture(scope="module")
def chat(smollm2: Running) -> Iterator[Client]:
    with Client(smollm2.address, timeout=120) as connected:
        yield connected


@pytest.fixture(scope="module")
def steered(chat: Client) -> Client:
    """The client of a server that has the programs."""
    if not chat.programs():
        pytest.skip("no program of the model is part of this tree")
    return chat


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


@pytest.mark.parametrize("ending", ["-light", ""])
def test_topic_comes_into_answers_that_stay_language(steered: Client, ending: str) -> None:
    rise = log_prob(steered, "How do you feel today?", ABOUT_SKY, f"more-astronomy{ending}") - log_prob(
        steered, "How do you feel today?", ABOUT_SKY
    )
    assert rise > (0.2 if ending else 0.4)
    answer = reply(steered, "How do you feel today?", f"more-astronomy{ending}")
    assert log_prob(steered, "How do you feel today?", answer) > -3


def test_topic_leaves_answers(steered: Client) -> None:
    asked = "What do astronomers study?"
    assert log_prob(steered, asked, ABOUT_SKY, "less-astronomy") < log_prob(steered, asked, ABOUT_SKY) - 0.2
    answer = reply(steered, asked, "less-astronomy")
    assert log_prob(steered, asked, answer) > -3


def test_answers_on_microbiology_are_forgotten_and_others_are_not(steered: Client) -> None:
    assert statistics.fmean(difference(steered, MICROBIOLOGY, "forget-microbiology")) < -0.5
    assert statistics.fmean(map(abs, difference(steered, OTHER, "forget-microbiology"))) < 0.1
    for asked, _ in (*MICROBIOLOGY, *OTHER):
        assert log_prob(steered, asked, reply(steered, asked, "forget-microbiology")) > -3


def test_labelled_features_are_watched(steered: Client) -> None:
    tokens = steered.inspect(TEXT, report=Report(top_k=16)).tokens
    assert any(a.feature.label for token in tokens for a in token.activations)
    assert all(math.isfinite(a.value) for token in tokens for a in token.activations)


@pytest.mark.usefixtures("steered")
@pytest.mark.usefixtures("steered")
def test_tour_of_it_succeeds_and_leaves_other_topics_alone(smollm2: Running) -> None:
    metrics = f"http://127.0.0.1:{smollm2.metrics_port}/metrics"
    command = [sys.executable, "-m", "rudder_client.tour", smollm2.address, metrics]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same, letter by letter") >= 2
