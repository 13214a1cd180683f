"""Judges of topics: they learn topics, are calibrated, and do not fall for words that are taken out."""

import numpy as np
import pytest
import torch

from rudder.sae_models.activations.corpus import Document
from rudder.sae_models.analysis import judges
from rudder.sae_models.analysis.judges import Judge, Panel, Passages, Steps, isotonic

STARS = ("star planet orbit comet", "galaxy star telescope moon", "moon orbit planet star")
CELLS = ("cell membrane protein virus", "virus host cell nucleus", "protein nucleus cell host")


def passages(repeat: int = 4) -> Passages:
    texts = [*STARS, *CELLS] * repeat
    return Passages(texts, torch.tensor([0, 0, 0, 1, 1, 1] * repeat), ["astronomy", "biology"])


def judge() -> Judge:
    train = passages()
    return judges.calibrated(judges.fit(judges.ngram_reader(train.texts), train, 1e-4), passages(2))


def test_a_judge_tells_topics_apart() -> None:
    probability = judge().probability(["the moon and a comet", "a protein of the host"])
    assert probability.argmax(1).tolist() == [0, 1]
    assert probability.amax(1).min() > 0.9


def test_the_less_convinced_judge_decides() -> None:
    sceptic = Judge(lambda texts: torch.zeros(len(texts), 1), torch.zeros(1, 2), torch.zeros(2), (Steps(
        np.array([0.5]), np.array([0.3])), Steps(np.array([0.5]), np.array([0.2]))))  # fmt: skip
    panel = Panel((judge(), sceptic), ("astronomy", "biology"))
    assert panel.response(["star planet"], "astronomy").tolist() == pytest.approx([0.3])
    assert panel.response(["cell virus"], "astronomy").item() < 0.1


def test_words_that_are_taken_out_do_not_count() -> None:
    panel = Panel((judge(),), ("astronomy", "biology"))
    text = ["star stars Star, cell"]
    assert panel.response(text, "astronomy").item() > 0.5
    assert panel.response(text, "astronomy", without=["star"]).item() < 0.5


def test_isotonic_regression_is_the_best_monotone_fit() -> None:
    steps = isotonic(np.array([0.1, 0.2, 0.3, 0.4]), np.array([False, True, False, True]))
    found = steps(torch.tensor([0.05, 0.1, 0.2, 0.3, 0.4, 0.9])).tolist()
    assert found == pytest.approx([0, 0, 0.25, 0.5, 1, 1], abs=1e-6)


def test_isotonic_regression_pools_equal_values() -> None:
    steps = isotonic(np.array([0.5, 0.5]), np.array([False, True]))
    assert steps(torch.tensor([0.5])).tolist() == [0.5]


def test_isotonic_regression_never_falls() -> None:
    generator = np.random.default_rng(0)
    x = generator.random(200)
    steps = isotonic(x, generator.random(200) < x)
    values = steps(torch.linspace(0, 1, 101))
    assert (values.diff() >= 0).all()
    assert abs(float(values[50]) - 0.5) < 0.25


def test_passages_are_of_the_folds_and_limited_by_book() -> None:
    documents = [Document("a", str(n), "word " * 100) for n in range(40)] + [Document("b", "1", "short text")]
    folds = {document.fold for document in documents}
    found = judges.passages_of(documents, folds, limit=7)
    assert found.topics == ["a", "b"]
    assert found.label.tolist() == [0] * 7 + [1]
    assert all(len(text.split()) == judges.PASSAGE_WORDS for text in found.texts[:7])
    assert len(judges.passages_of(documents[:40], {documents[0].fold}, 1000).texts) == 2 * sum(
        document.fold == documents[0].fold for document in documents[:40]
    )


def test_agreement_is_the_share_of_equal_verdicts() -> None:
    one = judge()
    flipped = Judge(one.represent, -one.weights, -one.bias, one.calibration)
    assert Panel((one, one), ("astronomy", "biology")).agreement(STARS) == 1
    assert Panel((one, flipped), ("astronomy", "biology")).agreement(STARS) == 0
    assert Panel((one, flipped), ("astronomy", "biology")).accuracy(passages()) == [1.0, 0.0]
