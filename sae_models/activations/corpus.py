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
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from rudder.sae_models.errors import UserError
from rudder.sae_models.optional import import_optional
from rudder.sae_models.tokens import bos_token_id, special_text, text_encoder

FOLDS = 20
# Nothing is trained, selected or calibrated on the held-out folds; thresholds are calibrated on the tuning folds.
HELD_OUT_FOLDS = (0, 1)
TUNING_FOLDS = (2, 3)

COLUMNS = ("text", "messages", "book", "module", "title", "complexity", "glossary")
OPENERS: Mapping[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
JSON_LINES = (".jsonl", *(f".jsonl{suffix}" for suffix in OPENERS))
MAX_LINE_CHARACTERS = 1 << 26
# Share of the positions of a forward pass that hold tokens, the others being padding (Windows.passes).
MIN_USE = 0.85
# Bounds the memory of a chunk that mixes long and short windows (Windows.chunks).
PADDED_CHUNKS = 4


class CorpusError(UserError):
    """A corpus cannot be read. The message names the file and the line."""


@dataclass(frozen=True)
class Document:
    """One section of a book, or a chat. `complexity`, from 0 to 10, is the regression target of the AdaptiveK probe.
    `terms`: those of the section's glossary. `messages`: (role, content) of each message of a chat, whose `text` is the
    contents alone.
    """

    book: str
    module: str
    text: str
    complexity: float | None = None
    terms: tuple[str, ...] = ()
    messages: tuple[tuple[str, str], ...] = ()

    @property
    def fold(self) -> int:
        """Fold 0..19, a hash of book and module only, so that a split survives edits and reordering of the corpus."""
        return zlib.crc32(f"{self.book}/{self.module}".encode()) % FOLDS


class Definition(NamedTuple):
    """An entry of a glossary; `module` is the section that prints it."""

    book: str
    module: str
    term: str
    meaning: str


@dataclass(frozen=True)
class ContextRule:
    """How a text becomes model inputs, and which positions an SAE is trained and measured on.

    `prepend_bos`: whether a context starts with BOS; None: as the tokenizer does, which is what the server does too.
    `excluded_positions`: positions of a context, from 0, that are not counted. `excluded_tokens`: ids of tokens that
    are not counted wherever they occur, such as the markers of a chat template. BOS in front is never counted.
    """

    prepend_bos: bool | None = None
    excluded_positions: tuple[int, ...] = ()
    excluded_tokens: tuple[int, ...] = ()


TOKENIZER_RULE = ContextRule()


@dataclass(frozen=True)
class Windows:
    """tokens [n, length]: BOS if the rule has one, text, padding. counted [n, length]: positions to train and measure
    on. document [n]: index of the source document. size [n]: number of tokens without padding.

    A window holds text of one document, so attention never crosses from one document to another. Forward passes take
    windows of similar size together (`passes`) and cut their padding off, so that short documents cost what they hold.
    """

    tokens: Tensor
    counted: Tensor
    document: Tensor
    size: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def attention_mask(self) -> Tensor:
        """Mask [n, length]: True at every position that is not padding."""
        return torch.arange(self.tokens.shape[1]) < self.size[:, None]

    def take(self, index: Tensor) -> "Windows":
        """Select the windows with these indices [m]."""
        return Windows(self.tokens[index], self.counted[index], self.document[index], self.size[index])

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

    def trimmed(self) -> "Windows":
        """Cut off the columns that hold padding only."""
        length = int(self.size.max()) if len(self) else 0
        return Windows(self.tokens[:, :length], self.counted[:, :length], self.document, self.size)

    def chunks(self, full_windows: int) -> list[Tensor]:
        """Split the windows, in order, into runs that hold as many tokens as `full_windows` without padding do.

        A long window among short ones ends a run early: a chunk, padded, holds at most PADDED_CHUNKS times as many.
        """
        limit, runs, first, tokens, longest = full_windows * self.tokens.shape[1], [], 0, 0, 0
        for index, size in enumerate(self.size.tolist()):
            longest = max(longest, size)
            if tokens + size > limit or (index - first + 1) * longest > PADDED_CHUNKS * limit:
                runs.append(torch.arange(first, index))
                first, tokens, longest = index, 0, size
            tokens += size
        return [*runs, torch.arange(first, len(self))] if len(self) else []

    def passes(self, full_windows: int) -> list[Tensor]:
        """Group the windows into forward passes by size, so that little padding is left.

        A pass has at most as many positions as `full_windows` windows without padding, of which MIN_USE hold tokens.
        """
        limit, groups, group, tokens = full_windows * self.tokens.shape[1], [], list[int](), 0
        order = self.size.argsort(descending=True, stable=True)
        for index, size in zip(order.tolist(), self.size[order].tolist(), strict=True):
            positions = (len(group) + 1) * int(self.size[group[0]]) if group else size
            if group and (positions > limit or tokens + size < MIN_USE * positions):
                groups.append(torch.tensor(group))
                group, tokens = [], 0
            group.append(index)
            tokens += size
        return [*groups, torch.tensor(group)] if group else groups


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


def read_definitions(path: Path) -> list[Definition]:
    """Read the glossaries of a corpus in JSON lines, also of records without text.

    Raise CorpusError if the corpus cannot be read, or has no entry [term, meaning].
    """
    entries = [
        Definition(str(record.get("book") or ""), str(record.get("module") or ""), *entry)
        for record in json_records(path)
        if isinstance(record, dict)
        for entry in record.get("glossary") or ()
        if len(entry) == 2 and all(isinstance(part, str) and part for part in entry)
    ]
    if not entries:
        raise CorpusError(f"corpus: {path} has no glossary of [term, meaning]")
    return entries


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
        yield from _documents_of_records(path, json_records(path))
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
    if not isinstance(record, dict) or (not isinstance(record.get("text"), str) and not record.get("messages")):
        raise ValueError(f"line {number}: not an object with a `text` or `messages`")
    messages = tuple(_messages(record.get("messages"), number))
    text = "\n".join(content for _, content in messages) or record["text"]
    if record.get("title") and text:
        text = f"{record['title']}\n{text}"
    complexity = record.get("complexity")
    if complexity is not None and not (isinstance(complexity, int | float) and 0 <= complexity <= 10):
        raise ValueError(f"line {number}: complexity {complexity!r} is not a number from 0 to 10")
    source = str(record.get("book") or ""), str(record.get("module") or number)
    return Document(*source, text, complexity, tuple(_terms(record.get("glossary"), number)), messages)


def _messages(messages: Any, number: int) -> Iterator[tuple[str, str]]:
    """Yield (role, content) of the messages of a chat, which a record need not have."""
    if not isinstance(messages, list | NoneType):
        raise ValueError(f"line {number}: `messages` is not a list")
    for message in messages or ():
        match message:
            case {"role": str(role), "content": str(content)}:
                yield role, content
            case _:
                raise ValueError(f"line {number}: a message is not an object with a `role` and a `content`")


def _terms(glossary: Any, number: int) -> Iterator[str]:
    """Yield the terms of a glossary [[term, meaning], ...], which a record need not have."""
    if not isinstance(glossary, list | NoneType):
        raise ValueError(f"line {number}: `glossary` is not a list")
    for entry in glossary or ():
        if not isinstance(entry, list) or not entry or not isinstance(entry[0], str):
            raise ValueError(f"line {number}: `glossary` is not a list of [term, meaning]")
        yield entry[0]


def json_records(path: Path) -> Iterator[Any]:
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


def leading_token(tokenizer: Any, rule: ContextRule = TOKENIZER_RULE) -> int | None:
    """Return the id of the token in front of every context, BOS or CLS; None if a context starts with its text.

    By default this is what the tokenizer itself puts in front of a text. A rule that asks for BOS of a tokenizer
    without one gets EOS, as in TransformerLens. Raise CorpusError if it has neither.
    """
    if rule.prepend_bos is None:
        return bos_token_id(tokenizer)
    if not rule.prepend_bos:
        return None
    ids = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "cls", "eos"))
    token = next((token for token in ids if token is not None), None)
    if token is None:
        raise CorpusError("prepend_bos: the tokenizer has no BOS, CLS or EOS token")
    return int(token)


def windows(documents: Sequence[Document], tokenizer: Any, length: int, rule: ContextRule = TOKENIZER_RULE) -> Windows:
    """Cut each document into windows of up to `length` tokens, each with the rule's leading token in front; the last
    window of a document is padded. Raise CorpusError if the corpus has no tokens.

    A text that spells the BOS token at its start, such as a rendered chat, does not get a second one, and that BOS is
    never counted. Other special tokens that a document spells are text. A chat stands in the tokenizer's chat template,
    without a leading token; only tokens of its messages' contents are counted.
    """
    leading = leading_token(tokenizer, rule)
    pad, pieces = tokenizer.eos_token_id or 0, list[Piece]()
    for source, document in enumerate(tqdm(documents, desc="tokenise", unit="doc")):
        if document.messages:
            pieces += _chat_pieces(source, document, tokenizer, length)
        else:
            pieces += _text_pieces(source, document, tokenizer, length, leading)
    if not pieces:
        raise CorpusError("corpus: the tokenizer returns no tokens")
    rows = [np.array([*piece.ids, *[pad] * (length - len(piece.ids))], np.int32) for piece in pieces]
    tokens, size = torch.from_numpy(np.stack(rows)).long(), torch.tensor([len(piece.ids) for piece in pieces])
    counted = counted_positions(tokens, size, torch.tensor([piece.start for piece in pieces]), rule)
    for row, piece in zip(counted, pieces, strict=True):
        if piece.contents:
            row[: len(piece.contents)] &= torch.tensor(piece.contents)
    if not counted.any():
        raise CorpusError("corpus: every token is at an excluded position or is an excluded token")
    return Windows(tokens, counted, torch.tensor([piece.source for piece in pieces]), size)


class Piece(NamedTuple):
    """The tokens of a window of the document number `source`, counted from position `start`, and in a chat where
    `contents` is True.
    """

    ids: Sequence[int]
    start: int
    source: int
    contents: Sequence[bool] = ()


def _text_pieces(source: int, document: Document, tokenizer: Any, length: int, leading: int | None) -> Iterator[Piece]:
    encoder, own = text_encoder(tokenizer), bos_token_id(tokenizer)
    prefix = [] if leading is None else [leading]
    text = document.text.removeprefix(encoder.bos if leading is None else special_text(tokenizer, leading))
    ids, spelled = encoder.encode(text), text != document.text
    if spelled and not prefix and own is not None:
        ids = [own, *ids]
    size = length - len(prefix)
    for start in range(0, len(ids), size):
        yield Piece([*prefix, *ids[start : start + size]], int(bool(prefix) or (spelled and start == 0)), source)


def _chat_pieces(source: int, document: Document, tokenizer: Any, length: int) -> Iterator[Piece]:
    messages = [{"role": role, "content": content} for role, content in document.messages]
    ids, contents = text_encoder(tokenizer).encode_chat_contents(messages)
    for start in range(0, len(ids), length):
        part = slice(start, start + length)
        yield Piece(ids[part], 0, source, contents[part])


def counted_positions(tokens: Tensor, size: Tensor, start: Tensor, rule: ContextRule) -> Tensor:
    """Return the mask [n, length] of positions from `start` [n] to `size` [n] that the rule does not exclude."""
    position = torch.arange(tokens.shape[1])
    counted = (position >= start[:, None]) & (position < size[:, None])
    counted &= ~torch.isin(position, torch.tensor(rule.excluded_positions, dtype=torch.long))
    return counted & ~torch.isin(tokens, torch.tensor(rule.excluded_tokens, dtype=torch.long))
