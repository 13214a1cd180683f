"""Read labels of latents from Neuronpedia exports.

An export is a JSON array of records, or JSON lines with a record each; either may be gzipped, and a folder may hold
several. A record has `modelId`, `layer` (`20-gemmascope-res-16k`), `index`, and `description` or a list of
`explanations`, with `explanationModelName` and `typeName` (docs.neuronpedia.org, exports; /api/explanation/export;
/api/feature).
"""

import gzip
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from rudder.sae_models.errors import UserError

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
# Cap on the bytes of a line or array once unpacked: the largest exports hold a million records with embeddings.
SIZE_LIMIT = 1 << 30
LABEL_LIMIT = 2000


class LabelError(UserError):
    """Labels that cannot be read or belong to another SAE; the message names the file or field."""


class Explanation(msgspec.Struct, frozen=True, rename="camel"):
    """An explanation of a latent."""

    description: str | None = None
    explanation_model_name: str | None = None
    type_name: str | None = None


class ExplanationRecord(Explanation, frozen=True, rename="camel", kw_only=True):
    """A record of an export; `layer` is Neuronpedia's id of the SAE within the model."""

    model_id: str
    layer: str
    index: int
    explanations: list[Explanation] = []


@dataclass(frozen=True)
class Label:
    """A latent's label and who wrote it."""

    text: str
    origin: str


@dataclass(frozen=True)
class Labels:
    """Labels by latent; the number of records read, of those without text, and of those for a latent with a label."""

    by_latent: dict[int, Label]
    records: int
    empty: int
    repeated: int


def read(path: Path) -> Iterator[ExplanationRecord]:
    """Yield the records of a file, or of all exports in a folder. LabelError: the file that is not an export."""
    files = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES)) if path.is_dir() else [path]
    if not files:
        raise LabelError(f"{path}: holds no {', '.join(SUFFIXES)}")
    for file in files:
        yield from _records(file)


def _records(path: Path) -> Iterator[ExplanationRecord]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            if ".jsonl" not in path.name:
                content = _bounded(stream.read(SIZE_LIMIT + 1))
                yield from msgspec.json.decode(content, type=list[ExplanationRecord], strict=False)
                return
            while line := _bounded(stream.readline(SIZE_LIMIT + 1)):
                number += 1
                if line.strip():
                    yield msgspec.json.decode(line, type=ExplanationRecord, strict=False)
    except (OSError, EOFError, UnicodeDecodeError, msgspec.DecodeError, ValueError) as error:
        raise LabelError(f"{path}{f' line {number}' if number else ''}: {error}") from error


def _bounded(content: bytes) -> bytes:
    if len(content) > SIZE_LIMIT:
        raise ValueError(f"is longer than {SIZE_LIMIT} bytes")
    return content


def match(records: Iterable[ExplanationRecord], models: Iterable[str], site: str, latents: int) -> Labels:
    """Return the first label of each latent.

    LabelError: a record's model has none of the names `models`, its layer is not that of `site`, or its index is not
    below `latents`.
    """
    names = {_normalise_name(model) for model in models if model}
    by_latent: dict[int, Label] = {}
    count = empty = repeated = 0
    for record in records:
        count += 1
        _check(record, names, site, latents)
        label = _label(record)
        if label is None:
            empty += 1
        elif record.index in by_latent:
            repeated += 1
        else:
            by_latent[record.index] = label
    return Labels(by_latent, count, empty, repeated)


def _check(record: ExplanationRecord, models: set[str], site: str, latents: int) -> None:
    if _normalise_name(record.model_id) not in models:
        raise LabelError(f"modelId: {record.model_id!r}, the bundle's model is {' or '.join(sorted(models))}")
    layer, site_layer = re.match(r"\d+", record.layer), re.search(r"\d+", site)
    if layer and site_layer and int(layer[0]) != int(site_layer[0]):
        raise LabelError(f"layer: {record.layer!r}, the bundle's site is {site}")
    if not 0 <= record.index < latents:
        raise LabelError(f"index: {record.index}, the SAE has {latents} latents")


def _label(record: ExplanationRecord) -> Label | None:
    for explanation in (record, *record.explanations):
        text = " ".join((explanation.description or "").split())[:LABEL_LIMIT]
        if text:
            origin = ("neuronpedia", explanation.explanation_model_name, explanation.type_name)
            return Label(text, " ".join(part for part in origin if part))
    return None


def _normalise_name(model: str) -> str:
    """Return a model's name without organisation, case and punctuation."""
    return re.sub(r"[^a-z0-9]", "", model.rpartition("/")[2].lower())
