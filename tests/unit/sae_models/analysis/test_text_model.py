"""TF-IDF by hand, and that the classifier learns the words that tell."""

import math

import numpy as np
import pytest
import torch

from rudder.sae_models.analysis.text_model import fit_text, terms_of, vector


def test_terms_are_words_and_pairs() -> None:
    assert terms_of("The cell, the CELL a") == {"the": 2, "cell": 2, "the cell": 2, "cell the": 1}


def test_vectors_by_hand() -> None:
    idf = np.array([2.0, 1.0])
    index, value = vector("cell cell wall unknown", {"cell": 0, "wall": 1}, idf)
    assert index == [0, 1]
    assert value == pytest.approx(np.array([4.0, 1.0]) / math.sqrt(17))
    assert vector("unknown", {"cell": 0}, idf)[1].tolist() == []


def test_the_words_that_tell_are_learned() -> None:
    texts = [f"text {'virus' if i % 2 else 'king'} number{i % 7}" for i in range(40)]
    model = fit_text(texts, torch.tensor([float(i % 2) for i in range(40)]), torch.ones(40))
    noticed, benign, unknown = model.scores(["a virus", "a king", "something else"])
    assert noticed > 0 > benign
    assert unknown == model.bias
    # Terms of one text alone are not learned from.
    assert "number0" in model.terms
    assert "number1 text" not in model.terms
