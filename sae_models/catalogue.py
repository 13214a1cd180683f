"""What the latents of a bundle stand for: a read-only SQLite file with full-text search over the labels."""

import re
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SCHEMA = """
CREATE TABLE latents (
    "index" INTEGER PRIMARY KEY, label TEXT NOT NULL, frequency REAL NOT NULL, max_activation REAL NOT NULL);
CREATE TABLE tokens (
    latent INTEGER NOT NULL, rank INTEGER NOT NULL, token TEXT NOT NULL, PRIMARY KEY (latent, rank)) WITHOUT ROWID;
CREATE TABLE contexts (
    latent INTEGER NOT NULL, rank INTEGER NOT NULL, before TEXT NOT NULL, token TEXT NOT NULL, after TEXT NOT NULL,
    activation REAL NOT NULL, source TEXT NOT NULL, PRIMARY KEY (latent, rank)) WITHOUT ROWID;
CREATE VIRTUAL TABLE labels USING fts5(label, content='latents', content_rowid='index');
"""
SUMMARY = 'SELECT "index", latents.label, frequency, max_activation FROM latents'
MAX_SEARCH_WORDS = 32


@dataclass(frozen=True)
class Context:
    """One place where a latent is active: text before, the token, text after, and the book it is from."""

    before: str
    token: str
    after: str
    activation: float
    source: str


@dataclass(frozen=True)
class Summary:
    """One latent in a list. `frequency` is the share of tokens on which it is active."""

    index: int
    label: str
    frequency: float
    max_activation: float


@dataclass(frozen=True)
class Latent:
    """All that is known of one latent; tokens and contexts strongest first."""

    summary: Summary
    tokens: tuple[str, ...]
    contexts: tuple[Context, ...]


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

    def get(self, index: int) -> Latent:
        """One latent. LookupError: there is none with this index."""
        # An index that SQLite's integers cannot hold is not a latent either.
        row = self._database.execute(f'{SUMMARY} WHERE "index" = ?', (min(max(index, -1), 2**62),)).fetchone()
        if row is None:
            raise LookupError(f"index: latent {index} is not in the catalogue")
        tokens = self._database.execute("SELECT token FROM tokens WHERE latent = ? ORDER BY rank", (index,))
        contexts = self._database.execute(
            "SELECT before, token, after, activation, source FROM contexts WHERE latent = ? ORDER BY rank", (index,)
        )
        return Latent(Summary(*row), tuple(token for (token,) in tokens), tuple(Context(*row) for row in contexts))

    def page(self, after: int, limit: int) -> list[Summary]:
        """Up to `limit` latents with an index above `after` (-1: from the first), in order."""
        rows = self._database.execute(f'{SUMMARY} WHERE "index" > ? ORDER BY "index" LIMIT ?', (after, max(limit, 0)))
        return [Summary(*row) for row in rows]

    def search(self, words: str, limit: int) -> list[Summary]:
        """Up to `limit` latents whose label has all the words, or words that begin so, best first. Any text is fine."""
        query = " ".join(f'"{word}"*' for word in re.findall(r"[^\W_]+", words)[:MAX_SEARCH_WORDS])
        if not query:
            return []
        matching = 'JOIN labels ON labels.rowid = latents."index" WHERE labels MATCH ?'
        rows = self._database.execute(
            f"{SUMMARY} {matching} ORDER BY labels.rank, labels.rowid LIMIT ?", (query, max(limit, 0))
        )
        return [Summary(*row) for row in rows]

    def close(self) -> None:
        """Closes the file."""
        self._database.close()


def write(path: Path, latents: Iterable[Latent]) -> None:
    """Writes a new catalogue; the latents come in the order of their indices."""
    database = sqlite3.connect(path)
    database.executescript(SCHEMA)
    for latent in latents:
        summary = latent.summary
        index = summary.index
        database.execute(
            "INSERT INTO latents VALUES (?, ?, ?, ?)", (index, summary.label, summary.frequency, summary.max_activation)
        )
        database.executemany(
            "INSERT INTO tokens VALUES (?, ?, ?)", ((index, rank, token) for rank, token in enumerate(latent.tokens))
        )
        database.executemany(
            "INSERT INTO contexts VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                (index, rank, c.before, c.token, c.after, c.activation, c.source)
                for rank, c in enumerate(latent.contexts)
            ),
        )
    database.execute("INSERT INTO labels(labels) VALUES ('rebuild')")
    database.commit()
    database.execute("VACUUM")
    database.close()
