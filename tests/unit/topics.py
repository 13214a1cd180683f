"""Concepts of the bundle that the tests' programs refer to."""

from typing import Any

from rudder.sae_models.concepts import Calibration, Candidate, Concept, Concepts, Interval, Point, Row
from tests.unit.programs import SITE
from tests.unit.reference import BUNDLE

CALIBRATION = Calibration(
    prompts=16, seeds=2, tokens=64, temperature=0.8, random_directions=20,
    perplexity_ratio=1.5, repetition_rise=0.05, distinct_ratio=0.8,
)  # fmt: skip


def point(dose: float, kl: float, response: float = 0.1) -> Point:
    """A point of a curve whose texts are like unsteered ones."""
    return Point(dose=dose, perplexity=40.0, repetition=0.0, distinct=0.9, kl=kl, response=response)


CURVE = (point(0.0, 0.0), point(0.2, 0.1), point(0.4, 0.5), point(0.8, 2.0))


def candidate(*rows: Row, response: float = 0.6, **changes: Any) -> Candidate:
    """A candidate with s_max 0.4."""
    fields: dict[str, Any] = {"kind": "group", "s_max": 0.4, "limit": "perplexity", "curve": CURVE, "random": 0.2}
    return Candidate(rows=rows, response=Interval(response, response - 0.1, response + 0.1), **fields | changes)


STARS = Concept(
    "astronomy", "book against the others",
    (
        candidate(Row(2, 0.5, "star, planet", 0.3, 0.1), Row(3, -0.25, "orbit")),
        candidate(Row(1, 1.0), kind="output", response=0.5, s_max=0.2),
    ),
    words=("night sky",),
)  # fmt: skip
MINDS = Concept("psychology", "book against the others", (candidate(Row(5, 1.0, "mind, star", 0.8)),))
DULL = Concept("chemistry", "book against the others", (candidate(Row(0, 1.0), response=0.2),))


def concepts_of(*concepts: Concept, **changes: Any) -> Concepts:
    """A file of concepts for BUNDLE at SITE."""
    fields: dict[str, Any] = {"bundle": BUNDLE, "site": SITE, "model": "m", "weights": {"sae.safetensors": "ab"}}
    return Concepts(calibration=CALIBRATION, concepts=concepts, **fields | changes)


SERVED = {BUNDLE: concepts_of(STARS, MINDS, DULL)}
