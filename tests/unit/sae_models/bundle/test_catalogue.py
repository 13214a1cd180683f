"""The catalogue returns what was written, searches for any text, and is thread-safe."""

import sqlite3
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rudder.sae_models import PRETRAINED
from rudder.sae_models.bundle import catalogue, semantic
from rudder.sae_models.bundle.catalogue import Catalogue, Context, Latent, Neighbour, Summary, Vectors, Word
from rudder.sae_models.bundle.semantic import MeaningUnknown

LABELS = ("virus, viral, viruses (microbiology)", "planet, orbit (astronomy)", "viral, marketing", "(inactive)")


def entry(index: int, label: str) -> Latent:
    """Return a latent with a strongest and a held-out context."""
    contexts = tuple(Context("the ", "virus", " spreads", 3.5, "microbiology", held_out) for held_out in (False, True))
    words = (Word(" infects", 0.5), Word(" host", 0.25)), (Word(" planet", -0.5),)
    summary = Summary(index, label, 0.25, 3.5, "corpus", 0.875, 0.125, 0.75, 0.5, 0.25)
    near = (Neighbour(2, 0.5), Neighbour(0, -0.25))
    return Latent(summary, ("virus", " viral"), contexts, (0.5, 1.0, 1.5, 2.0, 3.0), *words, near)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalogue]:
    path = tmp_path_factory.mktemp("a folder #1?") / "catalogue.sqlite"
    catalogue.write(path, (entry(index, label) for index, label in enumerate(LABELS)))
    reader = Catalogue(path)
    yield reader
    reader.close()


def matches(reader: Catalogue, words: str) -> list[int]:
    """Return the indices that a search finds."""
    return [summary.index for summary in reader.search(words, 10)]


def test_get_returns_what_was_written(opened: Catalogue) -> None:
    assert opened.get(1) == entry(1, LABELS[1])
    assert len(opened) == 4


@pytest.mark.parametrize("index", [-1, 4, 2**70])
def test_get_of_an_unknown_index_names_it(opened: Catalogue, index: int) -> None:
    with pytest.raises(LookupError, match=f"^index: latent {index} "):
        opened.get(index)


def test_pages_follow_each_other(opened: Catalogue) -> None:
    assert [summary.index for summary in opened.page(-1, 3)] == [0, 1, 2]
    assert [summary.index for summary in opened.page(2, 3)] == [3]
    assert opened.page(3, 3) == []
    assert opened.page(-1, -1) == []


def test_search_matches_words_or_prefixes(opened: Catalogue) -> None:
    assert sorted(matches(opened, "viral")) == [0, 2]
    assert matches(opened, "VIR micro") == [0, 2]
    assert sorted(matches(opened, "viral astronomy")) == [0, 1, 2]
    assert len(opened.search("viral", 1)) == 1
    assert opened.search("viral", -1) == []


def test_search_orders_equally_relevant_labels_by_frequency(tmp_path: Path) -> None:
    labels = (("star, foot", 0.1), ("stars, galaxies", 0.3), ("star, night", 0.2))
    path = tmp_path / "c.sqlite"
    catalogue.write(path, (Latent(Summary(i, *label, 1.0), (), ()) for i, label in enumerate(labels)))
    reader = Catalogue(path)
    assert matches(reader, "star") == [1, 2, 0]
    reader.close()


def test_search_prefers_whole_words_and_plurals_to_words_that_begin_alike(tmp_path: Path) -> None:
    labels = (
        ("start, started, night", 0.9), ("stars, star, galaxies", 0.1), ("stalin, star, volatile", 0.2),
        ("star, stars, galaxy", 0.0), ("glass, class", 0.1), ("", 0.5),
    )  # fmt: skip
    path = tmp_path / "c.sqlite"
    catalogue.write(path, (Latent(Summary(i, *label, 1.0), (), ()) for i, label in enumerate(labels)))
    reader = Catalogue(path)
    assert matches(reader, "star") == [1, 2, 0, 3]
    assert matches(reader, "stars") == [1, 2, 3]
    assert matches(reader, "Stars galaxy") == [1, 2, 3]
    assert matches(reader, "galaxies star") == [1, 2, 0, 3]
    assert (sorted(matches(reader, "sta")), matches(reader, "sta")[-1]) == ([0, 1, 2, 3], 3)
    assert matches(reader, "glass") == matches(reader, "glas") == [4]
    reader.close()


def test_search_matches_inflected_words_and_any_of_several(tmp_path: Path) -> None:
    labels = ("sun, solar, star", "infected, infection", "galaxies (astronomy)", "universities", "no match")
    path = tmp_path / "c.sqlite"
    catalogue.write(path, (Latent(Summary(i, label, 0.1, 1.0), (), ()) for i, label in enumerate(labels)))
    reader = Catalogue(path)
    assert sorted(matches(reader, "stars galaxy")) == [0, 2]
    assert matches(reader, "infecting") == matches(reader, "Infect") == [1]
    assert matches(reader, "university") == [3]
    reader.close()


def test_older_catalogue_has_no_scores_and_neighbours(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    catalogue.write(path, [entry(0, LABELS[0])])
    database = sqlite3.connect(path)
    for change in (
        "ALTER TABLE latents DROP COLUMN label_score",
        "ALTER TABLE latents DROP COLUMN label_error",
        "ALTER TABLE latents DROP COLUMN intervention",
        "ALTER TABLE contexts DROP COLUMN held_out",
        "DROP TABLE neighbours",
        "PRAGMA user_version = 2",
    ):
        database.execute(change)
    database.commit()
    database.close()
    reader = Catalogue(path)
    old = reader.get(0)
    assert (old.summary.label, old.summary.label_score, old.summary.intervention) == (LABELS[0], None, None)
    assert (old.neighbours, [context.held_out for context in old.contexts]) == ((), [False, False])
    assert matches(reader, "virus") == [0]
    reader.close()


@pytest.mark.parametrize(
    "words", ["foo AND (", '"', "*", "foo AND", "NEAR(", "label:", "NOT", "-", "", "\0", "\ud800", "a" * 100_000]
)
def test_search_ignores_query_syntax(opened: Catalogue, words: str) -> None:
    assert matches(opened, words) == []


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec=None)))
def test_search_accepts_any_text(opened: Catalogue, words: str) -> None:
    assert len(opened.search(words, 10)) <= 4


def test_catalogue_is_read_only(opened: Catalogue) -> None:
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        opened._database.execute("DELETE FROM latents")


def test_a_search_for_steering_is_by_output_score(tmp_path: Path) -> None:
    scores = (0.1, None, 0.9, 0.4)
    labels = ("virus", "virus", "virus", "virus host")
    summaries = [
        Summary(i, label, 0.1, 1.0, output_score=score)
        for i, (label, score) in enumerate(zip(labels, scores, strict=True))
    ]
    catalogue.write(tmp_path / "c.sqlite", (Latent(summary, (), ()) for summary in summaries))
    reader = Catalogue(tmp_path / "c.sqlite")
    found = [summary.index for summary in reader.search("virus host", 10, for_steering=True)]
    assert found == [3, 2, 0, 1]
    assert [summary.index for summary in reader.search("virus", 2, for_steering=True)] == [2, 3]
    assert reader.has_output_scores
    reader.close()


def test_older_catalogues_have_no_steering_scores(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    catalogue.write(path, [entry(0, "virus")])
    with closing(sqlite3.connect(path)) as database:
        database.execute("ALTER TABLE latents DROP COLUMN output_score")
        database.execute("ALTER TABLE latents DROP COLUMN input_score")
        database.execute("PRAGMA user_version = 3")
        database.commit()
    reader = Catalogue(path)
    assert not reader.has_output_scores
    (summary,) = reader.search("virus", 1, for_steering=True)
    assert (summary.label_score, summary.output_score, summary.input_score) == (0.875, None, None)
    reader.close()


def test_threads_share_a_catalogue(opened: Catalogue) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: (matches(opened, "planet"), opened.get(i % 4).summary.index), range(400)))
    assert results == [([1], i % 4) for i in range(400)]


def test_figures_that_were_not_measured_are_none(tmp_path: Path) -> None:
    unknown = Latent(Summary(0, "", None, None), (), ())
    catalogue.write(tmp_path / "c.sqlite", [unknown])
    reader = Catalogue(tmp_path / "c.sqlite")
    assert reader.get(0) == unknown
    assert reader.search("anything", 3) == []
    reader.close()


def letters(texts: Sequence[str]) -> Vectors:
    """Embed texts as unit vectors of letter counts."""
    counts: Vectors = np.array([[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts], np.float32)
    norms: Vectors = np.linalg.norm(counts, axis=1, keepdims=True)
    unit: Vectors = counts / np.maximum(norms, 1e-6)
    return unit


def test_search_by_meaning_orders_by_cosine(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    catalogue.write(path, (Latent(Summary(i, label, 0.1, 1.0), (), ()) for i, label in enumerate((*LABELS, ""))))
    assert semantic.embed_labels(path, "letters", letters) == 4
    reader = Catalogue(path)
    assert reader.embedder == "letters"
    assert semantic.search_by_meaning(reader, "orbital planets", 2, letters)[0].index == 1
    assert len(semantic.search_by_meaning(reader, "orbital planets", 10, letters)) == 4
    assert semantic.search_by_meaning(reader, "orbital planets", -1, letters) == []
    assert semantic.search_by_meaning(reader, "", 1, letters)[0].index in range(4)
    reader.close()


def test_search_by_meaning_says_what_is_missing(opened: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MeaningUnknown, match="no meanings stored"):
        semantic.search_by_meaning(opened, "virus", 3)
    # Python treats None in sys.modules as a package that cannot be imported.
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MeaningUnknown, match=r"pip install 'rudder-server\[semantic\]'"):
        semantic.load_embedder("a-name-that-is-not-cached")


def test_search_by_meaning_with_a_sentence_embedder(tmp_path: Path) -> None:
    missing = "the extra `semantic` is not installed"
    embedding = pytest.importorskip("sentence_transformers.sentence_transformer.modules", reason=missing)
    package = pytest.importorskip("sentence_transformers", reason=missing)
    model = PRETRAINED / "textbook-lm"
    weight = AutoModelForCausalLM.from_pretrained(model).get_input_embeddings().weight.detach().float().numpy()
    static = embedding.StaticEmbedding(AutoTokenizer.from_pretrained(model), embedding_weights=weight)
    package.SentenceTransformer(modules=[static], device="cpu").save(str(tmp_path / "embedder"))
    path = tmp_path / "c.sqlite"
    labels = ("virus, infection", "planet, orbit", "price, demand")
    catalogue.write(path, (Latent(Summary(i, label, 0.1, 1.0), (), ()) for i, label in enumerate(labels)))
    semantic.embed_labels(path, str(tmp_path / "embedder"), semantic.load_embedder(str(tmp_path / "embedder")))
    reader = Catalogue(path)
    assert semantic.search_by_meaning(reader, "an orbit", 3)[0].index == 1
    assert semantic.search_by_meaning(reader, "the price", 3)[0].index == 2
    reader.close()
    with pytest.raises(MeaningUnknown, match=r"^sentence embedder"):
        semantic.load_embedder(str(tmp_path / "nothing here"))
