"""Classifiers by latents: what they use, what they must not use, and what their probabilities are worth."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rudder.sae_models.analysis import classify
from rudder.sae_models.analysis.classify import Classifier, Settings
from rudder.sae_models.errors import UserError
from rudder.sae_models.statistics import Floats

LATENTS, WIDTH = 8, 16
IDENTITY: dict[str, Any] = {"name": "topic", "bundle": "b", "bundle_sha256": "ab", "model_sha256": "m"}


def dictionary() -> Any:
    """Latents of orthogonal rows, of which 4 is nearly 3."""
    rows = torch.eye(LATENTS, WIDTH)
    rows[4] = 0.9 * rows[3] + 0.4 * rows[4]
    return SimpleNamespace(encoder=rows, decoder=rows, latents=LATENTS)


def texts(count: int, seed: int) -> tuple[Floats, Any]:
    """Latent 1 tells the classes apart, and so do 3 and 4, which go together; 6 does a little less, and leans on 3."""
    rng = np.random.default_rng(seed)
    label = rng.random(count) < 0.4
    values = np.abs(rng.normal(size=(count, LATENTS)))
    shared = rng.normal(size=count)
    values[:, 1] += 1.5 * label
    values[:, 3] += 3.0 * label + shared
    values[:, 4] += 3.0 * label + shared
    values[:, 6] += 2.0 * label + shared
    return values, label


def trained(forbidden: tuple[int, ...] = (), **settings: Any) -> Classifier:
    (values, label), (tune, tune_label) = texts(600, 0), texts(400, 1)
    chosen = Settings(latents=3, **settings)
    return classify.train(values, label, tune, tune_label, dictionary(), forbidden, chosen, **IDENTITY)


@pytest.mark.parametrize("kind", ["logistic", "tree"])
def test_classifier_uses_what_tells_the_classes_apart_and_is_calibrated(kind: Any) -> None:
    made = trained(kind=kind)
    assert set(made.latents) >= {3, 4}
    values, label = texts(2000, 2)
    probabilities = made.probabilities(values)
    assert ((probabilities > 0.5) == label).mean() > 0.85
    assert classify.calibration_error(probabilities, label) < 0.06
    assert abs(probabilities.mean() - label.mean()) < 0.04
    assert 0 < probabilities.min() <= probabilities.max() < 1


@pytest.mark.parametrize("kind", ["logistic", "tree"])
def test_forbidden_latents_and_those_parallel_to_them_are_not_read(kind: Any) -> None:
    made = trained((3,), kind=kind)
    assert (made.forbidden, made.excluded) == ((3,), (4,))
    assert not {3, 4} & set(made.latents)
    values, _ = texts(50, 3)
    changed = values.copy()
    changed[:, [3, 4]] = 99.0
    assert (made.probabilities(values) == made.probabilities(changed)).all()


def test_score_does_not_lean_on_forbidden_latents_by_way_of_others() -> None:
    values, label = texts(2000, 2)
    leaning, averse = trained((3,), aversion=0.0), trained((3,))
    assert 6 in leaning.latents
    rely = [abs(classify.reliance(made.probabilities(values), values[:, [3]], label)[0]) for made in (leaning, averse)]
    assert rely[0] > 0.2 > 0.1 > rely[1]
    assert ((averse.probabilities(values) > 0.5) == label).mean() > 0.65


def test_trees_are_small() -> None:
    nodes = trained(kind="tree").nodes
    assert 3 <= len(nodes) <= 2 ** (classify.DEPTH + 1) - 1
    assert nodes[0].column >= 0


@pytest.mark.parametrize(("pooling", "expected"), [("maximum", [2, 1]), ("mean", [1, 0.25]), ("share", [0.75, 0.25])])
def test_pooling(pooling: Any, expected: list[float]) -> None:
    f = torch.tensor([[2.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    assert classify.pool(f, pooling).tolist() == expected
    assert classify.pool(f[:0], pooling).tolist() == [0, 0]


def test_split_without_a_class_is_refused() -> None:
    values, label = texts(50, 0)
    for train, tune in ((label | True, label), (label, label & False)):
        with pytest.raises(UserError, match=r"no (benign|positive) text in the \w+ split"):
            classify.train(values, train, values, tune, dictionary(), (), Settings(), **IDENTITY)


def test_classifier_is_read_again_with_its_bundle_alone(tmp_path: Path) -> None:
    path, values = tmp_path / "topic.json", texts(20, 4)[0]
    for kind in ("logistic", "tree"):
        made = trained((3,), kind=kind)
        classify.save(path, made)
        again = classify.load(path, "ab")
        assert again == made
        assert (again.probabilities(values) == made.probabilities(values)).all()
    with pytest.raises(UserError, match="bundle_sha256: is ab, the bundle has cd"):
        classify.load(path, "cd")
    path.write_text("{}")
    with pytest.raises(UserError, match="is no classifier"):
        classify.load(path, "ab")
