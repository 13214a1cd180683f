"""`rudder bundle label` writes labels and scores of an existing bundle, and leaves the rest of it as it is."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from rudder.sae_models import PRETRAINED
from rudder.sae_models.bundle import bundle, revision
from rudder.sae_models.bundle.bundle import Bundle
from rudder.server.cli import bundle as command
from rudder.server.cli import main

MODEL, SHIPPED = PRETRAINED / "textbook-lm", PRETRAINED / "textbook-lm-layers.2"
FOREIGN = 7


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Contexts of the shipped catalogue, as a corpus of 300 documents."""
    shipped = bundle.load(SHIPPED)
    found = [context for index in range(1500) for context in shipped.catalogue.get(index).contexts[:2]]
    shipped.catalogue.close()
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    with path.open("w") as file:
        for number in range(0, len(found), 10):
            text = "\n".join(c.before + c.token + c.after for c in found[number : number + 10])
            file.write(json.dumps({"book": found[number].source, "module": str(number), "text": text}) + "\n")
    return path


def label(path: Path, corpus: Path, model: Path = MODEL) -> int:
    """Run the command."""
    return main(["bundle", "label", str(path), "--model", str(model), "--corpus", str(corpus), "--tokens", "20000"])


@pytest.fixture(scope="module")
def labelled(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The shipped bundle, labelled anew; somebody else wrote the label of one latent."""
    path = Path(shutil.copytree(SHIPPED, tmp_path_factory.mktemp("relabel") / "toy"))
    opened = bundle.load(path)
    latents = [opened.catalogue.get(index) for index in range(opened.manifest.latents)]
    summary = latents[FOREIGN].summary
    latents[FOREIGN] = type(latents[0])(type(summary)(FOREIGN, "of others", 0.5, 1.0, "neuronpedia"), (), ())
    revision.write(opened, latents, opened.measured).catalogue.close()
    assert label(path, corpus) == 0
    return bundle.load(path)


def test_labels_and_scores_are_new(labelled: Bundle) -> None:
    page = labelled.catalogue.page(-1, 4096)
    scored = [summary for summary in page if summary.label_score is not None]
    assert len(scored) > 1000
    assert all(s.label_score - s.label_error > 0.5 for s in scored if s.label and s.label_score and s.label_error)
    assert sum(bool(summary.label) for summary in scored) > 0.3 * len(scored)
    assert labelled.catalogue.get(scored[0].index).neighbours
    assert sum(summary.intervention is not None for summary in page) > 200


def test_sae_and_statistics_stay(labelled: Bundle) -> None:
    shipped = bundle.load(SHIPPED)
    assert torch.equal(labelled.sae.encoder, shipped.sae.encoder)
    assert torch.equal(labelled.statistics.max_activation, shipped.statistics.max_activation)
    assert labelled.manifest.training == shipped.manifest.training
    for index in (0, 1000):
        old, new = shipped.catalogue.get(index), labelled.catalogue.get(index)
        assert (new.summary.frequency, new.quantiles) == (old.summary.frequency, old.quantiles)
    shipped.catalogue.close()


def test_label_of_others_stays_without_scores(labelled: Bundle) -> None:
    summary = labelled.catalogue.get(FOREIGN).summary
    assert (summary.label, summary.origin) == ("of others", "neuronpedia")
    assert (summary.label_score, summary.intervention) == (None, None)


def test_wrong_input_leaves_the_bundle_as_it_is(
    labelled: Bundle, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, before = labelled.path, (labelled.path / "manifest.json").read_bytes()
    assert label(path, tmp_path / "none.jsonl") == 2
    assert "none.jsonl" in capsys.readouterr().err
    assert label(path, corpus, PRETRAINED / "textbook-lm-twin") == command.FAILS
    assert "model.sha256" in capsys.readouterr().err
    assert label(tmp_path / "nothing", corpus) == 2
    assert label(path, corpus, tmp_path) == 2
    assert (path / "manifest.json").read_bytes() == before
