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
# Words of Neuronpedia's names of label sets, and the hook points that an SAE with such labels reads.
RESIDUAL, MLP, ATTENTION = ("resid_pre", "resid_mid", "resid_post"), ("mlp_in", "mlp_out"), ("attn_out",)
POINTS_OF_WORD = {
    "res": RESIDUAL, "resid": RESIDUAL, "residual": RESIDUAL,
    "mlp": MLP, "transcoder": MLP, "transcoders": MLP, "tc": MLP, "clt": MLP,
    "att": ATTENTION, "attn": ATTENTION, "attention": ATTENTION, "embed": ("embed",), "embedding": ("embed",),
}  # fmt: skip
WIDTH_ROUNDING = 1.05


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
    """Labels by latent; the number of records read, of those without text, and of those for a latent with a label; the
    label set that they are of, such as `20-gemmascope-res-16k`.
    """

    by_latent: dict[int, Label]
    records: int
    empty: int
    repeated: int
    label_set: str = ""


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


@dataclass(frozen=True)
class Owner:
    """The SAE that labels must be of: names of its model, its site, its number of latents and, if it is known, the name
    of its label set, Neuronpedia's id within the model.
    """

    models: tuple[str, ...]
    site: str
    latents: int
    label_set: str = ""


def match(
    records: Iterable[ExplanationRecord], models: Iterable[str], site: str, latents: int, label_set: str = ""
) -> Labels:
    """Return the first label of each latent.

    LabelError: the records are of several label sets, or of another one than the SAE's: the set's name is not
    `label_set`, if that is known; it names another model, layer, hook point or width; or, where it names no hook point,
    nothing tells whose labels they are.
    """
    owner = Owner(tuple(_normalise_name(model) for model in models if model), site, latents, label_set)
    found = ""
    by_latent: dict[int, Label] = {}
    count = empty = repeated = 0
    for record in records:
        count += 1
        if record.layer != found:
            _check_set(record, owner)
            if found:
                raise LabelError(f"layer: {record.layer!r} after {found!r}, labels must be of one set")
            found = record.layer
        _check_record(record, owner)
        label = _label(record)
        if label is None:
            empty += 1
        elif record.index in by_latent:
            repeated += 1
        else:
            by_latent[record.index] = label
    return Labels(by_latent, count, empty, repeated, found)


def _check_record(record: ExplanationRecord, owner: Owner) -> None:
    if _normalise_name(record.model_id) not in owner.models:
        raise LabelError(f"modelId: {record.model_id!r}, the bundle's model is {' or '.join(sorted(owner.models))}")
    if not 0 <= record.index < owner.latents:
        raise LabelError(f"index: {record.index}, the SAE has {owner.latents} latents")


def _check_set(record: ExplanationRecord, owner: Owner) -> None:
    """Raise LabelError unless the label set of a record is that of the SAE. Many sets have the same width."""
    if _normalise_name(record.model_id) not in owner.models:
        raise LabelError(f"modelId: {record.model_id!r}, the bundle's model is {' or '.join(sorted(owner.models))}")
    name, site = record.layer, owner.site
    layer, site_layer = re.match(r"\d+", name), re.search(r"\d+", site)
    if layer and site_layer and int(layer[0]) != int(site_layer[0]):
        raise LabelError(f"layer: {name!r}, the bundle's site is {site}")
    if owner.label_set:
        if name != owner.label_set:
            raise LabelError(f"layer: {name!r}, the labels of this SAE are called {owner.label_set!r}")
        return
    words = re.split(r"[^a-z0-9]+", name.lower())
    points = {point for word in words for point in POINTS_OF_WORD.get(word, ())}
    if not points:
        raise LabelError(f"layer: {name!r} does not say whose labels they are, give --labels-set {name} if this SAE's")
    if site.rpartition(".")[2] not in points:
        raise LabelError(f"layer: {name!r}, the bundle's site is {site}")
    # A dictionary of fewer latents has no such word in its name.
    widths = (re.fullmatch(r"(\d+)(k|m)", word) for word in words if owner.latents >= 1000)
    for width in filter(None, widths):
        thousands = int(width[1]) * (1_000 if width[2] == "k" else 1_000_000)
        # 16k is 16,384, 24k is 24,576, 1m is 1,048,576.
        if not thousands <= owner.latents <= WIDTH_ROUNDING * thousands:
            raise LabelError(f"layer: {name!r}, the SAE has {owner.latents} latents")


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
