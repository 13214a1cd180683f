"""Steering concepts: rows of a bundle that were calibrated for a topic. `concepts.yaml` in the bundle's folder.

Imports no torch: the server reads the file before it loads a model.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import msgspec
import yaml

from rudder.sae_models.errors import UserError
from rudder.sae_models.files import write_atomically

FILE = "concepts.yaml"
MAX_BYTES = 8 << 20


class ConceptError(UserError):
    """A file of concepts cannot be used; the message begins with its path."""


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A part of the file; unknown fields are an error."""


class Row(Part, frozen=True):
    """A latent of a candidate. At dose v it displaces x by v * weight * ||x|| along its unit decoder row.

    `output_score`, `input_score`: of arXiv 2505.20063; None if not measured.
    """

    index: int
    weight: float
    label: str = ""
    output_score: float | None = None
    input_score: float | None = None


class Point(Part, frozen=True):
    """What texts were like at one dose. `dose`: norm of the displacement as a share of ||x||.

    `perplexity`: under the plain model; `repetition`: share of 4-grams that repeat an earlier one of their text;
    `distinct`: distinct bigrams by all bigrams; `kl`: of the steered from the plain model, in nats per generated token;
    `response`: mean probability of the topic.
    """

    dose: float
    perplexity: float
    repetition: float
    distinct: float
    kl: float
    response: float


class Interval(Part, frozen=True):
    """A figure with its 95 % confidence interval."""

    value: float
    low: float
    high: float


class Candidate(Part, frozen=True):
    """Rows that were tried for a topic: `kind` tells how they were selected.

    `s_max`: the largest dose within the budgets, which is strength 1; `limit`: the budget that a larger dose breaks,
    empty if none of the grid does. `curve`: doses in ascending order, the first 0. `response`: at s_max. `random`: 95th
    percentile of the response of random directions at that dose.
    """

    kind: str
    rows: tuple[Row, ...]
    s_max: float
    limit: str
    curve: tuple[Point, ...]
    response: Interval
    random: float

    @property
    def inert(self) -> str:
        """Why these rows are not served; empty if they are."""
        if self.s_max <= 0:
            return f"no dose of its rows is within the budget of {self.limit}"
        if self.response.value <= self.random:
            reached = f"its rows reach {self.response.value:.3f} of the topic"
            return f"{reached}, random directions at the same dose {self.random:.3f} (95th percentile)"
        return ""


class Concept(Part, frozen=True):
    """A topic: its name, other words for it, how its rows were found, and candidates, best response first."""

    name: str
    source: str
    candidates: tuple[Candidate, ...]
    words: tuple[str, ...] = ()

    @property
    def chosen(self) -> Candidate:
        """The candidate that is served."""
        return self.candidates[0]


class Calibration(Part, frozen=True):
    """How texts were generated and which budgets held. Ratios and differences are to unsteered texts of equal seeds."""

    prompts: int
    seeds: int
    tokens: int
    temperature: float
    random_directions: int
    perplexity_ratio: float
    repetition_rise: float
    distinct_ratio: float


class Concepts(Part, frozen=True):
    """The content of a file. `model`: SHA-256 of the model; `weights`: SHA-256 of the bundle's files of weights."""

    bundle: str
    site: str
    model: str
    weights: dict[str, str]
    calibration: Calibration
    concepts: tuple[Concept, ...]
    credit: str = ""


def read(path: Path) -> Concepts:
    """Read a file of concepts. ConceptError: it cannot be read, or is inconsistent."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConceptError(f"{path}: has more than {MAX_BYTES} bytes")
        content = msgspec.convert(yaml.safe_load(path.read_text(encoding="utf-8")), Concepts)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, msgspec.ValidationError) as error:
        raise ConceptError(f"{path}: {error}") from error
    for problem in problems(content):
        raise ConceptError(f"{path}: {problem}")
    return content


def problems(content: Concepts) -> Iterator[str]:
    """Yield what is inconsistent in a file of concepts."""
    names = [normal(concept.name) for concept in content.concepts]
    for number, concept in enumerate(content.concepts):
        field = f"concepts[{number}]"
        if not names[number] or names.count(names[number]) > 1:
            yield f"{field}.name: {concept.name!r} is empty or names two concepts"
        if not concept.candidates or not all(candidate.rows and candidate.curve for candidate in concept.candidates):
            yield f"{field}.candidates: is empty, or has one without rows or curve"
        for candidate in concept.candidates:
            doses = [point.dose for point in candidate.curve]
            if doses != sorted(set(doses)) or not 0 <= candidate.s_max <= max(doses, default=0):
                yield f"{field}: {candidate.kind}: doses of the curve do not ascend to s_max"


def write(path: Path, content: Concepts) -> None:
    """Write a file of concepts atomically, with figures of four digits."""
    text = yaml.safe_dump(
        rounded(plain(content)), sort_keys=False, width=110, default_flow_style=None, allow_unicode=True
    )
    write_atomically(path, text.encode())


def plain(part: Part) -> object:
    """Return a part of a file as plain values."""
    return msgspec.to_builtins(part)


def rounded(value: object) -> object:
    """Return a tree of plain values with its floats rounded to four digits."""
    match value:
        case float():
            return float(f"{value:.4g}")
        case dict():
            return {key: rounded(item) for key, item in value.items()}
        case list() | tuple():
            return [rounded(item) for item in value]
    return value


def normal(text: str) -> str:
    """Return the words of a name or topic in lower case, with single spaces."""
    return " ".join(re.findall(r"[^\W_]+", text.lower()))


def find(concepts: Iterable[Concept], topic: str) -> list[Concept]:
    """Return the concepts that a topic names, best first: by name, else by word, else by label of a chosen row.

    By label, those come first whose matching row has the highest output score; otherwise those of the best response.
    """
    wanted, known = normal(topic), list(concepts)
    ranked = [(score, concept) for concept in known if (score := match(concept, wanted)) > (0, 0.0)]
    best = max((score[0] for score, _ in ranked), default=0)
    found = [(score, concept) for score, concept in ranked if score[0] == best]
    return [concept for _, concept in sorted(found, key=lambda pair: pair[0], reverse=True)]


def match(concept: Concept, wanted: str) -> tuple[int, float]:
    """Return how well a concept fits a topic in normal form: its level (3: name, 2: word, 1: label), and a score."""
    if wanted and wanted == normal(concept.name):
        return 3, concept.chosen.response.value
    if wanted and wanted in map(normal, concept.words):
        return 2, concept.chosen.response.value
    rows = [row for row in concept.chosen.rows if wanted and f" {wanted} " in f" {normal(row.label)} "]
    return (1, max(row.output_score or 0.0 for row in rows)) if rows else (0, 0.0)


def nearest(concepts: Iterable[Concept], topic: str, count: int = 3) -> list[str]:
    """Return the names of the concepts whose name or words are spelled most like a topic."""
    spelled = {normal(word): concept.name for concept in concepts for word in (concept.name, *concept.words)}
    close = difflib.get_close_matches(normal(topic), spelled, n=len(spelled) or 1, cutoff=0.0)
    return list(dict.fromkeys(spelled[word] for word in close))[:count]


def kl_at(curve: Sequence[Point], dose: float) -> float:
    """Return the divergence at a dose, interpolated between the points of a curve."""
    for below, above in pairwise(curve):
        if below.dose <= dose <= above.dose:
            return below.kl + (above.kl - below.kl) * ((dose - below.dose) / (above.dose - below.dose))
    return curve[-1].kl


def dose_for_kl(candidate: Candidate, kl: float) -> float | None:
    """Return the smallest dose, up to s_max, at which the divergence reaches `kl`; None if it does not."""
    curve = [point for point in candidate.curve if point.dose <= candidate.s_max]
    for below, above in pairwise(curve):
        if below.kl < kl <= above.kl:
            return below.dose + (above.dose - below.dose) * ((kl - below.kl) / (above.kl - below.kl))
    return None


def with_concept(content: Concepts, concept: Concept) -> Concepts:
    """Return a file's content with a concept, in place of an older one of its name, in alphabetical order."""
    others = [each for each in content.concepts if each.name != concept.name]
    ordered = sorted([*others, concept], key=lambda each: each.name)
    return msgspec.structs.replace(content, concepts=tuple(ordered))


def fits(content: Concepts, name: str, site: str, model: str, files: Mapping[str, str]) -> str:
    """Return why concepts are not of a bundle with this name, site, model and files; empty if they are."""
    if content.bundle != name or content.site != site:
        return f"is of {content.bundle} at {content.site}, not of {name} at {site}"
    changed = [file for file, sha256 in content.weights.items() if files.get(file) != sha256]
    if content.model != model or changed or not content.weights:
        return f"was calibrated with another {'model' if content.model != model else 'SAE'}: calibrate it again"
    return ""
