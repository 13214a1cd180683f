"""`rudder eval guards`: prompts within limits, what it cannot use, and a whole run on a small corpus."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from google.protobuf.json_format import ParseDict

from rudder.sae_models.analysis.exchanges import Exchange, Prompt
from rudder.sae_models.errors import UserError
from rudder.server import cli
from rudder.server.cli.eval import guards
from rudder.v1 import policy_pb2
from tests.unit.tiny import save_corpus


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"prompt {i}", float(i % 4 == 0), ("train", "report")[i % 2], "", i) for i in range(count)]


def test_prompts_are_limited_by_split_and_class() -> None:
    kept = guards.limited(prompts(40), 3, 2)
    assert Counter((prompt.split, prompt.label) for prompt in kept) == {
        ("train", 1.0): 2,
        ("train", 0.0): 2,
        ("report", 0.0): 3,
    }


def test_padded_prompts_end_as_they_are_and_are_padded_with_training_texts() -> None:
    given = prompts(40)
    found = guards.padded_prompts(given, 3)
    plain, behind = found["0"], found[f"{guards.PADDING_CHARACTERS} characters"]
    assert [prompt.label for prompt in plain] == [prompt.label for prompt in behind]
    training = {prompt.text for prompt in given if prompt.split == "train" and prompt.label == 0}
    for before, after in zip(plain, behind, strict=True):
        padding, _, text = after.text.rpartition("\n\n")
        assert text == before.text
        assert set(padding.split("\n")) <= training


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "corpus, prompts: one of them says what to measure guards on"),
        (["--prompts", "x.jsonl"], "chat-model, chat-bundle: --prompts needs the model that reads them"),
        (["--corpus", "nowhere.jsonl"], "nowhere.jsonl: line 1: [Errno 2]"),
    ],
)
def test_what_cannot_be_used_is_named(
    tmp_path: Path, arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", "guards", "--json", str(tmp_path / "figures.json"), *arguments]) == 2
    assert problem in capsys.readouterr().err


def test_sections_that_are_too_short_are_named() -> None:
    short = Exchange((1, 2, 3), 1.0, "book", "book/1", "report")
    with pytest.raises(UserError, match="corpus: too few sections of the report split have 1000 tokens"):
        guards.padded(None, [short])  # type: ignore[arg-type]


@pytest.mark.long
def test_a_run_on_a_small_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "LONGEST", 50)
    monkeypatch.setattr(guards, "EXCERPT", 16)
    monkeypatch.setattr(guards, "PADDINGS", {"0": (0, 0), "400": (32, 0)})
    corpus = save_corpus(tmp_path / "corpus.jsonl", 1200)
    out = tmp_path / "figures.json"
    folder = ["--guards", str(tmp_path / "guards")]
    books = ["--topic", "book0", "--neighbour", "book1", "--windows", "60", "--seeds", "2"]
    assert cli.main(["eval", "guards", "--json", str(out), "--corpus", str(corpus), *books, *folder]) == 0
    found = json.loads(out.read_text())["topic"]
    for name, arm in (("book0", "residual_probe"), ("book0-token-ids", "token_ids")):
        content = yaml.safe_load((tmp_path / "guards" / f"{name}.yaml").read_text())
        assert ParseDict(content, policy_pb2.Guard()).level == pytest.approx(found["arms"][arm]["level"], rel=1e-5)
    assert len(found["seeds"]) == 2
    for figures in found["arms"].values():
        assert figures["auroc"]["low"] <= figures["auroc"]["value"] <= figures["auroc"]["high"]
        assert set(figures["padding"]) == {"0", "400"}
    assert found["arms"]["residual_probe"]["auroc"]["value"] > 0.7
    assert set(found["arms"]["residual_probe"]["released"]) == {"tokens", "0", "4", "8", "16"}
