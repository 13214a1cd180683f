"""Files of steering concepts: what they say is read back, found by topic, and refused where it does not fit."""

from pathlib import Path

import msgspec
import pytest

from rudder.sae_models import concepts
from rudder.sae_models.concepts import Concept, ConceptError, Row
from tests.unit.topics import CURVE, DULL, MINDS, STARS, candidate, concepts_of, point

ALL = (MINDS, DULL, STARS)


def test_a_file_is_read_back_with_four_digits(tmp_path: Path) -> None:
    noisy = Concept("a", "b", (candidate(Row(1, 0.123456789)),))
    concepts.write(tmp_path / concepts.FILE, concepts_of(STARS, noisy))
    read = concepts.read(tmp_path / concepts.FILE)
    assert read == concepts_of(STARS, Concept("a", "b", (candidate(Row(1, 0.1235)),)))


@pytest.mark.parametrize(
    ("topic", "names"),
    [
        ("Astronomy", ["astronomy"]),
        ("night-sky", ["astronomy"]),
        ("STAR", ["psychology", "astronomy"]),
        ("orbit", ["astronomy"]),
        ("orb", []),
        ("", []),
        ("!", []),
    ],
)
def test_a_topic_is_a_name_then_a_word_then_a_label_by_output_score(topic: str, names: list[str]) -> None:
    assert [concept.name for concept in concepts.find(ALL, topic)] == names


def test_a_word_of_a_concept_comes_before_the_label_of_another() -> None:
    minds = msgspec.structs.replace(MINDS, words=("orbit",))
    assert concepts.find([STARS, minds], "orbit") == [minds]


def test_nearest_names_the_concepts_spelled_most_alike() -> None:
    assert concepts.nearest(ALL, "psychologie", 1) == ["psychology"]
    assert concepts.nearest(ALL, "night skies", 1) == ["astronomy"]
    assert concepts.nearest([], "x") == []


def test_divergence_is_interpolated_and_inverted_within_the_budget() -> None:
    assert concepts.kl_at(CURVE, 0.3) == pytest.approx(0.3)
    assert concepts.kl_at(CURVE, 9.0) == 2.0
    for dose in (0.1, 0.2, 0.37, 0.4):
        assert concepts.dose_for_kl(STARS.chosen, concepts.kl_at(CURVE, dose)) == pytest.approx(dose)
    assert concepts.dose_for_kl(STARS.chosen, 0.51) is None


def test_a_new_concept_replaces_the_one_of_its_name() -> None:
    new = Concept("astronomy", "x", STARS.candidates)
    assert concepts.with_concept(concepts_of(STARS, MINDS), new) == concepts_of(new, MINDS)
    assert concepts.with_concept(concepts_of(MINDS), new) == concepts_of(new, MINDS)


def test_the_first_crossing_of_a_divergence_is_taken() -> None:
    curve = (point(0.0, 0.0), point(0.1, 0.5), point(0.2, 0.1), point(0.4, 0.9))
    assert concepts.dose_for_kl(candidate(Row(1, 1.0), curve=curve), 0.3) == pytest.approx(0.06)


def test_rows_are_inert_unless_they_beat_random_directions() -> None:
    assert not STARS.chosen.inert
    assert "random directions" in DULL.chosen.inert
    assert "budget of repetition" in candidate(Row(1, 1.0), s_max=0.0, limit="repetition").inert


def test_concepts_fit_one_bundle_only() -> None:
    content, files = concepts_of(STARS), {"sae.safetensors": "ab", "catalogue.sqlite": "any"}
    assert not concepts.fits(content, content.bundle, content.site, "m", files)
    for name, site, model, weights, problem in [
        ("other", content.site, "m", files, "not of other"),
        (content.bundle, "layers.9.resid_post", "m", files, "layers.9"),
        (content.bundle, content.site, "n", files, "another model"),
        (content.bundle, content.site, "m", {"sae.safetensors": "cd"}, "another SAE"),
    ]:
        assert problem in concepts.fits(content, name, site, model, weights)
    assert "another SAE" in concepts.fits(concepts_of(STARS, weights={}), content.bundle, content.site, "m", files)


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (concepts_of(STARS, STARS), "names two concepts"),
        (concepts_of(Concept("a", "b", ())), "candidates: is empty"),
        (concepts_of(Concept("a", "b", (candidate(),))), "without rows"),
        (concepts_of(Concept("a", "b", (candidate(Row(1, 1.0), curve=CURVE[::-1]),))), "do not ascend"),
        (concepts_of(Concept("a", "b", (candidate(Row(1, 1.0), s_max=9.0),))), "do not ascend"),
    ],
)
def test_inconsistent_files_are_refused(tmp_path: Path, broken: concepts.Concepts, problem: str) -> None:
    concepts.write(tmp_path / "c.yaml", broken)
    with pytest.raises(ConceptError, match=problem):
        concepts.read(tmp_path / "c.yaml")


@pytest.mark.parametrize("text", ["", "[]", "bundle: [", "bundle: 3", "\0", "x: 1"])
def test_damaged_files_are_refused_by_their_path(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConceptError, match=r"c\.yaml"):
        concepts.read(tmp_path / "c.yaml")


def test_a_missing_file_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(ConceptError, match=r"nowhere\.yaml"):
        concepts.read(tmp_path / "nowhere.yaml")
