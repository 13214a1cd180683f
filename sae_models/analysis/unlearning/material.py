"""The texts of a study: sections in three folds, their windows, and questions about their terms."""

import hashlib
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from rudder.sae_models.activations import corpus
from rudder.sae_models.activations.corpus import Document
from rudder.sae_models.analysis.derive import Topic
from rudder.sae_models.analysis.unlearning import questions as cloze
from rudder.sae_models.analysis.unlearning.questions import Question
from rudder.sae_models.analysis.unlearning.rig import Rig, Texts
from rudder.sae_models.errors import UserError

FOLDS = 3


@dataclass(frozen=True)
class Size:
    """How much of a corpus a study uses.

    `topic_sections` of the topic and `near_sections` of each neighbour (None: all), with `near_windows` of each;
    `sections` of each far book, with `windows` of each. `questions`: of the topic, `near_questions` of a neighbour,
    `other_questions` of another book. `samples`: prompts of the topic that are continued; `leaks`: definitions that are
    completed eight times. `steps`: of training of learned rows.
    """

    topic_sections: int | None = None
    near_sections: int | None = None
    near_windows: int = 2
    sections: int = 30
    windows: int = 1
    length: int = 256
    questions: int | None = None
    near_questions: int = 200
    other_questions: int = 30
    samples: int = 150
    leaks: int = 150
    steps: int = 400


FULL = Size()
QUICK = Size(
    topic_sections=60, near_sections=30, near_windows=1, sections=6, length=192, questions=100, near_questions=24,
    other_questions=3, samples=24, leaks=9, steps=50,
)  # fmt: skip


@dataclass(frozen=True)
class Split:
    """The documents of a study, section number to document, and the fold of each."""

    documents: Sequence[Document]
    topic: Topic

    @cached_property
    def folds(self) -> Tensor:
        """Fold 0..2 of each section, a hash of book and module."""
        return torch.tensor([fold_of(document) for document in self.documents])

    def fold(self, section: int) -> int:
        """Return the fold of a section."""
        return fold_of(self.documents[section])

    @cached_property
    def books(self) -> list[str]:
        """The book of each section."""
        return [document.book for document in self.documents]

    @property
    def far(self) -> list[str]:
        """The books that are neither of the topic nor near it, in alphabetical order."""
        return sorted({*self.books} - {*self.topic.books, *self.topic.neighbours})

    def of(self, books: Collection[str]) -> Tensor:
        """Return the mask of sections of some books."""
        return torch.tensor([book in books for book in self.books])

    @property
    def sha256(self) -> str:
        """SHA-256 of all sections with their folds: two studies with the same one share their split."""
        lines = sorted(f"{d.book}/{d.module} {fold_of(d)}" for d in self.documents)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def fold_of(document: Document) -> int:
    """Return the fold of a section: independent of Document.fold, by which SAEs are trained."""
    return zlib.crc32(f"unlearning/{document.book}/{document.module}".encode()) % FOLDS


@dataclass(frozen=True)
class Material:
    """A rig with its texts: `windows` of sections `section` [n]; `lines`: definitions in the form that detectors are
    trained with, of sections `line_section`; `questions` in the form that is reported; of each of their options a text
    in `options`, and in `priors` one without the definition.
    """

    rig: Rig
    split: Split
    size: Size
    windows: Texts
    section: Tensor
    lines: Texts
    line_section: Tensor
    questions: Sequence[Question]
    options: Texts
    priors: Texts

    @cached_property
    def question_section(self) -> Tensor:
        """Section of each question [q]."""
        return torch.tensor([question.section for question in self.questions])

    def used(self, folds: Collection[int]) -> Tensor:
        """Return the mask of the sections of some folds that windows or questions are of [sections]."""
        mask = torch.zeros(len(self.split.documents), dtype=torch.bool)
        mask[self.section[self.windows_of(folds)]] = True
        mask[self.question_section[self.questions_of(folds)]] = True
        return mask

    def windows_of(self, folds: Collection[int], books: Collection[str] | None = None) -> Tensor:
        """Return the indices of the windows of some folds and books."""
        return self._of(self.section, folds, books)

    def lines_of(self, folds: Collection[int], books: Collection[str] | None = None) -> Tensor:
        """Return the indices of the definitions of some folds and books."""
        return self._of(self.line_section, folds, books)

    def questions_of(self, folds: Collection[int], books: Collection[str] | None = None) -> Tensor:
        """Return the indices of the questions of some folds and books."""
        return self._of(self.question_section, folds, books)

    def _of(self, section: Tensor, folds: Collection[int], books: Collection[str] | None) -> Tensor:
        mask = torch.isin(self.split.folds, torch.tensor(sorted(folds)))
        if books is not None:
            mask &= self.split.of(books)
        return mask[section].nonzero().flatten()


def gather(rig: Rig, path: Path, topic: Topic, size: Size, seed: int = 0) -> Material:
    """Read a corpus and compute the residuals of a study's texts. UserError: a book of the topic is not in it."""
    everything = corpus.read(path)
    missing = {*topic.books, *topic.neighbours} - {document.book for document in everything}
    if missing:
        raise UserError(f"topic: the corpus has no book {', '.join(sorted(missing))}")
    split = Split(everything, topic)
    asked = ask(rig, split, corpus.read_definitions(path), size, seed)
    windows, section = cut(rig, split, size, seed)
    require_topic(split, section)
    endings = [option for question in asked for option in question.options]
    beginnings = [q.prompt(cloze.REPORTED_FORM[0]) for q in asked for _ in q.options]
    options = rig.texts(*rig.encode(beginnings, [f" {option}" for option in endings]))
    priors = rig.texts(*rig.encode([cloze.REPORTED_FORM[1]] * len(endings), [f" {option}" for option in endings]))
    lines = [f"{q.prompt(cloze.TRAINED_FORM[0])} {q.options[q.answer]}" for q in asked]
    line_section = torch.tensor([question.section for question in asked])
    return Material(
        rig,
        split,
        size,
        rig.texts(windows),
        section,
        rig.texts(*rig.encode(lines)),
        line_section,
        asked,
        options,
        priors,
    )


def require_topic(split: Split, section: Tensor) -> None:
    """Raise UserError unless each fold has windows, of sections `section` [n], of the topic and of other books."""
    of_topic = split.of(split.topic.books)[section]
    for fold in range(FOLDS):
        here = split.folds[section] == fold
        if not (here & of_topic).any() or not (here & ~of_topic).any():
            raise UserError(
                f"corpus: fold {fold} of {FOLDS} lacks text of the topic or of other books: too few sections"
            )


def ask(rig: Rig, split: Split, definitions: Iterable[corpus.Definition], size: Size, seed: int) -> list[Question]:
    """Return the questions of every book: of the topic, about terms that no other book has."""
    terms = cloze.terms_in_text(split.documents, definitions)
    by_book = defaultdict[str, list[cloze.Term]](list)
    for term in terms:
        by_book[term.definition.book].append(term)
    limits: dict[str, int | None] = dict.fromkeys(by_book, size.other_questions)
    limits |= dict.fromkeys(split.topic.neighbours, size.near_questions)
    limits |= dict.fromkeys(split.topic.books, size.questions)
    asked = list[Question]()
    for book in sorted(by_book):
        topic = split.topic.books
        chosen = [term for term in by_book[book] if book not in topic or term.exclusive_to(topic)]
        asked += cloze.questions(chosen, split.fold, lambda term: len(rig.token_ids(f" {term}")), limits[book], seed)
    return asked


def cut(rig: Rig, split: Split, size: Size, seed: int) -> tuple[corpus.Windows, Tensor]:
    """Return windows of randomly chosen sections of each book, and the section of each."""
    generator, chosen = torch.Generator().manual_seed(seed), list[int]()
    near = {*split.topic.books, *split.topic.neighbours}
    limits: dict[str, int | None] = dict.fromkeys(split.books, size.sections)
    limits |= dict.fromkeys(split.topic.neighbours, size.near_sections)
    limits |= dict.fromkeys(split.topic.books, size.topic_sections)
    for book, limit in sorted(limits.items()):
        sections = split.of([book]).nonzero().flatten()
        chosen += sections[torch.randperm(len(sections), generator=generator)[:limit]].tolist()
    rule = corpus.ContextRule(
        excluded_positions=rig.bundle.manifest.context.excluded_positions,
        excluded_tokens=rig.bundle.manifest.context.excluded_tokens,
    )
    everything = corpus.windows([split.documents[index] for index in chosen], rig.tokenizer, size.length, rule)
    full = everything.where(everything.size > size.length // 2)
    order, taken, kept = torch.randperm(len(full), generator=generator).tolist(), Counter[int](), list[int]()
    for index in order:
        source = int(full.document[index])
        limit = size.near_windows if split.books[chosen[source]] in near else size.windows
        if taken[source] < limit:
            taken[source] += 1
            kept.append(index)
    windows = full.take(torch.tensor(sorted(kept)))
    return windows, torch.tensor(chosen)[windows.document]
