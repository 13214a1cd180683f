"""Topics as users give them: their sources, the latents that stand for them, and judges of each."""

from pathlib import Path
from typing import Any

import pytest

from rudder.sae_models import PRETRAINED
from rudder.sae_models.activations import harvest
from rudder.sae_models.activations.corpus import Document
from rudder.sae_models.analysis import candidates, judges, topics
from rudder.sae_models.analysis.sampling import Voice
from rudder.sae_models.analysis.topics import SELECTION_FOLDS, Material, Topic
from rudder.sae_models.bundle import bundle as bundles
from rudder.sae_models.errors import UserError
from tests.unit.tiny import TEXTBOOK_LM

SKY = "The planet and its moon orbit a star; a telescope shows the comet and the galaxy."
CELL = "The cell has a membrane; the virus enters the nucleus of its host and makes protein."
KING = "The king and his army ruled the empire; the people fought a war for a free state."


@pytest.fixture(scope="module")
def material() -> Material:
    """A corpus of three books with ten sections each, on the shipped model."""
    books = (("astronomy", SKY), ("biology", CELL), ("history", KING))
    documents = [Document(book, str(n), f"{text} {text} {text}") for book, text in books for n in range(60)]
    voice = Voice(harvest.load_model(TEXTBOOK_LM), harvest.load_tokenizer(TEXTBOOK_LM))
    loaded = bundles.open_unverified(PRETRAINED / "textbook-lm-layers.2")
    train = judges.passages_of(documents, SELECTION_FOLDS, 20)
    readers = topics.readers_of(TEXTBOOK_LM, train)
    panel = judges.fit_panel(readers, train, judges.passages_of(documents, (2, 3), 20))
    trunk = harvest.load_trunk(TEXTBOOK_LM, candidates.site_of(loaded))
    return Material(loaded, voice, trunk, documents, readers, panel, windows_per_book=1)


def test_a_topic_has_one_source() -> None:
    assert Topic("a", book="b").source == "book"
    for wrong in (Topic("a"), Topic("a", book="b", label="c")):
        with pytest.raises(UserError, match="topic a: give one of book, text, label and pairs"):
            wrong.describe()


def test_topics_are_read_from_a_list(tmp_path: Path) -> None:
    path = tmp_path / "topics.yaml"
    path.write_text("- {name: stars, label: planet, words: [night sky]}\n- {name: cells, text: cells.txt}\n")
    assert topics.read_topics(path) == [
        Topic("stars", label="planet", words=("night sky",)), Topic("cells", text="cells.txt"),
    ]  # fmt: skip
    for wrong in ("- {name: a, colour: red}", "a: b", "[", "- {book: b}"):
        path.write_text(wrong)
        with pytest.raises(UserError, match=r"topics\.yaml"):
            topics.read_topics(path)


def test_pairs_are_objects_with_both_texts(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"with": "a", "without": "b"}\n\n{"with": "c", "without": "d"}\n')
    assert topics.pairs_of(str(path)) == (["a", "c"], ["b", "d"])
    for wrong in ('{"with": "a"}', "[1]", "{"):
        path.write_text(wrong)
        with pytest.raises(UserError, match="a line is not an object with `with` and `without`"):
            topics.pairs_of(str(path))
    path.write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        topics.pairs_of(str(path))


def test_a_book_is_ranked_against_the_others(material: Material) -> None:
    topic = Topic("astronomy", book="astronomy")
    profile = topics.profile_of(material, [topic])
    ranking = topics.ranking_of(material, topic, profile)
    own, other = (profile.frequency[profile.books.index(book)] for book in ("astronomy", "history"))
    assert ranking.latents
    assert all(own[latent] > 2 * other[latent] for latent in ranking.latents)
    with pytest.raises(UserError, match="the corpus has no book 'zoology'"):
        topics.ranking_of(material, Topic("x", book="zoology"), profile)


def test_a_text_is_ranked_against_the_corpus(material: Material, tmp_path: Path) -> None:
    (tmp_path / "sky.txt").write_text(f"{SKY}\n{SKY}\n")
    topic = Topic("sky", text=str(tmp_path / "sky.txt"))
    # Without the book on the same subject, which would rule these latents out.
    others = [document for document in material.documents if document.book != "astronomy"]
    alone = Material(
        material.bundle, material.voice, material.trunk, others, material.readers, material.panel, windows_per_book=1
    )
    from_text = set(topics.ranking_of(alone, topic, topics.profile_of(alone, [topic])).latents)
    book = Topic("astronomy", book="astronomy")
    from_book = set(topics.ranking_of(material, book, topics.profile_of(material, [book])).latents)
    assert len(from_text & from_book) > 0.5 * len(from_book)


def test_pairs_rank_what_their_difference_activates(material: Material, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f'{{"with": "{KING} {SKY}", "without": "{KING}"}}\n' * 2)
    profile = topics.profile_of(material, [])
    ranking = topics.ranking_of(material, Topic("sky", pairs=str(path)), profile)
    rise = profile.rise("astronomy")
    # By chance a tenth: most latents are silent on this corpus.
    assert (rise > 0).float().mean() < 0.2
    assert (rise[list(ranking.latents)] > 0).float().mean() > 0.6


@pytest.mark.parametrize("source", ["book", "label", "text", "pairs"])
def test_judges_know_the_topic_whatever_its_source(material: Material, source: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(f"{SKY}\n" * 4)
    (tmp_path / "pairs").write_text(f'{{"with": "{SKY}", "without": "{KING}"}}\n' * 4)
    value = {"book": "astronomy", "label": "planet"}.get(source, str(tmp_path / source))
    given: dict[str, Any] = {source: value}
    panel, name = topics.panel_of(material, Topic("sky", **given))
    response = panel.response([SKY, CELL, KING], name)
    assert response[0] > 0.5 > response[1:].max()


def test_a_topic_without_passages_cannot_be_judged(material: Material) -> None:
    with pytest.raises(UserError, match="topic x: has 0 passages to judge it by"):
        topics.panel_of(material, Topic("x", label="zyzzyva"))


def test_samples_are_of_the_folds_for_selection_and_bounded_by_book(material: Material) -> None:
    found = list(topics.sampled(material.documents, 300))
    assert all(document.fold in SELECTION_FOLDS for document in found)
    assert {b: sum(len(d.text) for d in found if d.book == b) for b in ("astronomy", "history")} == {
        "astronomy": 300, "history": 300,
    }  # fmt: skip
