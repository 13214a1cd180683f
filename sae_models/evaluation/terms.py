"""Terms of a label: a word or token on which a latent is active, words before and after it, or where the text is from.

A label is a few terms that its latent's contexts have much more often than other text; each term has a weight, the log
of that ratio. The sum of the weights of the terms that a context has says how well it fits the label.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rudder.sae_models.bundle.catalogue import Summary, split_words, stem
from rudder.sae_models.evaluation.activity import Sample
from rudder.sae_models.evaluation.examples import Floats, Integers
from rudder.sae_models.evaluation.function_words import FUNCTION_WORDS
from rudder.sae_models.tokens import rendered_chats

MAX_TERMS = 6
# Tokens before a position whose words are near it.
NEAR_TOKENS = 16
# Least share of the contexts that a term must have, and that a function word or punctuation must have.
MIN_SHARE, MIN_SHARE_OF_FUNCTION_WORDS = 0.05, 0.5
# Least ratio of a term's frequency in the contexts to that in all text.
MIN_LIFT = 2.0
# What a context counts for further terms once a term has it; least gain of a term, as a share of the first one's.
DISCOUNT, MIN_GAIN = 0.2, 0.12
ABSENT = -1
EXAMPLE_WORDS, EXAMPLE_WORDS_OF_SEVERAL = 3, 2
ORIGIN = "corpus"


class Kind(IntEnum):
    """What a term is about: the token, its whole word, the word before or after, a word nearby, the text's source, the
    shape of the token, or the token before it in the same word.
    """

    TOKEN = 0
    WORD = 1
    BEFORE = 2
    AFTER = 3
    NEAR = 4
    SOURCE = 5
    SHAPE = 6
    INSIDE = 7


# Shapes of tokens, the first that holds; pieces of words have one only if they are not the first.
SHAPES = ("a number", "the rest of a word", "punctuation", "capitals", "a capitalised word")
PREFIXES = {Kind.BEFORE: "after ", Kind.AFTER: "before ", Kind.NEAR: "near "}


@dataclass(frozen=True)
class Term:
    """A term, its weight, and for a token the words that it was in."""

    kind: Kind
    text: str
    weight: float
    key: int
    words: tuple[str, ...] = ()


class Text:
    """The terms of every position of a sample.

    Terms are numbered: kind * size + id, with ids of tokens, words or sources. `rate` [kinds * size]: the share of
    positions that have each.
    """

    def __init__(self, sample: Sample) -> None:
        special = np.isin(sample.windows.tokens.numpy(), sample.tokenizer.all_special_ids)
        self._length = sample.windows.tokens.shape[1]
        self._token = sample.windows.tokens.numpy().ravel()
        self._word = np.where(special, 0, sample.word.numpy()).ravel()
        named = np.array([bool(name) for name in sample.books])
        self._source = np.where(named[sample.book.numpy()], sample.book.numpy(), ABSENT)
        self._words, self._sources = sample.vocabulary, sample.books
        self._token_texts, self._token_ids = fold_case(sample.texts)
        self.size = max(len(sample.texts), len(sample.vocabulary), len(sample.books))
        excluded = FUNCTION_WORDS | template_words(sample.tokenizer)
        content = np.array([len(w) > 1 and w[0].isalpha() and w not in excluded for w in self._words])
        self._content = content
        stems: dict[str, int] = {}
        ids = [stems.setdefault(stem(word), number) for number, word in enumerate(self._words)]
        self._near = np.where(content, ids, ABSENT)
        self._first, self._last = run_bounds(self._word, self._length)
        self._shape = self._shapes(sample.texts)
        self._token = self._token_ids[self._token]
        self.rate = self._rates(sample.windows.counted.numpy().ravel())
        self.needs_majority = self._function_terms()

    def rows(self, positions: Integers) -> Integers:
        """Return the terms [n, 7 + NEAR_TOKENS] of positions; ABSENT where there is none."""
        window_start = positions // self._length * self._length
        first, last = self._first[positions], self._last[positions]
        word = self._word[positions]
        # A token that is a whole word is that word; white space is no word.
        token = np.where((first == last) & (word != 0), ABSENT, self._token[positions])
        before = self._word[np.maximum(first - 1, 0)]
        after = self._word[np.minimum(last + 1, len(self._word) - 1)]
        has_after = last + 1 < window_start + self._length
        near = positions[:, None] - np.arange(1, NEAR_TOKENS + 1)
        inside = (near >= window_start[:, None]) & (near < first[:, None])
        columns = [
            (Kind.TOKEN, token[:, None]),
            (Kind.WORD, absent_if_empty(word)[:, None]),
            (Kind.BEFORE, np.where(first > window_start, absent_if_empty(before), ABSENT)[:, None]),
            (Kind.AFTER, np.where(has_after, absent_if_empty(after), ABSENT)[:, None]),
            (Kind.SOURCE, self._source[positions // self._length][:, None]),
            (Kind.SHAPE, self._shape[positions][:, None]),
            (Kind.INSIDE, np.where(positions > first, self._token[np.maximum(positions - 1, 0)], ABSENT)[:, None]),
            (Kind.NEAR, np.where(inside, self._near[self._word[np.maximum(near, 0)]], ABSENT)),
        ]
        return np.hstack([np.where(ids == ABSENT, ABSENT, ids + kind * self.size) for kind, ids in columns])

    def fit(self, rows: Integers, promoted: Sequence[str] = ()) -> list[Term]:
        """Return the terms that best tell contexts `rows` from other text, most telling first.

        A word after a position counts only if the latent promotes it: `promoted`.
        """
        keys, inverse = np.unique(rows, return_inverse=True)
        has = np.zeros((len(keys), len(rows)), bool)
        has[inverse.reshape(rows.shape), np.arange(len(rows))[:, None]] = True
        count, rate = has.sum(1), self.rate[keys]
        with np.errstate(divide="ignore"):
            weight = np.log((count + rate) / (len(rows) + 1) / rate)
        least = np.where(self.needs_majority[keys], MIN_SHARE_OF_FUNCTION_WORDS, MIN_SHARE) * len(rows)
        usable = (keys != ABSENT) & (count >= np.maximum(least, 2)) & (weight > np.log(MIN_LIFT))
        usable &= self._promoted(keys, promoted)
        keys, has, weight = keys[usable], has[usable], weight[usable]
        uncovered, chosen, first_gain = np.ones(len(rows)), list[int](), 0.0
        while len(chosen) < min(MAX_TERMS, len(keys)):
            covers = has @ uncovered
            gain = np.where(np.isin(np.arange(len(keys)), chosen), 0, covers * weight)
            best = int(gain.argmax())
            first_gain = first_gain or float(gain[best])
            if gain[best] <= 0 or gain[best] < MIN_GAIN * first_gain:
                break
            chosen.append(best)
            uncovered[has[best]] *= DISCOUNT
        return [self._term(int(keys[i]), float(weight[i]), rows[has[i]]) for i in chosen]

    def fits(self, rows: Integers, terms: Sequence[Term]) -> Floats:
        """Return how well contexts [n] fit a label: the sum of the weights of its terms that each has."""
        total = np.zeros(len(rows), np.float32)
        for term in terms:
            total += term.weight * (rows == term.key).any(1)
        return total

    def _term(self, key: int, weight: float, rows: Integers) -> Term:
        kind, number = Kind(key // self.size), key % self.size
        if kind in (Kind.TOKEN, Kind.INSIDE):
            words = rows[:, Kind.WORD]
            known, count = np.unique(words[words != ABSENT] - Kind.WORD * self.size, return_counts=True)
            most = known[np.argsort(-count, kind="stable")[:EXAMPLE_WORDS]]
            text = self._token_texts[number]
            return Term(kind, text.strip() or text, weight, key, tuple(self._words[word] for word in most))
        if kind == Kind.SHAPE:
            return Term(kind, SHAPES[number], weight, key)
        if kind == Kind.SOURCE:
            return Term(kind, self._sources[number], weight, key)
        word = self._words[number]
        return Term(kind, stem(word) if kind == Kind.NEAR else word, weight, key)

    def _rates(self, counted: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return the share of counted positions that have each term, never 0."""
        rate = np.zeros((len(Kind), self.size))
        words = np.bincount(self._word[counted], minlength=self.size)
        rate[[Kind.TOKEN, Kind.INSIDE]] = np.bincount(self._token[counted], minlength=self.size)
        shape = self._shape[counted]
        rate[Kind.SHAPE] = np.bincount(shape[shape != ABSENT], minlength=self.size)
        rate[[Kind.WORD, Kind.BEFORE, Kind.AFTER]] = words
        source = np.repeat(self._source, self._length)[counted]
        rate[Kind.SOURCE] = np.bincount(source[source != ABSENT], minlength=self.size)
        near = self._near != ABSENT
        np.add.at(rate[Kind.NEAR], self._near[near], words[: len(near)][near])
        rate = np.maximum(rate, 1) / max(1, int(counted.sum()))
        # Of at least one of NEAR_TOKENS, as if words were independent.
        rate[Kind.NEAR] = 1 - (1 - rate[Kind.NEAR]) ** NEAR_TOKENS
        flat: NDArray[np.float64] = rate.ravel()
        return flat

    def _function_terms(self) -> NDArray[np.bool_]:
        """Return which terms need a majority of the contexts: function words, the template's, and punctuation."""
        mask = np.zeros((len(Kind), self.size), bool)
        mask[[Kind.WORD, Kind.BEFORE, Kind.AFTER], : len(self._words)] = ~self._content
        mask[Kind.SHAPE] = True
        flat: NDArray[np.bool_] = mask.ravel()
        return flat

    def _shapes(self, texts: Sequence[str]) -> Integers:
        """Return the index into SHAPES of the token at each position, or ABSENT."""
        stripped = [text.strip() for text in texts]
        tests: Sequence[Callable[[str], bool]] = (
            lambda text: text.isdigit(),
            lambda _: False,
            lambda text: bool(text) and not any(character.isalnum() for character in text),
            lambda text: len(text) > 1 and text.isupper(),
            lambda text: text[:1].isupper(),
        )
        of_token = np.array([next((i for i, holds in enumerate(tests) if holds(t)), ABSENT) for t in stripped])
        shape = of_token[self._token]
        inside = (np.arange(len(shape)) > self._first) & (self._word != 0) & (shape != SHAPES.index("a number"))
        return np.where(inside, SHAPES.index("the rest of a word"), shape)

    def _promoted(self, keys: Integers, promoted: Sequence[str]) -> NDArray[np.bool_]:
        """Return which terms are not about the word after, or about one that is promoted."""
        stems = {stem(word.strip().lower()) for word in promoted}
        allowed: NDArray[np.bool_] = keys // self.size != Kind.AFTER
        for i in np.flatnonzero(~allowed):
            allowed[i] = stem(self._words[keys[i] % self.size]) in stems
        return allowed


def run_bounds(word: Integers, length: int) -> tuple[Integers, Integers]:
    """Return the first and last position [n] of the run of equal words around each position, within its window."""
    starts = np.flatnonzero((np.diff(word, prepend=word[0] - 1) != 0) | (np.arange(len(word)) % length == 0))
    run = np.searchsorted(starts, np.arange(len(word)), side="right") - 1
    return starts[run], np.append(starts[1:], len(word))[run] - 1


def fold_case(texts: Sequence[str]) -> tuple[list[str], Integers]:
    """Return the distinct texts in lower case, and for each text its index among them."""
    index: dict[str, int] = {}
    ids = [index.setdefault(text.lower(), len(index)) for text in texts]
    return list(index), np.array(ids)


def absent_if_empty(word: Integers) -> Integers:
    """Return word ids with ABSENT for the empty word, 0."""
    return np.where(word == 0, ABSENT, word)


def template_words(tokenizer: Any) -> frozenset[str]:
    """Return the words that the chat template itself writes, such as roles and a default system prompt."""
    return frozenset(split_words(" ".join(rendered_chats(tokenizer, content=""))))


def label_text(terms: Sequence[Term]) -> str:
    """Return a label such as `virus, viral; near infection; after the (microbiology)`; empty without terms.

    Parts stand in the order of their first terms, sources last.
    """
    by_kind: dict[Kind, list[Term]] = {}
    for term in terms:
        by_kind.setdefault(term.kind, []).append(term)
    sources = ", ".join(term.text for term in by_kind.pop(Kind.SOURCE, []))
    text = "; ".join(_part(kind, part) for kind, part in by_kind.items())
    return f"{text} ({sources})" if text and sources else text or (f"text of {sources}" if sources else "")


def _part(kind: Kind, terms: Sequence[Term]) -> str:
    if kind in (Kind.TOKEN, Kind.INSIDE):
        texts = dict.fromkeys(term.text for term in terms)
        examples = EXAMPLE_WORDS if len(texts) == 1 else EXAMPLE_WORDS_OF_SEVERAL
        return ", ".join(_piece(kind, text, terms, examples) for text in texts)
    # Punctuation reads better in quotes.
    names = (term.text if term.text[-1:].isalnum() else f'"{term.text}"' for term in terms)
    return PREFIXES.get(kind, "") + ", ".join(names)


def _piece(kind: Kind, text: str, terms: Sequence[Term], examples: int) -> str:
    """Return `"ist" in federalist, resistant`, or `after "t" in tides, tail`; `line break` for white space."""
    if not text.strip():
        return "line break" if "\n" in text else "space"
    words = dict.fromkeys(word for term in terms if term.text == text for word in term.words)
    where = f" in {', '.join([*words][:examples])}" if words else ""
    return f'{"after " if kind == Kind.INSIDE else ""}"{text}"{where}'


def origin(terms: Sequence[Term]) -> str:
    """Return where the terms of a label are from; empty without terms."""
    logits = any(term.kind == Kind.AFTER for term in terms)
    return (f"{ORIGIN}, logit words" if logits else ORIGIN) if terms else ""


def is_from_corpus(summary: Summary) -> bool:
    """Return whether the label of a latent consists of terms."""
    return summary.origin.partition(",")[0] == ORIGIN
