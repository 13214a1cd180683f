"""What the latents of a bundle stand for: a read-only SQLite file, searched by the words or the meaning of labels."""

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
    """One place where a latent is active: text before, the token, text after, and the book it is from."""

    before: str
    token: str
    after: str
    activation: float
    source: str


@dataclass(frozen=True)
class Word:
    """A token of the vocabulary, and how much one unit of the latent adds to its logit, before the final norm's scale.

    Logits are taken from their mean over the vocabulary, which changes no probability.
    """

    token: str
    logit: float


@dataclass(frozen=True)
class Summary:
    """One latent in a list. `frequency` is the share of tokens on which it is active; None where nobody measured it.

    `origin` tells who made the label; empty without one.
    """

    index: int
    label: str
    frequency: float | None
    max_activation: float | None
    origin: str = ""


@dataclass(frozen=True)
class Latent:
    """All that is known of one latent; tokens and contexts strongest first.

    `quantiles` are of its activation where it is active, at QUANTILES, or empty. `promoted` and `suppressed` are what
    its decoder direction says of the next token (logit lens), strongest first.
    """

    summary: Summary
    tokens: tuple[str, ...]
    contexts: tuple[Context, ...]
    quantiles: tuple[float, ...] = ()
    promoted: tuple[Word, ...] = ()
    suppressed: tuple[Word, ...] = ()


class Catalogue:
    """A catalogue opened for reading. May be shared between threads."""

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
        """The sentence embedder of the stored meanings; empty without any."""
        row = self._database.execute("SELECT embedder FROM meanings LIMIT 1").fetchone()
        return row[0] if row else ""

    def get(self, index: int) -> Latent:
        """One latent. LookupError: there is none with this index."""
        # An index that SQLite's integers cannot hold is not a latent either.
        key = min(max(index, -1), 2**62)
        row = self._database.execute(f'{SUMMARY} WHERE "index" = ?', (key,)).fetchone()
        if row is None:
            raise LookupError(f"index: latent {index} is not in the catalogue")
        select = self._database.execute
        tokens = select("SELECT token FROM tokens WHERE latent = ? ORDER BY rank", (key,))
        contexts = select(
            "SELECT before, token, after, activation, source FROM contexts WHERE latent = ? ORDER BY rank", (key,)
        )
        quantiles = select('SELECT q25, q50, q75, q90, q99 FROM latents WHERE "index" = ?', (key,)).fetchone()
        words = select("SELECT promoted, token, logit FROM words WHERE latent = ? ORDER BY rank", (key,)).fetchall()
        return Latent(
            Summary(*row),
            tuple(token for (token,) in tokens),
            tuple(Context(*row) for row in contexts),
            () if quantiles[0] is None else quantiles,
            tuple(Word(*word) for promoted, *word in words if promoted),
            tuple(Word(*word) for promoted, *word in words if not promoted),
        )

    def page(self, after: int, limit: int) -> list[Summary]:
        """Up to `limit` latents with an index above `after` (-1: from the first), in order."""
        rows = self._database.execute(f'{SUMMARY} WHERE "index" > ? ORDER BY "index" LIMIT ?', (after, max(limit, 0)))
        return [Summary(*row) for row in rows]

    def search(self, words: str, limit: int) -> list[Summary]:
        """Up to `limit` latents whose label has all the words, or words that begin so. Any text is fine.

        The best labels come first, and of labels as good the more frequent latents.
        """
        query = " ".join(f'"{word}"*' for word in re.findall(r"[^\W_]+", words)[:MAX_SEARCH_WORDS])
        if not query:
            return []
        matching = 'JOIN labels ON labels.rowid = latents."index" WHERE labels MATCH ?'
        rows = self._database.execute(
            f"{SUMMARY} {matching} ORDER BY labels.rank, frequency DESC, labels.rowid LIMIT ?", (query, max(limit, 0))
        )
        return [Summary(*row) for row in rows]

    def meanings(self) -> tuple[list[int], Vectors]:
        """Latents with a stored meaning, and the meanings as unit vectors [n, e]."""
        rows = self._database.execute("SELECT latent, vector FROM meanings ORDER BY latent").fetchall()
        vectors = np.frombuffer(b"".join(vector for _, vector in rows), "<f2").astype(np.float32)
        return [latent for latent, _ in rows], vectors.reshape(len(rows), -1 if rows else 0)

    def close(self) -> None:
        """Closes the file."""
        self._database.close()


def write(path: Path, latents: Iterable[Latent]) -> None:
    """Writes a new catalogue; the latents come in the order of their indices."""
    database = sqlite3.connect(path)
    database.executescript(SCHEMA)
    for latent in latents:
        _insert(database, latent)
    database.execute("INSERT INTO labels(labels) VALUES ('rebuild')")
    _finish(database)


def write_meanings(path: Path, embedder: str, indices: Sequence[int], vectors: Vectors) -> None:
    """Stores unit vectors [n, e] of the labels of latents, in place of older ones."""
    database = sqlite3.connect(path)
    database.execute("DELETE FROM meanings")
    stored = ((index, embedder, vector.astype("<f2").tobytes()) for index, vector in zip(indices, vectors, strict=True))
    database.executemany("INSERT INTO meanings VALUES (?, ?, ?)", stored)
    _finish(database)


def _insert(database: sqlite3.Connection, latent: Latent) -> None:
    s, index = latent.summary, latent.summary.index
    known = latent.quantiles or (None,) * len(QUANTILES)
    row = (index, s.label, s.frequency, s.max_activation, s.origin, *known)
    database.execute("INSERT INTO latents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    tokens = ((index, rank, token) for rank, token in enumerate(latent.tokens))
    database.executemany("INSERT INTO tokens VALUES (?, ?, ?)", tokens)
    contexts = ((index, r, c.before, c.token, c.after, c.activation, c.source) for r, c in enumerate(latent.contexts))
    database.executemany("INSERT INTO contexts VALUES (?, ?, ?, ?, ?, ?, ?)", contexts)
    for promoted, words in ((1, latent.promoted), (0, latent.suppressed)):
        rows = ((index, promoted, rank, word.token, word.logit) for rank, word in enumerate(words))
        database.executemany("INSERT INTO words VALUES (?, ?, ?, ?, ?)", rows)


def _finish(database: sqlite3.Connection) -> None:
    database.commit()
    database.execute("VACUUM")
    database.close()
