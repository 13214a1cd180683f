"""Makes programs from a corpus labelled by book: forget a topic, or steer towards or away from one."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from rudder.sae_models.activations.corpus import HELD_OUT_FOLDS, TUNING_FOLDS, Document, Windows, in_folds
from rudder.sae_models.activations.harvest import residuals
from rudder.sae_models.activations.hooks import parse_site
from rudder.sae_models.analysis import detector, selection
from rudder.sae_models.analysis import program as p
from rudder.sae_models.analysis.detector import Detector
from rudder.sae_models.bundle.bundle import Bundle

WEIGHT_DECIMALS = 4


@dataclass(frozen=True)
class Material:
    """A bundle, the trunk of its model up to its site, and a labelled corpus."""

    bundle: Bundle
    trunk: Any
    documents: Sequence[Document]
    windows: Windows

    @property
    def books(self) -> list[str]:
        """In alphabetical order."""
        return sorted({document.book for document in self.documents})


@dataclass(frozen=True)
class Topic:
    """Books to act on, the books nearest to them that must be spared, and books too close to tell apart."""

    books: tuple[str, ...]
    neighbours: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """Of a forgetting program. `neighbour_weight`: their share of the detector's negative examples."""

    windows_a_book: int = 80
    windows_of_topic: int = 600
    neighbour_weight: float = 0.8
    drift: float = 1.0
    false_alarms: float = 0.02
    latents: int = 32
    ceiling: float = 0.02
    ratio: float = 2.0
    token_level: float = 0.0
    dose: float = -0.1


def material_of(bundle: Bundle, trunk: Any, documents: Sequence[Document], windows: Windows) -> Material:
    """The windows in random order, so that the first of a book are a sample of it."""
    return Material(bundle, trunk, documents, windows.shuffled(0))


def chosen(material: Material, folds: Collection[int], most: dict[str, int]) -> Windows:
    """Up to `most` windows of each book, of documents of these folds."""
    pool = material.windows.where(in_folds(material.windows, material.documents, folds))
    books = [material.documents[index].book for index in pool.document.tolist()]
    places = [[place for place, book in enumerate(books) if book == name][:count] for name, count in most.items()]
    return pool.take(torch.tensor(list(chain.from_iterable(places))))


def for_selection(material: Material) -> set[int]:
    """Folds that are neither held out nor for tuning."""
    return {document.fold for document in material.documents} - {*HELD_OUT_FOLDS, *TUNING_FOLDS}


def counts(material: Material, topic: Topic, recipe: Recipe) -> dict[str, int]:
    """Windows to take of each book: more of the topic and its neighbours."""
    near = {*topic.books, *topic.neighbours}
    kept = [book for book in material.books if book not in topic.ignored]
    return {book: recipe.windows_of_topic if book in near else recipe.windows_a_book for book in kept}


def fit_detector(material: Material, topic: Topic, recipe: Recipe) -> Detector:
    """A linear detector of the topic at the bundle's site, rounded as it will be written."""
    windows = chosen(material, for_selection(material), counts(material, topic, recipe))
    x = torch.cat(
        [x[counted] for x, counted in residuals(material.trunk, parse_site(material.bundle.manifest.site), windows)]
    )
    source = windows.document[:, None].expand_as(windows.counted)[windows.counted].tolist()
    books = [material.documents[index].book for index in source]
    positive, near = (torch.tensor([book in group for book in books]) for group in (topic.books, topic.neighbours))
    weight = torch.zeros(len(x))
    for group, share in (
        (positive, 1.0),
        (near, recipe.neighbour_weight),
        (~positive & ~near, 1 - recipe.neighbour_weight),
    ):
        weight[group] = share / group.sum()
    fitted = detector.fit(x, positive, weight)
    return Detector(
        fitted.weights.mul(10**WEIGHT_DECIMALS).round() / 10**WEIGHT_DECIMALS, round(fitted.bias, WEIGHT_DECIMALS)
    )


def alarm_level(material: Material, topic: Topic, found: Detector, recipe: Recipe) -> float:
    """The CUSUM level that few benign windows of the tuning folds, half of them of neighbours, ever reach."""
    benign = {book: count for book, count in counts(material, topic, recipe).items() if book not in topic.books}
    windows = chosen(material, TUNING_FOLDS, benign)
    highest = [
        _highest(found, x, counted, recipe.drift)
        for x, counted in residuals(material.trunk, parse_site(material.bundle.manifest.site), windows)
    ]
    return round(detector.level_for(torch.cat(highest), recipe.false_alarms), 2)


def _highest(found: Detector, x: Tensor, counted: Tensor, drift: float) -> Tensor:
    score = torch.where(counted[:, 1:], found.score(x[:, 1:]), -1e3)
    return detector.cusum(score, drift).amax(1)


def topic_latents(material: Material, topic: Topic, recipe: Recipe) -> list[int]:
    """The latents that stand for the topic, on the folds for selection."""
    windows = chosen(material, for_selection(material), counts(material, topic, recipe))
    site = parse_site(material.bundle.manifest.site)
    books = [book for book in material.books if book not in topic.ignored]
    frequency = selection.book_frequencies(
        material.trunk, site, material.bundle.sae, windows, material.documents, books
    )
    limits = (recipe.latents, recipe.ceiling, recipe.ratio)
    return selection.select(frequency, books, topic.books, topic.neighbours, *limits)


def forget(material: Material, topic: Topic, recipe: Recipe, name: str, description: str) -> p.Program:
    """Turn away from the topic, once the text is found to be about it, as Dynamic SAE Guardrails do (arXiv 2504.08192).

    Sequence condition: CUSUM of the detector's score. Token condition: a topic latent is active, or the detector's
    score is above `token_level`. Edit: every topic latent, active or not, is set to `dose` residual norms.
    """
    found = fit_detector(material, topic, recipe)
    manifest = material.bundle.manifest
    score = p.Row(
        probe=p.Probe(
            "-".join(topic.books), tuple(round(w, WEIGHT_DECIMALS) for w in found.weights.tolist()), found.bias
        )
    )
    sequence = p.SequenceCondition(score, p.Cusum(recipe.drift), alarm_level(material, topic, found, recipe))
    features = [p.Row(feature=p.Feature(index)) for index in topic_latents(material, topic, recipe)]
    triggers = (p.Trigger(score, recipe.token_level), *(p.Trigger(feature) for feature in features))
    edits = tuple(p.Edit(feature, set=recipe.dose, unit=p.RESIDUAL_NORM) for feature in features)
    return p.Program(name, description, (p.SiteEdits(manifest.site, edits),), p.Gate(manifest.site, triggers, sequence))


def steer(
    material: Material, topic: Topic, recipe: Recipe, operation: str, value: float, name: str, description: str
) -> p.Program:
    """Adds to, sets or clamps (`operation`) the topic's latents, by a value in residual norms."""
    rows = [p.Row(feature=p.Feature(index)) for index in topic_latents(material, topic, recipe)]
    edits = tuple(p.Edit(row, **{operation: value}, unit=p.RESIDUAL_NORM) for row in rows)
    return p.Program(name, description, (p.SiteEdits(material.bundle.manifest.site, edits),))
