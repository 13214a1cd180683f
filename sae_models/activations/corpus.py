"""Labelled documents, and the token windows cut from them."""

import bz2
import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rudder.sae_models.errors import UserError
from rudder.sae_models.optional import extra

FOLDS = 20
# No SAE, selection or threshold sees the held-out folds; thresholds are set on the tuning folds.
HELD_OUT_FOLDS = (0, 1)
TUNING_FOLDS = (2, 3)

COLUMNS = ("text", "book", "module", "title", "complexity")
OPENERS: Mapping[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
JSON_LINES = (".jsonl", *(f".jsonl{suffix}" for suffix in OPENERS))
MOST_LINE_CHARACTERS = 1 << 26


class CorpusError(UserError):
    """A corpus that cannot be read; the message names the file and the line."""


@dataclass(frozen=True)
class Document:
    """One section of a book. `complexity`, from 0 to 10, is what AdaptiveK's probe is taught."""

    book: str
    module: str
    text: str
    complexity: float | None = None

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

    @property
    def attended(self) -> Tensor:
        """Which positions [n, length] are not padding."""
        attended = self.counted.clone()
        attended[:, 0] = True
        return attended

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
    """Documents of a corpus; what the file's name ends in says how it is read.

    Text (.txt, one document a file), JSON lines (.jsonl, also .xz, .gz or .bz2) or Parquet with `text` and, if known,
    `book`, `module`, `title` and `complexity`; a folder that `datasets` saved, with these columns; or a folder of
    such files.
    CorpusError: missing, empty, not text, or a row without a text.
    """
    documents = [document for document in tqdm(_documents(path), desc="read", unit="doc") if document.text.strip()]
    if not documents:
        raise CorpusError(f"corpus: {path} holds no text")
    return documents


def sha256(path: Path) -> str:
    """SHA-256 of a corpus: of its file, or of the names and contents of the files of its folder."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(b"" if file == path else str(file.relative_to(path)).encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def in_folds(windows: Windows, documents: Sequence[Document], folds: Collection[int]) -> Tensor:
    """Which windows [n] are from documents of these folds."""
    return torch.tensor([document.fold in folds for document in documents])[windows.document]


def _documents(path: Path) -> Iterator[Document]:
    if (path / "dataset_info.json").is_file():
        yield from _rows(path, _dataset_rows(path))
    elif path.is_dir():
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            yield from _documents(file)
    elif path.suffix == ".parquet":
        yield from _rows(path, _parquet_rows(path))
    elif path.name.endswith(JSON_LINES):
        yield from _rows(path, _json_rows(path))
    elif path.suffix == ".txt":
        yield _document({"text": "\n".join(_lines(path)), "book": path.parent.name, "module": path.name}, 1)
    else:
        known = ".txt, .jsonl, .jsonl.xz, .jsonl.gz, .jsonl.bz2, .parquet or a folder"
        raise CorpusError(f"corpus: {path}: is not {known}" if path.exists() else f"corpus: {path}: no such file")


def _rows(path: Path, rows: Iterator[Any]) -> Iterator[Document]:
    for number, row in enumerate(rows, 1):
        try:
            yield _document(row, number)
        except ValueError as error:
            raise CorpusError(f"corpus: {path}: {error}") from error


def _document(row: Any, number: int) -> Document:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f"line {number}: not an object with a `text`")
    text = "\n".join(part for part in (row.get("title"), row["text"]) if part) if row["text"] else ""
    complexity = row.get("complexity")
    if complexity is not None and not (isinstance(complexity, int | float) and 0 <= complexity <= 10):
        raise ValueError(f"line {number}: complexity {complexity!r} is not a number from 0 to 10")
    return Document(str(row.get("book") or ""), str(row.get("module") or number), text, complexity)


def _json_rows(path: Path) -> Iterator[Any]:
    for number, line in enumerate(_lines(path), 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise CorpusError(f"corpus: {path}: line {number}: {error}") from error


def _lines(path: Path) -> Iterator[str]:
    """Lines of a text file. A line is read in bounded memory, and a NUL is in no text."""
    number = 0
    try:
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            while line := file.readline(MOST_LINE_CHARACTERS + 1):
                number += 1
                if len(line) > MOST_LINE_CHARACTERS:
                    raise CorpusError(f"corpus: {path}: line {number} is longer than {MOST_LINE_CHARACTERS} characters")
                if "\0" in line:
                    raise CorpusError(f"corpus: {path}: line {number} holds a NUL: it is not text")
                yield line.rstrip("\n")
    except (OSError, UnicodeDecodeError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise CorpusError(f"corpus: {path}: line {number + 1}: {error}") from error


def _parquet_rows(path: Path) -> Iterator[Any]:
    parquet = extra("pyarrow.parquet", f"corpus: {path}: Parquet")
    try:
        file = parquet.ParquetFile(path)
        columns = [name for name in COLUMNS if name in file.schema_arrow.names]
        for batch in file.iter_batches(columns=columns):
            yield from batch.to_pylist()
    # What pyarrow raises of a damaged file is OSError or its own ArrowException, which is a ValueError for most causes.
    except (OSError, ValueError) as error:
        raise CorpusError(f"corpus: {path}: {error}") from error


def _dataset_rows(path: Path) -> Iterator[Any]:
    datasets = extra("datasets", f"corpus: {path}: a saved dataset")
    try:
        yield from datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise CorpusError(f"corpus: {path}: {error}") from error


def windows(documents: Sequence[Document], tokenizer: Any, length: int) -> Windows:
    """Cuts each document into windows of up to `length` tokens, BOS (or CLS) in front of each where the tokenizer has
    one; tails are padded.
    """
    bos = next((i for i in (tokenizer.bos_token_id, getattr(tokenizer, "cls_token_id", None)) if i is not None), None)
    head = [] if bos is None else [bos]
    pad, body = tokenizer.eos_token_id or 0, length - len(head)
    rows, sizes, sources = [], [], []
    for source, document in enumerate(tqdm(documents, desc="tokenise", unit="doc")):
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(ids), body):
            part = ids[start : start + body]
            rows.append(np.array([*head, *part, *[pad] * (body - len(part))], np.int32))
            sizes.append(len(part))
            sources.append(source)
    if not rows:
        raise CorpusError("corpus: the tokenizer makes no token of it")
    position = torch.arange(length)
    counted = (position >= len(head)) & (position < len(head) + torch.tensor(sizes)[:, None])
    return Windows(torch.from_numpy(np.stack(rows)).long(), counted, torch.tensor(sources))
