"""`rudder steer scores` writes scores into the catalogue, and leaves the rest of a bundle as it is."""

import shutil
from pathlib import Path

import pytest
import torch

from rudder.sae_models import PRETRAINED, concepts
from rudder.sae_models.activations import harvest
from rudder.sae_models.analysis import scores
from rudder.sae_models.analysis.candidates import scores_of
from rudder.sae_models.analysis.sampling import Voice
from rudder.sae_models.bundle import bundle
from rudder.server.cli import main
from tests.unit.tiny import TEXTBOOK_LM

SHIPPED = PRETRAINED / "textbook-lm-layers.2"


@pytest.mark.long
def test_scores_are_written_and_concepts_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(shutil.copytree(SHIPPED, tmp_path / "toy"))
    (path / concepts.FILE).write_text("kept")
    # In two passes.
    monkeypatch.setattr(scores, "LATENTS_PER_PASS", 2048)
    assert main(["steer", "scores", str(path), "--model", str(TEXTBOOK_LM)]) == 0
    assert "4096 latents scored" in capsys.readouterr().out
    written, shipped = bundle.load(path), bundle.load(SHIPPED)
    assert (path / concepts.FILE).read_text() == "kept"
    assert torch.equal(written.sae.decoder, shipped.sae.decoder)
    voice = Voice(harvest.load_model(TEXTBOOK_LM), harvest.load_tokenizer(TEXTBOOK_LM))
    expected = scores_of(voice, shipped, (3000,))
    summary = written.catalogue.get(3000).summary
    assert summary.output_score == pytest.approx(expected.output[3000], rel=1e-3)
    assert summary.input_score == expected.input[3000]
    assert (summary.label, summary.frequency) == (
        shipped.catalogue.get(3000).summary.label, shipped.catalogue.get(3000).summary.frequency,
    )  # fmt: skip
    best = written.catalogue.search("planet", 3, for_steering=True)
    by_score = [each.output_score or 0 for each in best]
    assert by_score == sorted(by_score, reverse=True)
    for opened in (written, shipped):
        opened.catalogue.close()


def test_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(shutil.copytree(SHIPPED, tmp_path / "toy"))
    assert main(["steer", "scores", str(path), "--model", str(PRETRAINED / "textbook-lm-twin")]) == 2
    assert "model.sha256" in capsys.readouterr().err
