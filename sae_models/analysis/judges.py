"""Whether a text is on a topic, without a language model as judge: classifiers of passages labelled by topic.

Two judges read different things: word n-grams, and the mean token embedding of another model. Each is a multinomial
logistic regression whose probability of each topic is calibrated by isotonic regression on other sections. A text is on
a topic as far as the less convinced of the two says.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from rudder.sae_models.activations.corpus import Document
from rudder.sae_models.tokens import text_encoder

Represent = Callable[[Sequence[str]], Tensor]
Floats = NDArray[np.float64]
# Words of a generated text; and of a text to train on: longer ones tell more per row.
PASSAGE_WORDS, TRAINING_WORDS = 45, 200
VOCABULARY = 5000
MIN_PASSAGES = 3
STEPS = 40
# L2 penalty on the weights of a regression, per judge: sparse n-grams have norm 1, embeddings unit variance.
NGRAM_PENALTY, EMBEDDING_PENALTY = 2e-5, 1e-3


@dataclass(frozen=True)
class Passages:
    """Texts [n] with the topic of each, as an index into `topics`."""

    texts: Sequence[str]
    label: Tensor
    topics: Sequence[str]


@dataclass(frozen=True)
class Steps:
    """A non-decreasing map of probabilities, as the points between which it is interpolated."""

    x: Floats
    y: Floats

    def __call__(self, value: Tensor) -> Tensor:
        return torch.from_numpy(np.interp(value.double().numpy(), self.x, self.y)).float()


@dataclass(frozen=True)
class Judge:
    """A multinomial logistic regression on representations, weights [features, topics], bias [topics], calibrated."""

    represent: Represent
    weights: Tensor
    bias: Tensor
    calibration: tuple[Steps, ...] = ()

    def raw(self, texts: Sequence[str]) -> Tensor:
        """Return the probabilities [n, topics] of the regression itself."""
        return (self.represent(texts) @ self.weights + self.bias).softmax(1)

    def probability(self, texts: Sequence[str]) -> Tensor:
        """Return calibrated probabilities [n, topics], each of its topic against all others."""
        raw = self.raw(texts)
        return torch.stack([steps(raw[:, topic]) for topic, steps in enumerate(self.calibration)], 1)


@dataclass(frozen=True)
class Panel:
    """Two judges of the same topics."""

    judges: tuple[Judge, ...]
    topics: tuple[str, ...]

    def response(self, texts: Sequence[str], topic: str, without: Collection[str] = ()) -> Tensor:
        """Return how far each text [n] is on a topic: the smaller of the judges' probabilities.

        `without`: words that are taken out of the texts first, so that naming the steered latents' own words is not
        enough.
        """
        read = [without_words(text, without) for text in texts] if without else texts
        column = self.topics.index(topic)
        return torch.stack([judge.probability(read)[:, column] for judge in self.judges]).amin(0)

    def agreement(self, texts: Sequence[str]) -> float:
        """Return the share of texts for which the judges find the same topic most likely."""
        first, *others = (judge.probability(texts).argmax(1) for judge in self.judges)
        return float(torch.stack([other == first for other in others]).all(0).float().mean())

    def accuracy(self, passages: Passages) -> list[float]:
        """Return each judge's accuracy on labelled passages."""
        found = (judge.probability(passages.texts).argmax(1) for judge in self.judges)
        return [float((best == passages.label).float().mean()) for best in found]


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return re.findall(r"[a-z]+", text.lower())


def without_words(text: str, words: Collection[str]) -> str:
    """Return a text without every word that begins with one of these."""
    prefixes = tuple(word.lower() for word in words)
    return " ".join(word for word in text.split() if not re.sub(r"[^a-z]", "", word.lower()).startswith(prefixes))


def passages_of(
    documents: Sequence[Document], folds: Collection[int], limit: int, words: int = PASSAGE_WORDS
) -> Passages:
    """Cut documents in these folds into passages of so many words; take up to `limit` of each book, at random."""
    topics = sorted({document.book for document in documents})
    generator, texts, labels = torch.Generator().manual_seed(0), list[str](), list[int]()
    for number, topic in enumerate(topics):
        own = [d for d in documents if d.book == topic and d.fold in folds]
        found = [passage for document in own for passage in cut(document.text, words)]
        chosen = torch.randperm(len(found), generator=generator)[:limit].tolist()
        texts += [found[index] for index in chosen]
        labels += [number] * len(chosen)
    return Passages(texts, torch.tensor(labels), topics)


def cut(text: str, size: int = PASSAGE_WORDS) -> list[str]:
    """Return the passages of a text that have `size` words; a shorter text is one passage."""
    words = text.split()
    starts = range(0, max(len(words) - size, 0) + 1, size)
    return [" ".join(words[start : start + size]) for start in starts if words]


def ngram_reader(texts: Sequence[str]) -> Represent:
    """Return a reader of word unigrams and bigrams, weighted by log counts and inverse frequency in `texts`."""
    seen = Counter(gram for text in texts for gram in set(ngrams(text)))
    kept = [gram for gram, count in seen.most_common(VOCABULARY) if count >= MIN_PASSAGES]
    column = {gram: number for number, gram in enumerate(kept)}
    rarity = torch.tensor([len(texts) / seen[gram] for gram in kept]).log()

    def represent(read: Sequence[str]) -> Tensor:
        result = torch.zeros(len(read), len(column))
        for row, text in zip(result, read, strict=True):
            counts = Counter(column[gram] for gram in ngrams(text) if gram in column)
            row[list(counts)] = torch.tensor(list(counts.values()), dtype=torch.float)
        return functional.normalize(result.log1p() * rarity, dim=1)

    return represent


def ngrams(text: str) -> list[str]:
    """Return the words of a text, and its pairs of neighbouring words."""
    words = words_of(text)
    return [*words, *(f"{first} {second}" for first, second in pairwise(words))]


def embedding_reader(model: Any, tokenizer: Any, texts: Sequence[str]) -> Represent:
    """Return a reader of mean token embeddings of a model, standardised on `texts`."""
    table, encoder = model.get_input_embeddings().weight.detach().float(), text_encoder(tokenizer)

    def mean(text: str) -> Tensor:
        ids = encoder.encode(text)
        return table[ids].mean(0) if ids else torch.zeros(table.shape[1])

    sample = torch.stack([mean(text) for text in texts])
    centre, scale = sample.mean(0), sample.std(0).clamp_min(1e-6)
    return lambda read: (torch.stack([mean(text) for text in read]) - centre) / scale


def fit_panel(readers: Sequence[tuple[Represent, float]], train: Passages, held_out: Passages) -> Panel:
    """Fit a judge per (reader, L2 penalty) on passages, and calibrate it on passages of other sections."""
    judges = (fit(represent, train, penalty) for represent, penalty in readers)
    return Panel(tuple(calibrated(judge, held_out) for judge in judges), tuple(train.topics))


def fit(represent: Represent, train: Passages, penalty: float) -> Judge:
    """Fit a multinomial logistic regression, all topics with equal weight."""
    x, topics = represent(train.texts), len(train.topics)
    weight = 1.0 / train.label.bincount(minlength=topics).clamp_min(1).float()
    parameters = torch.zeros(x.shape[1] + 1, topics, requires_grad=True)
    optimiser = torch.optim.LBFGS([parameters], max_iter=STEPS, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimiser.zero_grad()
        loss = functional.cross_entropy(x @ parameters[:-1] + parameters[-1], train.label, weight=weight)
        loss = loss + penalty * parameters[:-1].square().sum()
        loss.backward()
        return loss

    optimiser.step(objective)
    fitted = parameters.detach()
    return Judge(represent, fitted[:-1], fitted[-1])


def calibrated(judge: Judge, held_out: Passages) -> Judge:
    """Return a judge with the isotonic regression of each topic's label on its probability."""
    raw = judge.raw(held_out.texts).double().numpy()
    label = held_out.label.numpy()
    steps = tuple(isotonic(raw[:, topic], label == topic) for topic in range(raw.shape[1]))
    return Judge(judge.represent, judge.weights, judge.bias, steps)


def isotonic(x: Floats, y: NDArray[np.bool_]) -> Steps:
    """Return the isotonic regression of y on x, by pooling adjacent violators (Ayer et al. 1955)."""
    # Of equal x, the true ones first: they are pooled with the others.
    order = np.lexsort((~y, x))
    blocks = list[tuple[float, float, float]]()  # sum of y, count, largest x
    for value, truth in zip(x[order].tolist(), y[order].tolist(), strict=True):
        total, count, top = float(truth), 1.0, value
        while blocks and blocks[-1][0] / blocks[-1][1] >= total / count:
            before = blocks.pop()
            total, count = total + before[0], count + before[1]
        blocks.append((total, count, top))
    return Steps(np.array([top for _, _, top in blocks]), np.array([total / count for total, count, _ in blocks]))
