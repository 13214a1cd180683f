"""Labels of latents as Neuronpedia exports them.

An export is JSON, an array of rows, or JSON lines, a row each; either may be gzipped, and a folder may hold several.
A row has `modelId`, `layer` (`20-gemmascope-res-16k`), `index`, and `description`, or a list of such `explanations`,
with `explanationModelName` and `typeName` (docs.neuronpedia.org, exports; /api/explanation/export; /api/feature).
"""

import gzip
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from rudder.sae_models.errors import UserError

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
# Of one line or array once unpacked: the largest exports hold a million rows with embeddings.
SIZE_LIMIT = 1 << 30
LABEL_LIMIT = 2000


class LabelError(UserError):
    """Labels that cannot be read, or are of another SAE; the message names the file or field."""


class Explanation(msgspec.Struct, frozen=True, rename="camel"):
    """One explanation of a latent."""

    description: str | None = None
    explanation_model_name: str | None = None
    type_name: str | None = None


class Row(Explanation, frozen=True, rename="camel", kw_only=True):
    """One row of an export; `layer` is the identifier of the source within the model."""

    model_id: str
    layer: str
    index: int
    explanations: list[Explanation] = []


@dataclass(frozen=True)
class Label:
    """What a latent stands for, and who said so."""

    text: str
    origin: str


@dataclass(frozen=True)
class Labels:
    """Labels by latent; how many rows were read, and how many of them had no text or a latent that had one already."""

    by_latent: dict[int, Label]
    rows: int
    empty: int
    repeated: int


def read(path: Path) -> Iterator[Row]:
    """The rows of a file, or of all exports of a folder. LabelError: the file that is not such an export."""
    files = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES)) if path.is_dir() else [path]
    if not files:
        raise LabelError(f"{path}: holds no {', '.join(SUFFIXES)}")
    for file in files:
        yield from _rows(file)


def _rows(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            if ".jsonl" not in path.name:
                yield from msgspec.json.decode(_bounded(stream.read(SIZE_LIMIT + 1)), type=list[Row], strict=False)
                return
            while line := _bounded(stream.readline(SIZE_LIMIT + 1)):
                number += 1
                if line.strip():
                    yield msgspec.json.decode(line, type=Row, strict=False)
    except (OSError, EOFError, UnicodeDecodeError, msgspec.DecodeError, ValueError) as error:
        raise LabelError(f"{path}{f' line {number}' if number else ''}: {error}") from error


def _bounded(content: bytes) -> bytes:
    if len(content) > SIZE_LIMIT:
        raise ValueError(f"is longer than {SIZE_LIMIT} bytes")
    return content


def matching(rows: Iterable[Row], models: Iterable[str], site: str, latents: int) -> Labels:
    """The first label of each latent. LabelError: rows of a model that has none of these names, or of another layer."""
    known = {_plain(model) for model in models if model}
    by_latent: dict[int, Label] = {}
    count = empty = repeated = 0
    for row in rows:
        count += 1
        _check(row, known, site, latents)
        label = _label(row)
        if label is None:
            empty += 1
        elif row.index in by_latent:
            repeated += 1
        else:
            by_latent[row.index] = label
    return Labels(by_latent, count, empty, repeated)


def _check(row: Row, models: set[str], site: str, latents: int) -> None:
    if _plain(row.model_id) not in models:
        raise LabelError(f"modelId: {row.model_id!r}, the bundle's model is {' or '.join(sorted(models))}")
    layer, wanted = re.match(r"\d+", row.layer), re.search(r"\d+", site)
    if layer and wanted and int(layer[0]) != int(wanted[0]):
        raise LabelError(f"layer: {row.layer!r}, the bundle's site is {site}")
    if not 0 <= row.index < latents:
        raise LabelError(f"index: {row.index}, the SAE has {latents} latents")


def _label(row: Row) -> Label | None:
    for said in (row, *row.explanations):
        text = " ".join((said.description or "").split())[:LABEL_LIMIT]
        if text:
            origin = ("neuronpedia", said.explanation_model_name, said.type_name)
            return Label(text, " ".join(part for part in origin if part))
    return None


def _plain(model: str) -> str:
    """A model's name without organisation, case and punctuation."""
    return re.sub(r"[^a-z0-9]", "", model.rpartition("/")[2].lower())
