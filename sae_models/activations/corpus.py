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
from rudder.sae_models.optional import import_optional
from rudder.sae_models.tokens import text_encoder

FOLDS = 20
# Nothing is trained, selected or calibrated on the held-out folds; thresholds are calibrated on the tuning folds.
HELD_OUT_FOLDS = (0, 1)
TUNING_FOLDS = (2, 3)

COLUMNS = ("text", "book", "module", "title", "complexity")
OPENERS: Mapping[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
JSON_LINES = (".jsonl", *(f".jsonl{suffix}" for suffix in OPENERS))
MAX_LINE_CHARACTERS = 1 << 26


class CorpusError(UserError):
    """A corpus cannot be read. The message names the file and the line."""


@dataclass(frozen=True)
class Document:
    """One section of a book. `complexity`, from 0 to 10, is the regression target of the AdaptiveK probe."""

    book: str
    module: str
    text: str
    complexity: float | None = None

    @property
    def fold(self) -> int:
        """Fold 0..19, a hash of book and module only, so that a split survives edits and reordering of the corpus."""
        return zlib.crc32(f"{self.book}/{self.module}".encode()) % FOLDS


@dataclass(frozen=True)
class Windows:
    """tokens [n, length]: BOS, text, padding. counted [n, length]: True at text positions only. document [n]: index of
    the source document.
    """

    tokens: Tensor
    counted: Tensor
    document: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def attention_mask(self) -> Tensor:
        """Mask [n, length]: True at every position that is not padding."""
        attention_mask = self.counted.clone()
        attention_mask[:, 0] = True
        return attention_mask

    def take(self, index: Tensor) -> "Windows":
        """Select the windows with these indices [m]."""
        return Windows(self.tokens[index], self.counted[index], self.document[index])

    def where(self, mask: Tensor) -> "Windows":
        """Select the windows for which mask [n] is True."""
        return self.take(mask.nonzero().flatten())

    def shuffled(self, seed: int) -> "Windows":
        """Return all windows in random order, so that neighbours come from different documents."""
        return self.take(torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)))

    def first(self, tokens: int) -> "Windows":
        """Return the shortest prefix of the windows that holds at least `tokens` counted tokens, or all windows."""
        cumulative = self.counted.sum(1).cumsum(0)
        return self.take(torch.arange(min(len(self), int((cumulative < tokens).sum()) + 1)))


def read(path: Path) -> list[Document]:
    """Read the documents of a corpus; the file name extension selects the format.

    Text (.txt, one document per file), JSON lines (.jsonl, also .xz, .gz or .bz2) or Parquet with the field `text` and,
    optionally, `book`, `module`, `title` and `complexity`; a folder saved by `datasets` with these columns; or a folder
    of such files.

    Raise CorpusError if the corpus is missing, empty, not text, or a record has no text.
    """
    documents = [document for document in tqdm(_documents(path), desc="read", unit="doc") if document.text.strip()]
    if not documents:
        raise CorpusError(f"corpus: {path} holds no text")
    return documents


def sha256(path: Path) -> str:
    """Return the SHA-256 of a corpus: of its file, or of the names and contents of all files in its folder."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(b"" if file == path else str(file.relative_to(path)).encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def in_folds(windows: Windows, documents: Sequence[Document], folds: Collection[int]) -> Tensor:
    """Return a mask [n] of the windows whose documents are in these folds."""
    return torch.tensor([document.fold in folds for document in documents])[windows.document]


def _documents(path: Path) -> Iterator[Document]:
    if (path / "dataset_info.json").is_file():
        yield from _documents_of_records(path, _dataset_records(path))
    elif path.is_dir():
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            yield from _documents(file)
    elif path.suffix == ".parquet":
        yield from _documents_of_records(path, _parquet_records(path))
    elif path.name.endswith(JSON_LINES):
        yield from _documents_of_records(path, _json_records(path))
    elif path.suffix == ".txt":
        yield _parse_record({"text": "\n".join(_lines(path)), "book": path.parent.name, "module": path.name}, 1)
    else:
        known = ".txt, .jsonl, .jsonl.xz, .jsonl.gz, .jsonl.bz2, .parquet or a folder"
        raise CorpusError(f"corpus: {path}: is not {known}" if path.exists() else f"corpus: {path}: no such file")


def _documents_of_records(path: Path, records: Iterator[Any]) -> Iterator[Document]:
    for number, record in enumerate(records, 1):
        try:
            yield _parse_record(record, number)
        except ValueError as error:
            raise CorpusError(f"corpus: {path}: {error}") from error


def _parse_record(record: Any, number: int) -> Document:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f"line {number}: not an object with a `text`")
    text = "\n".join(part for part in (record.get("title"), record["text"]) if part) if record["text"] else ""
    complexity = record.get("complexity")
    if complexity is not None and not (isinstance(complexity, int | float) and 0 <= complexity <= 10):
        raise ValueError(f"line {number}: complexity {complexity!r} is not a number from 0 to 10")
    return Document(str(record.get("book") or ""), str(record.get("module") or number), text, complexity)


def _json_records(path: Path) -> Iterator[Any]:
    for number, line in enumerate(_lines(path), 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise CorpusError(f"corpus: {path}: line {number}: {error}") from error


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file. Read each line in bounded memory; reject NUL, which occurs in binary
    files only.
    """
    number = 0
    try:
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            while line := file.readline(MAX_LINE_CHARACTERS + 1):
                number += 1
                if len(line) > MAX_LINE_CHARACTERS:
                    raise CorpusError(f"corpus: {path}: line {number} is longer than {MAX_LINE_CHARACTERS} characters")
                if "\0" in line:
                    raise CorpusError(f"corpus: {path}: line {number} holds a NUL: it is not text")
                yield line.rstrip("\n")
    except (OSError, UnicodeDecodeError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise CorpusError(f"corpus: {path}: line {number + 1}: {error}") from error


def _parquet_records(path: Path) -> Iterator[Any]:
    parquet = import_optional("pyarrow.parquet", f"corpus: {path}: Parquet")
    try:
        file = parquet.ParquetFile(path)
        columns = [name for name in COLUMNS if name in file.schema_arrow.names]
        for batch in file.iter_batches(columns=columns):
            yield from batch.to_pylist()
    # On a damaged file pyarrow raises OSError or an ArrowException, most of which are subclasses of ValueError.
    except (OSError, ValueError) as error:
        raise CorpusError(f"corpus: {path}: {error}") from error


def _dataset_records(path: Path) -> Iterator[Any]:
    datasets = import_optional("datasets", f"corpus: {path}: a saved dataset")
    try:
        yield from datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise CorpusError(f"corpus: {path}: {error}") from error


def windows(documents: Sequence[Document], tokenizer: Any, length: int) -> Windows:
    """Cut each document into windows of up to `length` tokens. Each window starts with the BOS (or CLS) token if the
    tokenizer has one; the last window of a document is padded. Special tokens that a document spells are text, but for
    BOS at its start, which is not doubled. Raise CorpusError if the corpus has no tokens.
    """
    bos = next((i for i in (tokenizer.bos_token_id, getattr(tokenizer, "cls_token_id", None)) if i is not None), None)
    prefix = [] if bos is None else [bos]
    pad, text_length, encoder = tokenizer.eos_token_id or 0, length - len(prefix), text_encoder(tokenizer)
    sequences, token_counts, sources = [], [], []
    for source, document in enumerate(tqdm(documents, desc="tokenise", unit="doc")):
        ids = encoder.encode(encoder.without_bos(document.text))
        for start in range(0, len(ids), text_length):
            piece = ids[start : start + text_length]
            sequences.append(np.array([*prefix, *piece, *[pad] * (text_length - len(piece))], np.int32))
            token_counts.append(len(piece))
            sources.append(source)
    if not sequences:
        raise CorpusError("corpus: the tokenizer returns no tokens")
    position = torch.arange(length)
    counted = (position >= len(prefix)) & (position < len(prefix) + torch.tensor(token_counts)[:, None])
    return Windows(torch.from_numpy(np.stack(sequences)).long(), counted, torch.tensor(sources))
