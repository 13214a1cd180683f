"""A text classifier that reads no model: logistic regression on TF-IDF of words and pairs of words.

What a probe finds means little where this finds it too. Defined as scikit-learn's TfidfVectorizer defines it by default
(Pedregosa et al. 2011): idf = ln((1 + n) / (1 + df)) + 1, each text of norm 1.
"""

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rudder.sae_models.statistics import Floats

WORD = re.compile(r"\b\w\w+\b")
# A term that fewer texts have is not learned from.
MIN_TEXTS = 2
PENALTY = 1e-5
STEPS = 100


@dataclass(frozen=True)
class TextModel:
    """score = bias + sum over the terms of a text of their TF-IDF times their weight. `idf`, `weights` [terms]."""

    terms: Mapping[str, int]
    idf: Floats
    weights: Floats
    bias: float

    def scores(self, texts: Sequence[str]) -> Floats:
        """Return the score of each text [n]."""
        return np.array([self._score(text) for text in texts])

    def _score(self, text: str) -> float:
        index, value = vector(text, self.terms, self.idf)
        return float(value @ self.weights[index]) + self.bias


def terms_of(text: str) -> Counter[str]:
    """Count the words of a text, and the pairs of words that follow one another."""
    words = WORD.findall(text.lower())
    return Counter([*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))])


def vector(text: str, terms: Mapping[str, int], idf: Floats) -> tuple[list[int], Floats]:
    """Return the known terms of a text, and the TF-IDF of each, of norm 1 in all."""
    counts = {terms[term]: count for term, count in terms_of(text).items() if term in terms}
    value = np.array(list(counts.values()), np.float64) * idf[list(counts)]
    return list(counts), value / max(float(np.linalg.norm(value)), 1e-12)


def fit_text(texts: Sequence[str], label: Tensor, weight: Tensor, penalty: float = PENALTY) -> TextModel:
    """Fit a model to texts [n] with labels [n] and weights [n], by L-BFGS. `penalty`: L2, on the weights."""
    frequency = Counter(term for text in texts for term in terms_of(text))
    terms = {term: i for i, term in enumerate(sorted(t for t, count in frequency.items() if count >= MIN_TEXTS))}
    known = np.array([frequency[term] for term in terms], np.float64)
    idf = np.log((1 + len(texts)) / (1 + known)) + 1
    vectors = [vector(text, terms, idf) for text in texts]
    index = torch.tensor([i for indices, _ in vectors for i in indices])
    values = torch.from_numpy(np.concatenate([value for _, value in vectors])).float()
    offsets = torch.tensor([0, *(len(indices) for indices, _ in vectors)]).cumsum(0)[:-1]
    parameters = torch.zeros(len(terms) + 1, requires_grad=True)
    optimiser = torch.optim.LBFGS([parameters], max_iter=STEPS, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimiser.zero_grad()
        table = parameters[:-1, None]
        z = functional.embedding_bag(index, table, offsets, mode="sum", per_sample_weights=values)[:, 0]
        loss = functional.binary_cross_entropy_with_logits(z + parameters[-1], label, weight)
        loss = loss + penalty * parameters[:-1].square().sum()
        loss.backward()
        return loss

    optimiser.step(objective)
    weights = parameters.detach().double().numpy()
    return TextModel(terms, idf, weights[:-1], float(weights[-1]))
