"""`rudder probe train` on a tiny random model: it writes a Guard of the contract, and names what it cannot use."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from google.protobuf.json_format import ParseDict

from rudder.sae_models import token_model
from rudder.sae_models.activations import corpus
from rudder.sae_models.activations.harvest import load_tokenizer
from rudder.sae_models.analysis import exchanges, guard_training
from rudder.sae_models.analysis.derive import Topic
from rudder.sae_models.analysis.exchanges import TUNE
from rudder.sae_models.token_model import vocabulary_sha256
from rudder.server import cli
from rudder.v1 import policy_pb2, program_pb2
from tests.unit.tiny import WORDS, save_corpus, save_model

SITES = ["--site", "layers.1.resid_post", "--site", "layers.0.resid_post"]
FAST = ["--seeds", "2", "--windows", "60", "--false-alarms", "0.05"]
TOPIC = ["--topic", "book0", "--neighbour", "book1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a corpus of two books, and labelled prompts."""
    path = tmp_path_factory.mktemp("probe")
    save_model(path / "model")
    save_corpus(path / "corpus.jsonl", 400)
    with (path / "prompts.jsonl").open("w") as file:
        for number in range(200):
            words = [WORDS[(number + i) % 6 + 7 * (number % 2)] for i in range(12)]
            file.write(json.dumps({"text": " ".join(words), "harmful": bool(number % 2)}) + "\n")
    return path


def train(folder: Path, *arguments: str) -> int:
    return cli.main(["probe", "train", "--model", str(folder / "model"), *SITES, *FAST, *arguments])


def read_guard(path: Path) -> tuple[dict[str, Any], policy_pb2.Guard]:
    content = yaml.safe_load(path.read_text())
    return content, ParseDict(content, policy_pb2.Guard())


def test_a_guard_of_a_topic(folder: Path) -> None:
    out, report = folder / "guard.yaml", folder / "report.json"
    arguments = ["--corpus", str(folder / "corpus.jsonl"), *TOPIC, "--out", str(out), "--report", str(report)]
    assert train(folder, *arguments) == 0
    content, guard = read_guard(out)
    assert guard.name == "book0"
    assert [(term.site, len(term.row.probe.weights)) for term in guard.score.terms] == [
        ("layers.0.resid_post", 16),
        ("layers.1.resid_post", 16),
    ]
    assert guard.moving_average.decay == pytest.approx(0.12)
    figures = json.loads(report.read_text())
    assert len(figures["seeds"]) == 2
    assert all(each["auroc"]["value"] > 0.7 for each in (*figures["guards"], *figures["seeds"]))
    # The level is that of the benign tuning texts, by the scores that a server computes from the file.
    weights = [torch.tensor(term["row"]["probe"]["weights"]) for term in content["score"]["terms"]]
    highest = []
    rig = guard_training.load_rig(folder / "model", ["layers.0.resid_post", "layers.1.resid_post"])
    documents = corpus.read(folder / "corpus.jsonl")
    topic = Topic(("book0",))
    benign = exchanges.of_corpus(documents, rig.tokenizer, topic, TUNE, 1000, {"book1": 1000})
    for x, _ in rig.features(benign, "test"):
        state, top = 0.0, -np.inf
        for score in (x @ torch.cat(weights) + guard.score.bias).tolist():
            state = 0.88 * state + 0.12 * score
            top = max(top, state)
        highest.append(top)
    # Texts of this corpus repeat, so scores tie, but for the rounding of a product in float32.
    assert np.mean(np.array(highest) > guard.level + 1e-5) <= 0.05
    assert np.min(np.abs(np.array(highest) - guard.level)) < 1e-3


def test_a_policy_from_prompts(folder: Path) -> None:
    out = folder / "policy.yaml"
    prompts = ["--prompts", str(folder / "prompts.jsonl"), "--text", "--out", str(out), "--policy"]
    assert train(folder, *prompts, "--token-model", str(folder / "tokens.safetensors")) == 0
    policy = ParseDict(yaml.safe_load(out.read_text()), policy_pb2.Policy())
    assert (policy.name, policy.version, policy.binds.all) == ("prompts", 1, True)
    # Levels of requests say nothing about the tokens of answers.
    assert [guard.phase for guard in policy.guards] == [program_pb2.PHASE_PROMPT] * 2
    assert [guard.action for guard in policy.guards] == [policy_pb2.GUARD_ACTION_REJECT] * 2
    file = policy.guards[1].score.token_model
    model = token_model.load(folder / file.file, file.sha256)
    tokenizer = load_tokenizer(folder / "model")
    assert model.vocabulary == vocabulary_sha256(tokenizer.get_vocab())
    hazard, benign = (model.scores(tokenizer.encode(" ".join(words))) for words in (WORDS[7:12], WORDS[:6]))
    assert hazard[1:].mean() > 0 > benign[1:].mean()
    assert "false alarms" in policy.description


BAD_PROMPTS = {
    "line 2: text": {"harmful": True},
    "line 2: harmful or label": {"text": "x", "harmful": "yes"},
    "line 2: split": {"text": "x", "label": 0.5, "split": "test"},
}


@pytest.mark.parametrize("problem", BAD_PROMPTS)
def test_a_prompt_that_cannot_be_used_is_named(
    folder: Path, tmp_path: Path, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in ({"text": "x", "label": 0}, BAD_PROMPTS[problem])))
    assert train(folder, "--prompts", str(path), "--text", "--out", str(tmp_path / "g.yaml")) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--topic", "geology"], "topic: the corpus has no book geology; it has book0, book1"),
        (["--topic", "book0", "--neighbour", "book0"], "neighbour: book0 is the topic"),
        ([], "topic: --corpus needs the book to notice"),
        (["--topic", "book0", "--false-alarms", "0.001"], "false_alarms: 0.001 takes 999 benign exchanges"),
    ],
)
def test_what_does_not_fit_is_named(
    folder: Path, tmp_path: Path, arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ["--corpus", str(folder / "corpus.jsonl")]
    assert train(folder, *source, *arguments, "--out", str(tmp_path / "g.yaml")) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "g.yaml").exists()


def test_one_class_alone_trains_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"text {i}", "label": 0}) for i in range(10)))
    assert train(folder, "--prompts", str(path), "--text", "--out", str(tmp_path / "g.yaml")) == 2
    assert "label: no positive exchange to train on" in capsys.readouterr().err
