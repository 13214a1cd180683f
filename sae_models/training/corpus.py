"""Labelled documents, and the token windows cut from them."""

import json
import lzma
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDS = 20
# No SAE, selection or threshold sees the held-out folds; thresholds are set on the tuning folds.
HELD_OUT_FOLDS = (0, 1)
TUNING_FOLDS = (2, 3)


class CorpusError(Exception):
    """A corpus that cannot be read; the message names the file and the line."""


@dataclass(frozen=True)
class Document:
    """One section of a book."""

    book: str
    module: str
    text: str

    @property
    def fold(self) -> int:
        """0..19, from book and module alone, so that a split survives edits and other orders of the corpus."""
        return zlib.crc32(f"{self.book}/{self.module}".encode()) % FOLDS


@dataclass(frozen=True)
class Windows:
    """tokens [n, length]: BOS, text, padding; counted [n, length]: true on text alone; document [n]: the source."""

    tokens: Tensor
    counted: Tensor
    document: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, index: Tensor) -> "Windows":
        """The windows with these indices [m]."""
        return Windows(self.tokens[index], self.counted[index], self.document[index])

    def where(self, keep: Tensor) -> "Windows":
        """The windows for which keep [n] is true."""
        return self.take(keep.nonzero().flatten())

    def shuffled(self, seed: int) -> "Windows":
        """All windows in random order: neighbours are no longer of one document."""
        return self.take(torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)))

    def first(self, tokens: int) -> "Windows":
        """The first windows that hold at least this many counted tokens, or all."""
        held = self.counted.sum(1).cumsum(0)
        return self.take(torch.arange(min(len(self), int((held < tokens).sum()) + 1)))


def read(path: Path) -> list[Document]:
    """Documents of a JSON-lines file (.jsonl or .jsonl.xz) with `text` and, if known, `book`, `module` and `title`.

    CorpusError: the file is missing, empty, not text, or a line is not such an object.
    """
    documents = [document for document in _documents(path) if document.text.strip()]
    if not documents:
        raise CorpusError(f"corpus: {path} holds no text")
    return documents


def in_folds(windows: Windows, documents: Sequence[Document], folds: Collection[int]) -> Tensor:
    """Which windows [n] are from documents of these folds."""
    return torch.tensor([document.fold in folds for document in documents])[windows.document]


def _documents(path: Path) -> Iterator[Document]:
    try:
        with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                yield _document(json.loads(line), number)
    except (OSError, UnicodeDecodeError, lzma.LZMAError, EOFError, json.JSONDecodeError, ValueError) as error:
        raise CorpusError(f"corpus: {path}: {error}") from error


def _document(row: Any, number: int) -> Document:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f"line {number}: not an object with a `text`")
    text = "\n".join(part for part in (row.get("title"), row["text"]) if part) if row["text"] else ""
    return Document(str(row.get("book", "")), str(row.get("module", number)), text)


def windows(documents: Sequence[Document], tokenizer: Any, length: int) -> Windows:
    """Cuts each document into windows of up to `length` tokens, BOS in front of each; tails are padded."""
    rows, sizes, sources = [], [], []
    bos, body = tokenizer.bos_token_id, length - 1
    for source, document in enumerate(documents):
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(ids), body):
            part = ids[start : start + body]
            rows.append([bos, *part] + [tokenizer.eos_token_id] * (body - len(part)))
            sizes.append(len(part))
            sources.append(source)
    position = torch.arange(length)
    counted = (position > 0) & (position <= torch.tensor(sizes)[:, None])
    return Windows(torch.tensor(rows), counted, torch.tensor(sources))
