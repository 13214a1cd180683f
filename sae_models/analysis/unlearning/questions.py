"""Cloze questions from glossaries: which of four terms of a book a definition is of.

Terms of the topic are those that no other book's text has: a model that never read the topic can know the others. A
term belongs to the first section of its book in which it occurs, so that questions are split as the text is.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log

from rudder.sae_models.activations.corpus import Definition, Document

OPTIONS = 4
# Wrong options are drawn from so many terms of nearest frequency.
NEAREST = 20
WORD = re.compile(r"\w+")
Words = tuple[str, ...]
# The form that detectors are trained with, and the one that is reported.
TRAINED_FORM, REPORTED_FORM = ("The term for {} is", "The term is"), ("{} is called", "This is called")


@dataclass(frozen=True)
class Question:
    """A definition in the section number `section`, and four terms of which number `answer` is the one defined."""

    section: int
    book: str
    meaning: str
    options: Sequence[str]
    answer: int

    def prompt(self, form: str) -> str:
        """Return the definition as the beginning of a sentence that the term ends."""
        asked = form.format(self.meaning)
        return asked[0].upper() + asked[1:]


@dataclass(frozen=True)
class Term:
    """A defined term, the section number of its first occurrence in its book, how often it occurs there, and the books
    whose text has it.
    """

    definition: Definition
    section: int
    count: int
    books: frozenset[str]

    def exclusive_to(self, topic: Collection[str]) -> bool:
        """Return whether no other book's text has the term."""
        return self.books <= {*topic}


def words_of(text: str) -> Words:
    """Return the words of a text in lower case."""
    return tuple(WORD.findall(text.lower()))


def has_words(text: Sequence[str], term: Sequence[str]) -> bool:
    """Return whether a text has the words of a term in a row."""
    return any(text[start : start + len(term)] == term for start in range(len(text) - len(term) + 1))


def terms_in_text(documents: Sequence[Document], definitions: Iterable[Definition]) -> list[Term]:
    """Return the terms that occur in the book that defines them, each once in a book, in order of section."""
    defined = {(words_of(definition.term), definition.book): definition for definition in definitions}
    counts, first = occurrences(documents, {words for words, _ in defined})
    books = defaultdict[Words, set[str]](set)
    for words, book in counts:
        books[words].add(book)
    found = [
        Term(definition, first[key], counts[key], frozenset(books[key[0]]))
        for key, definition in defined.items()
        if key in first
    ]
    return sorted(found, key=lambda term: (term.section, term.definition.term))


def occurrences(
    documents: Sequence[Document], wanted: Collection[Words]
) -> tuple[Counter[tuple[Words, str]], dict[tuple[Words, str], int]]:
    """Count each (words, book), and return the number of the document where it occurs first."""
    wanted = frozenset(wanted)
    longest = defaultdict[str, int](int)
    for words in wanted:
        if words:
            longest[words[0]] = max(longest[words[0]], len(words))
    counts, first = Counter[tuple[Words, str]](), dict[tuple[Words, str], int]()
    for number, document in enumerate(documents):
        text = words_of(document.text)
        for start, word in enumerate(text):
            for length in range(1, longest.get(word, 0) + 1):
                key = text[start : start + length], document.book
                if len(key[0]) == length and key[0] in wanted:
                    counts[key] += 1
                    first.setdefault(key, number)
    return counts, first


def questions(
    terms: Sequence[Term], fold_of: Callable[[int], int], tokens: Callable[[str], int], limit: int | None, seed: int
) -> list[Question]:
    """Return up to `limit` questions of a book, drawn at random; `tokens` counts those of a term.

    Wrong options are terms of the same fold, as long as the right one (by at most one token) and about as frequent,
    that neither contain it nor are contained in it or its definition. A term without three such has no question.
    """
    draw = random.Random(seed)
    sizes = {term: tokens(term.definition.term) for term in terms}
    folds = defaultdict[int, list[Term]](list)
    for term in terms:
        folds[fold_of(term.section)].append(term)
    asked = list[Question]()
    for term in draw.sample(terms, len(terms)):
        if limit is not None and len(asked) == limit:
            break
        near = [other for other in folds[fold_of(term.section)] if is_distractor(term, other, sizes)]
        near.sort(key=lambda other: abs(log(other.count) - log(term.count)))
        if len(near) >= OPTIONS - 1:
            wrong = [other.definition.term for other in draw.sample(near[:NEAREST], OPTIONS - 1)]
            # At a random place: scores that are all equal must not be right answers.
            answer = draw.randrange(OPTIONS)
            options = [*wrong[:answer], term.definition.term, *wrong[answer:]]
            asked.append(Question(term.section, term.definition.book, term.definition.meaning, options, answer))
    return asked


def is_distractor(term: Term, other: Term, sizes: Mapping[Term, int]) -> bool:
    """Return whether another term can be a wrong option."""
    right, wrong = term.definition.term.lower(), other.definition.term.lower()
    apart = right not in wrong and wrong not in right and wrong not in term.definition.meaning.lower()
    return apart and abs(sizes[term] - sizes[other]) <= 1
