"""The catalogue of a bundle's latents, labels and statistics: a read-only SQLite file with full-text search."""

import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

QUANTILES = (0.25, 0.5, 0.75, 0.9, 0.99)
# 2: labels; 3: their scores, neighbours, held-out contexts; 4: output and input scores.
VERSION = 4
WITH_LABEL_SCORES, WITH_STEERING_SCORES = 3, 4
SCHEMA = f"""
PRAGMA user_version = {VERSION};
CREATE TABLE latents (
    "index" INTEGER PRIMARY KEY, label TEXT NOT NULL, frequency REAL, max_activation REAL, origin TEXT NOT NULL,
    q25 REAL, q50 REAL, q75 REAL, q90 REAL, q99 REAL, label_score REAL, label_error REAL, intervention REAL,
    output_score REAL, input_score REAL);
CREATE TABLE tokens (
    latent INTEGER NOT NULL, rank INTEGER NOT NULL, token TEXT NOT NULL, PRIMARY KEY (latent, rank)) WITHOUT ROWID;
CREATE TABLE contexts (
    latent INTEGER NOT NULL, rank INTEGER NOT NULL, before TEXT NOT NULL, token TEXT NOT NULL, after TEXT NOT NULL,
    activation REAL NOT NULL, source TEXT NOT NULL, held_out INTEGER NOT NULL,
    PRIMARY KEY (latent, rank)) WITHOUT ROWID;
CREATE TABLE neighbours (
    latent INTEGER NOT NULL, rank INTEGER NOT NULL, neighbour INTEGER NOT NULL, cosine REAL NOT NULL,
    PRIMARY KEY (latent, rank)) WITHOUT ROWID;
CREATE TABLE words (
    latent INTEGER NOT NULL, promoted INTEGER NOT NULL, rank INTEGER NOT NULL, token TEXT NOT NULL, logit REAL NOT NULL,
    PRIMARY KEY (latent, promoted, rank)) WITHOUT ROWID;
CREATE TABLE meanings (latent INTEGER PRIMARY KEY, embedder TEXT NOT NULL, vector BLOB NOT NULL);
CREATE VIRTUAL TABLE labels USING fts5(label, content='latents', content_rowid='index', tokenize='porter unicode61');
"""
COLUMNS = '"index", latents.label, frequency, max_activation, origin'
SCORES = (
    ("label_score, label_error, intervention", WITH_LABEL_SCORES),
    ("output_score, input_score", WITH_STEERING_SCORES),
)
MAX_SEARCH_WORDS = 32
# Limit of a page that holds every latent.
ALL = 1 << 40

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Context:
    """A token on which a latent is active, the text before and after it, and the book it is from.

    `held_out`: drawn by activation from documents that the label was not made from. The others are the strongest.
    """

    before: str
    token: str
    after: str
    activation: float
    source: str
    held_out: bool = False


@dataclass(frozen=True)
class Word:
    """A token of the vocabulary, and the logit that one unit of the latent adds to it, before the final norm's scale.

    Logits are relative to their mean over the vocabulary, which changes no probability.
    """

    token: str
    logit: float


@dataclass(frozen=True)
class Neighbour:
    """A latent whose decoder row is similar, and the cosine."""

    index: int
    cosine: float


@dataclass(frozen=True)
class Summary:
    """A latent in a list. `frequency`: share of tokens on which it is active, None if not measured.

    `label` is empty where none is better than chance; `origin`: who wrote it. `label_score`: the area under the ROC
    curve of the label on held-out contexts, 0.5 at chance, with half the width of its interval, `label_error`.
    `intervention`: the area under that of its words among the vocabulary, ordered by how much the decoder row raises
    their logits. `output_score`: how much the latent says what it promotes; `input_score`: the share of its strongest
    contexts whose token it promotes (arXiv 2505.20063). All None if not measured.
    """

    index: int
    label: str
    frequency: float | None
    max_activation: float | None
    origin: str = ""
    label_score: float | None = None
    label_error: float | None = None
    intervention: float | None = None
    output_score: float | None = None
    input_score: float | None = None


@dataclass(frozen=True)
class Latent:
    """The catalogue entry of a latent; tokens and contexts by activation, strongest first.

    `quantiles`: of its non-zero activations at QUANTILES, or empty. `promoted` and `suppressed`: the tokens whose
    logits its decoder raises and lowers most (logit lens), strongest first. `neighbours`: the latents with the most
    similar decoder rows, nearest first.
    """

    summary: Summary
    tokens: tuple[str, ...]
    contexts: tuple[Context, ...]
    quantiles: tuple[float, ...] = ()
    promoted: tuple[Word, ...] = ()
    suppressed: tuple[Word, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()


class Catalogue:
    """A catalogue opened for reading. Thread-safe."""

    def __init__(self, path: Path) -> None:
        # One connection serves all threads: SQLite is built serialized, and an immutable file takes no locks.
        self._database = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False
        )
        # Older catalogues have no scores, neighbours and held-out contexts.
        version = self._database.execute("PRAGMA user_version").fetchone()[0]
        self._complete = version >= WITH_LABEL_SCORES
        scores = (names if version >= since else ", ".join(["NULL"] * len(names.split(","))) for names, since in SCORES)
        self._summary = f"SELECT {COLUMNS}, {', '.join(scores)} FROM latents"
        self._scored_for_steering = version >= WITH_STEERING_SCORES

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
        summary = self._database.execute(f'{self._summary} WHERE "index" = ?', (key,)).fetchone()
        if summary is None:
            raise LookupError(f"index: latent {index} is not in the catalogue")
        select = self._database.execute
        tokens = select("SELECT token FROM tokens WHERE latent = ? ORDER BY rank", (key,))
        columns = f"before, token, after, activation, source, {'held_out' if self._complete else '0'}"
        contexts = select(f"SELECT {columns} FROM contexts WHERE latent = ? ORDER BY rank", (key,))
        near = "SELECT neighbour, cosine FROM neighbours WHERE latent = ? ORDER BY rank"
        neighbours = select(near, (key,)) if self._complete else ()
        quantiles = select('SELECT q25, q50, q75, q90, q99 FROM latents WHERE "index" = ?', (key,)).fetchone()
        words = select("SELECT promoted, token, logit FROM words WHERE latent = ? ORDER BY rank", (key,)).fetchall()
        return Latent(
            Summary(*summary),
            tuple(token for (token,) in tokens),
            tuple(replace(Context(*context), held_out=bool(context[5])) for context in contexts),
            () if quantiles[0] is None else quantiles,
            tuple(Word(*word) for promoted, *word in words if promoted),
            tuple(Word(*word) for promoted, *word in words if not promoted),
            tuple(Neighbour(*neighbour) for neighbour in neighbours),
        )

    def page(self, after: int, limit: int) -> list[Summary]:
        """Return up to `limit` latents with an index above `after` (-1: from the first), in order."""
        query = f'{self._summary} WHERE "index" > ? ORDER BY "index" LIMIT ?'
        return [Summary(*record) for record in self._database.execute(query, (after, max(limit, 0)))]

    @property
    def has_output_scores(self) -> bool:
        """Whether any latent has an output score."""
        query = "SELECT 1 FROM latents WHERE output_score IS NOT NULL LIMIT 1"
        return self._scored_for_steering and self._database.execute(query).fetchone() is not None

    def search(self, words: str, limit: int, *, for_steering: bool = False) -> list[Summary]:
        """Return up to `limit` latents whose label has one of the words, inflected or not, or a word that begins so.

        Accepts any text. Latents that were ever active come first, then those with the most of the words, then those
        with the most as whole words; then by relevance and by frequency. `for_steering`: by output score, of those with
        the most of the words.
        """
        searched = list(dict.fromkeys(split_words(words)))[:MAX_SEARCH_WORDS]
        matches, whole = Counter[int](), Counter[int]()
        for word in searched:
            inflected = self._matching(f'"{word}"')
            whole.update(inflected)
            matches.update(inflected | self._beginning(word))
        if not matches:
            return []
        query = " OR ".join(f'"{stem(word)}"*' for word in searched)
        order = "ORDER BY labels.rank, frequency DESC, labels.rowid"
        records = self._database.execute(
            f'{self._summary} JOIN labels ON labels.rowid = latents."index" WHERE labels MATCH ? {order}', (query,)
        )
        summaries = [summary for record in records if (summary := Summary(*record)).index in matches]
        summaries.sort(key=lambda s: (s.frequency != 0, matches[s.index], whole[s.index]), reverse=True)
        if for_steering:
            summaries.sort(key=lambda s: (s.frequency != 0, matches[s.index], by_output(s)), reverse=True)
        return summaries[: max(limit, 0)]

    def _matching(self, query: str) -> set[int]:
        """Return the latents whose labels match a full-text query."""
        return {index for (index,) in self._database.execute("SELECT rowid FROM labels WHERE labels MATCH ?", (query,))}

    def _beginning(self, word: str) -> set[int]:
        """Return the latents whose labels have a word that begins with this one."""
        # The index holds stems, which begin like some words that this one does not begin.
        candidates = self._database.execute(
            "SELECT rowid, label FROM labels WHERE labels MATCH ?", (f'"{stem(word)}"*',)
        )
        return {index for index, label in candidates if any(other.startswith(word) for other in split_words(label))}

    def embeddings(self) -> tuple[list[int], Vectors]:
        """Return the latents with an embedded label, and the embeddings as unit vectors [n, e]."""
        records = self._database.execute("SELECT latent, vector FROM meanings ORDER BY latent").fetchall()
        vectors = np.frombuffer(b"".join(vector for _, vector in records), "<f2").astype(np.float32)
        return [latent for latent, _ in records], vectors.reshape(len(records), -1 if records else 0)

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def by_output(summary: Summary) -> float:
    """Return what latents are ordered by for steering: the output score, below all others if not measured."""
    return -1.0 if summary.output_score is None else summary.output_score


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def stem(word: str) -> str:
    """Return the singular of an English word."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


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
    scores = (s.label_score, s.label_error, s.intervention, s.output_score, s.input_score)
    record = (index, s.label, s.frequency, s.max_activation, s.origin, *quantiles, *scores)
    database.execute("INSERT INTO latents VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", record)
    tokens = ((index, rank, token) for rank, token in enumerate(latent.tokens))
    database.executemany("INSERT INTO tokens VALUES (?, ?, ?)", tokens)
    contexts = (
        (index, rank, c.before, c.token, c.after, c.activation, c.source, c.held_out)
        for rank, c in enumerate(latent.contexts)
    )
    database.executemany("INSERT INTO contexts VALUES (?, ?, ?, ?, ?, ?, ?, ?)", contexts)
    neighbours = ((index, rank, near.index, near.cosine) for rank, near in enumerate(latent.neighbours))
    database.executemany("INSERT INTO neighbours VALUES (?, ?, ?, ?)", neighbours)
    for promoted, words in ((1, latent.promoted), (0, latent.suppressed)):
        records = ((index, promoted, rank, word.token, word.logit) for rank, word in enumerate(words))
        database.executemany("INSERT INTO words VALUES (?, ?, ?, ?, ?)", records)


def _finish(database: sqlite3.Connection) -> None:
    database.commit()
    database.execute("VACUUM")
    database.close()
