"""`rudder classify` on the demo model: a classifier is trained, written with its record, and measured again."""

import json
from pathlib import Path

import pytest

from rudder.sae_models import PRETRAINED
from rudder.server.cli import main

MODEL, BUNDLE = PRETRAINED / "textbook-lm", PRETRAINED / "textbook-lm-layers.2"
TEXTS = (
    "The bacterium number {} has a cell wall, and its virus infects the host cell.",
    "The king number {} levied a tax, and the parliament of the colony refused it.",
)
SPLITS = ("train", "train", "train", "tune", "report")


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    lines = [
        {"text": TEXTS[number % 2].format(number), "label": number % 2 == 0, "split": SPLITS[number // 2 % 5]}
        for number in range(100)
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return ["--model", str(MODEL), "--bundle", str(BUNDLE), "--prompts", str(prompts), "--text"]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["logistic", "tree"])
def test_classifier_is_trained_and_measured(kind: str, arguments: list[str], tmp_path: Path) -> None:
    made, figures = tmp_path / "made.json", tmp_path / "figures.json"
    train = ["classify", "train", *arguments, "--kind", kind, "--forbid", "7", "--latents", "4", "--out", str(made)]
    assert main(train) == 0
    document = json.loads(made.read_text())
    assert (document["forbidden"], len(document["latents"])) == ([7], 4)
    assert document["record"]["texts"] == {"train": [30, 30], "tune": [10, 10], "report": [10, 10]}
    assert main(["classify", "eval", str(made), *arguments, "--json", str(figures)]) == 0
    measured = json.loads(figures.read_text())
    assert measured == document["record"]["figures"]
    assert measured["auroc"]["value"] > 0.9


def test_latent_that_the_bundle_does_not_have_is_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rudder.sae_models.analysis.guard_training.load_rig", lambda *_: None)
    out = ["--out", str(tmp_path / "made.json")]
    assert main(["classify", "train", *arguments, "--forbid", "99999", *out]) == 2
    assert "forbid: textbook-lm-layers.2 has latents 0 to" in " ".join(capsys.readouterr().err.split())
