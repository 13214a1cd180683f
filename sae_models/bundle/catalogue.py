"""The catalogue of a bundle's latents, labels and statistics: a read-only SQLite file with full-text search."""

import re
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

QUANTILES = (0.25, 0.5, 0.75, 0.9, 0.99)
SCHEMA = """
PRAGMA user_version = 2;
CREATE TABLE latents (
    "index" INTEGER PRIMARY KEY, label TEXT NOT NULL, frequency REAL, max_activation REAL, origin TEXT NOT NULL,
    q25 REAL, q50 REAL, q75 REAL, q90 REAL, q99 REAL);
CREATE TABLE tokens (
    latent INTEGER NOT NULL, rank INTEGER NOT NULL, token TEXT NOT NULL, PRIMARY KEY (latent, rank)) WITHOUT ROWID;
CREATE TABLE contexts (
    latent INTEGER NOT NULL, rank INTEGER NOT NULL, before TEXT NOT NULL, token TEXT NOT NULL, after TEXT NOT NULL,
    activation REAL NOT NULL, source TEXT NOT NULL, PRIMARY KEY (latent, rank)) WITHOUT ROWID;
CREATE TABLE words (
    latent INTEGER NOT NULL, promoted INTEGER NOT NULL, rank INTEGER NOT NULL, token TEXT NOT NULL, logit REAL NOT NULL,
    PRIMARY KEY (latent, promoted, rank)) WITHOUT ROWID;
CREATE TABLE meanings (latent INTEGER PRIMARY KEY, embedder TEXT NOT NULL, vector BLOB NOT NULL);
CREATE VIRTUAL TABLE labels USING fts5(label, content='latents', content_rowid='index');
"""
SUMMARY = 'SELECT "index", latents.label, frequency, max_activation, origin FROM latents'
MAX_SEARCH_WORDS = 32

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Context:
    """A token on which a latent is active, the text before and after it, and the book it is from."""

    before: str
    token: str
    after: str
    activation: float
    source: str


@dataclass(frozen=True)
class Word:
    """A token of the vocabulary, and the logit that one unit of the latent adds to it, before the final norm's scale.

    Logits are relative to their mean over the vocabulary, which changes no probability.
    """

    token: str
    logit: float


@dataclass(frozen=True)
class Summary:
    """A latent in a list. `frequency`: share of tokens on which it is active, None if not measured.

    `origin`: who wrote the label, empty without one.
    """

    index: int
    label: str
    frequency: float | None
    max_activation: float | None
    origin: str = ""


@dataclass(frozen=True)
class Latent:
    """The catalogue entry of a latent; tokens and contexts by activation, strongest first.

    `quantiles`: of its non-zero activations at QUANTILES, or empty. `promoted` and `suppressed`: the tokens whose
    logits its decoder raises and lowers most (logit lens), strongest first.
    """

    summary: Summary
    tokens: tuple[str, ...]
    contexts: tuple[Context, ...]
    quantiles: tuple[float, ...] = ()
    promoted: tuple[Word, ...] = ()
    suppressed: tuple[Word, ...] = ()


class Catalogue:
    """A catalogue opened for reading. Thread-safe."""

    def __init__(self, path: Path) -> None:
        # One connection serves all threads: SQLite is built serialized, and an immutable file takes no locks.
        self._database = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False
        )

    def __len__(self) -> int:
        count: int = self._database.execute("SELECT count(*) FROM latents").fetchone()[0]
        return count

    @property
    def embedder(self) -> str:
        """Name of the sentence embedder of the stored label embeddings; empty without any."""
        record = self._database.execute("SELECT embedder FROM meanings LIMIT 1").fetchone()
        return record[0] if record else ""

    def get(self, index: int) -> Latent:
        """Return the entry of a latent. LookupError: no latent has this index."""
        # Clamp indices beyond SQLite's 64-bit integers: they match no latent either.
        key = min(max(index, -1), 2**62)
        summary = self._database.execute(f'{SUMMARY} WHERE "index" = ?', (key,)).fetchone()
        if summary is None:
            raise LookupError(f"index: latent {index} is not in the catalogue")
        select = self._database.execute
        tokens = select("SELECT token FROM tokens WHERE latent = ? ORDER BY rank", (key,))
        contexts = select(
            "SELECT before, token, after, activation, source FROM contexts WHERE latent = ? ORDER BY rank", (key,)
        )
        quantiles = select('SELECT q25, q50, q75, q90, q99 FROM latents WHERE "index" = ?', (key,)).fetchone()
        words = select("SELECT promoted, token, logit FROM words WHERE latent = ? ORDER BY rank", (key,)).fetchall()
        return Latent(
            Summary(*summary),
            tuple(token for (token,) in tokens),
            tuple(Context(*context) for context in contexts),
            () if quantiles[0] is None else quantiles,
            tuple(Word(*word) for promoted, *word in words if promoted),
            tuple(Word(*word) for promoted, *word in words if not promoted),
        )

    def page(self, after: int, limit: int) -> list[Summary]:
        """Return up to `limit` latents with an index above `after` (-1: from the first), in order."""
        query = f'{SUMMARY} WHERE "index" > ? ORDER BY "index" LIMIT ?'
        return [Summary(*record) for record in self._database.execute(query, (after, max(limit, 0)))]

    def search(self, words: str, limit: int) -> list[Summary]:
        """Return up to `limit` latents whose label contains every word, its plural, or a word with it as prefix.

        Accepts any text. Ordered by how many words of the label are the searched ones, not just begin with them, then
        by relevance and by frequency; latents that were never active come last.
        """
        searched = split_words(words)[:MAX_SEARCH_WORDS]
        if not searched:
            return []
        query = " ".join(f'"{stem(word).removesuffix("y")}"*' for word in searched)
        matching = 'JOIN labels ON labels.rowid = latents."index" WHERE labels MATCH ?'
        records = self._database.execute(
            f"{SUMMARY} {matching} ORDER BY labels.rank, frequency DESC, labels.rowid", (query,)
        )
        summaries = (Summary(*record) for record in records)
        scored = [(score, summary) for summary in summaries if (score := label_score(searched, summary))]
        scored.sort(key=lambda pair: pair[0], reverse=True)
        return [summary for _, summary in scored[: max(limit, 0)]]

    def embeddings(self) -> tuple[list[int], Vectors]:
        """Return the latents with an embedded label, and the embeddings as unit vectors [n, e]."""
        records = self._database.execute("SELECT latent, vector FROM meanings ORDER BY latent").fetchall()
        vectors = np.frombuffer(b"".join(vector for _, vector in records), "<f2").astype(np.float32)
        return [latent for latent, _ in records], vectors.reshape(len(records), -1 if records else 0)

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def stem(word: str) -> str:
    """Return the singular of an English word."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def label_score(searched: Sequence[str], summary: Summary) -> tuple[bool, int, int] | None:
    """Return how well a label matches: (ever active, words searched that it has, its words that were searched).

    None: it lacks one of the words.
    """
    words, stems = split_words(summary.label), {stem(word) for word in searched}
    exact = {stem(word) for word in words} & stems
    if not all(stem(word) in exact or any(other.startswith(word) for other in words) for word in searched):
        return None
    return summary.frequency != 0, len(exact), sum(stem(word) in stems for word in words)


def write(path: Path, latents: Iterable[Latent]) -> None:
    """Write a new catalogue from latents in the order of their indices."""
    database = sqlite3.connect(path)
    database.executescript(SCHEMA)
    for latent in latents:
        _insert(database, latent)
    database.execute("INSERT INTO labels(labels) VALUES ('rebuild')")
    _finish(database)


def write_embeddings(path: Path, embedder: str, indices: Sequence[int], vectors: Vectors) -> None:
    """Store unit vectors [n, e] that embed the labels of latents, in place of older ones."""
    database = sqlite3.connect(path)
    database.execute("DELETE FROM meanings")
    stored = ((index, embedder, vector.astype("<f2").tobytes()) for index, vector in zip(indices, vectors, strict=True))
    database.executemany("INSERT INTO meanings VALUES (?, ?, ?)", stored)
    _finish(database)


def _insert(database: sqlite3.Connection, latent: Latent) -> None:
    s, index = latent.summary, latent.summary.index
    quantiles = latent.quantiles or (None,) * len(QUANTILES)
    record = (index, s.label, s.frequency, s.max_activation, s.origin, *quantiles)
    database.execute("INSERT INTO latents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", record)
    tokens = ((index, rank, token) for rank, token in enumerate(latent.tokens))
    database.executemany("INSERT INTO tokens VALUES (?, ?, ?)", tokens)
    contexts = ((index, r, c.before, c.token, c.after, c.activation, c.source) for r, c in enumerate(latent.contexts))
    database.executemany("INSERT INTO contexts VALUES (?, ?, ?, ?, ?, ?, ?)", contexts)
    for promoted, words in ((1, latent.promoted), (0, latent.suppressed)):
        records = ((index, promoted, rank, word.token, word.logit) for rank, word in enumerate(words))
        database.executemany("INSERT INTO words VALUES (?, ?, ?, ?, ?)", records)


def _finish(database: sqlite3.Connection) -> None:
    database.commit()
    database.execute("VACUUM")
    database.close()
