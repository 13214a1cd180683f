"""Derive programs from a corpus labelled by book: forget a topic, or steer towards or away from one."""

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
        """The corpus's books in alphabetical order."""
        return sorted({document.book for document in self.documents})


@dataclass(frozen=True)
class Topic:
    """Books to act on; their neighbours, which must not be affected; and books too similar to classify."""

    books: tuple[str, ...]
    neighbours: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """Parameters of a derived program.

    `windows_per_book`, `windows_of_topic`: windows to use of each book, of the topic and its neighbours more.
    `neighbour_weight`: share of the neighbours in the detector's negative examples. `drift`, `false_alarms`: of the
    CUSUM. `latents`, `ceiling`, `ratio`: see selection.select. `token_level`: detector score that triggers on a token.
    `dose`: value of the latents in residual norms.
    """

    windows_per_book: int = 80
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
    """Shuffle the windows, so that the first of a book are a random sample of it."""
    return Material(bundle, trunk, documents, windows.shuffled(0))


def sample_windows(material: Material, folds: Collection[int], limits: dict[str, int]) -> Windows:
    """Return up to `limits[book]` windows of each book, from documents in these folds."""
    pool = material.windows.where(in_folds(material.windows, material.documents, folds))
    books = [material.documents[index].book for index in pool.document.tolist()]
    indices = [[index for index, book in enumerate(books) if book == name][:count] for name, count in limits.items()]
    return pool.take(torch.tensor(list(chain.from_iterable(indices))))


def selection_folds(material: Material) -> set[int]:
    """Return the folds that are neither held out nor for tuning."""
    return {document.fold for document in material.documents} - {*HELD_OUT_FOLDS, *TUNING_FOLDS}


def window_counts(material: Material, topic: Topic, recipe: Recipe) -> dict[str, int]:
    """Return the number of windows to use of each book: more of the topic and its neighbours."""
    near = {*topic.books, *topic.neighbours}
    books = [book for book in material.books if book not in topic.ignored]
    return {book: recipe.windows_of_topic if book in near else recipe.windows_per_book for book in books}


def fit_detector(material: Material, topic: Topic, recipe: Recipe) -> Detector:
    """Fit a linear detector of the topic at the bundle's site, rounded as the program's file stores it."""
    windows = sample_windows(material, selection_folds(material), window_counts(material, topic, recipe))
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


def alarm_level(material: Material, topic: Topic, fitted: Detector, recipe: Recipe) -> float:
    """Return the CUSUM level that a share `false_alarms` of the benign windows of the tuning folds exceeds."""
    benign = {book: count for book, count in window_counts(material, topic, recipe).items() if book not in topic.books}
    windows = sample_windows(material, TUNING_FOLDS, benign)
    highest = [
        _max_cusum(fitted, x, counted, recipe.drift)
        for x, counted in residuals(material.trunk, parse_site(material.bundle.manifest.site), windows)
    ]
    return round(detector.level_for(torch.cat(highest), recipe.false_alarms), 2)


def _max_cusum(fitted: Detector, x: Tensor, counted: Tensor, drift: float) -> Tensor:
    """Return the highest CUSUM value of each window [n]; tokens that do not count pass the sum on."""
    score = torch.where(counted, fitted.score(x), drift)
    return detector.cusum(score, drift).amax(1)


def topic_latents(material: Material, topic: Topic, recipe: Recipe) -> list[int]:
    """Select the topic's latents on the folds for selection."""
    windows = sample_windows(material, selection_folds(material), window_counts(material, topic, recipe))
    site = parse_site(material.bundle.manifest.site)
    books = [book for book in material.books if book not in topic.ignored]
    frequency = selection.book_frequencies(
        material.trunk, site, material.bundle.sae, windows, material.documents, books
    )
    limits = (recipe.latents, recipe.ceiling, recipe.ratio)
    return selection.select(frequency, books, topic.books, topic.neighbours, *limits)


def forget(material: Material, topic: Topic, recipe: Recipe, name: str, description: str) -> p.Program:
    """Derive a program that forgets a topic, like Dynamic SAE Guardrails (arXiv 2504.08192).

    Sequence condition: CUSUM of the detector's score above its level. Token condition: a topic latent is active, or the
    detector's score is above `token_level`. Edit: set every topic latent, active or not, to `dose` residual norms.
    """
    fitted = fit_detector(material, topic, recipe)
    manifest = material.bundle.manifest
    score = p.Row(
        probe=p.Probe(
            "-".join(topic.books), tuple(round(w, WEIGHT_DECIMALS) for w in fitted.weights.tolist()), fitted.bias
        )
    )
    sequence = p.SequenceCondition(score, p.Cusum(recipe.drift), alarm_level(material, topic, fitted, recipe))
    features = [p.Row(feature=p.Feature(index)) for index in topic_latents(material, topic, recipe)]
    triggers = (p.Trigger(score, recipe.token_level), *(p.Trigger(feature) for feature in features))
    edits = tuple(p.Edit(feature, set=recipe.dose, unit=p.RESIDUAL_NORM) for feature in features)
    return p.Program(name, description, (p.SiteEdits(manifest.site, edits),), p.Gate(manifest.site, triggers, sequence))


def steer(
    material: Material, topic: Topic, recipe: Recipe, operation: str, value: float, name: str, description: str
) -> p.Program:
    """Derive a program that adds to, sets or clamps (`operation`) the topic's latents by a value in residual norms."""
    rows = [p.Row(feature=p.Feature(index)) for index in topic_latents(material, topic, recipe)]
    edits = tuple(p.Edit(row, **{operation: value}, unit=p.RESIDUAL_NORM) for row in rows)
    return p.Program(name, description, (p.SiteEdits(material.bundle.manifest.site, edits),))
