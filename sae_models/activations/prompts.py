"""Prompts of a chat corpus: instructions, and questions about the terms of a corpus' glossaries."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rudder.sae_models import PRETRAINED
from rudder.sae_models.activations import corpus
from rudder.sae_models.activations.corpus import Document

SHIPPED = PRETRAINED / "prompts.jsonl"
TOPIC, SUBJECT = "{topic}", "{subject}"
# Of four prompts, three are about a term, if there are terms.
TOPICS_PER_INSTRUCTION = 3
INSTRUCTIONS = "instructions"


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the book that it is about, or INSTRUCTIONS."""

    text: str
    book: str


def templates(path: Path = SHIPPED) -> list[str]:
    """Read prompts and templates, JSON lines of `text`. CorpusError: it cannot be read."""
    return [document.text for document in corpus.read(path)]


def prompts(texts: Sequence[str], documents: Sequence[Document], seed: int) -> Iterator[Prompt]:
    """Yield prompts without end, the same ones for the same seed.

    A template holds `{topic}` and may hold `{subject}`: a term of a glossary and the name of its book. Books take
    turns, whatever the length of their glossaries. Texts without `{topic}` are prompts as they are.
    """
    generator = random.Random(seed)
    instructions = [text for text in texts if TOPIC not in text]
    questions = [text for text in texts if TOPIC in text]
    terms = {book: sorted({t for d in documents if d.book == book for t in d.terms}) for book in books_of(documents)}
    cycles = [cycle(book_terms, generator) for book_terms in terms.values()] if questions else []
    plain, about = cycle(instructions, generator), cycle(questions, generator)
    while instructions or cycles:
        if instructions:
            yield Prompt(next(plain), INSTRUCTIONS)
        for _ in range(TOPICS_PER_INSTRUCTION if cycles else 0):
            number = generator.randrange(len(cycles))
            book = list(terms)[number]
            text = next(about).replace(TOPIC, next(cycles[number])).replace(SUBJECT, book.replace("-", " "))
            yield Prompt(text, book)


def books_of(documents: Sequence[Document]) -> list[str]:
    """Return the names of the books whose glossaries have terms."""
    return sorted({document.book for document in documents if document.terms})


def cycle(texts: Sequence[str], generator: random.Random) -> Iterator[str]:
    """Yield all texts in random order, again and again."""
    while texts:
        yield from generator.sample(texts, len(texts))
