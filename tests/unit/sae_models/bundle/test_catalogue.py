"""The catalogue: what was written is read, any text may be searched for, from any thread."""

import sqlite3
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rudder.sae_models import PRETRAINED
from rudder.sae_models.bundle import catalogue
from rudder.sae_models.bundle import semantic as meaning
from rudder.sae_models.bundle.catalogue import Catalogue, Context, Latent, Summary, Vectors, Word
from rudder.sae_models.bundle.semantic import MeaningUnknown

LABELS = ("virus, viral, viruses (microbiology)", "planet, orbit (astronomy)", "viral, marketing", "(inactive)")


def entry(index: int, label: str) -> Latent:
    """A latent with one context."""
    context = Context("the ", "virus", " spreads", 3.5, "microbiology")
    words = (Word(" infects", 0.5), Word(" host", 0.25)), (Word(" planet", -0.5),)
    summary = Summary(index, label, 0.25, 3.5, "corpus")
    return Latent(summary, ("virus", " viral"), (context,), (0.5, 1.0, 1.5, 2.0, 3.0), *words)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalogue]:
    path = tmp_path_factory.mktemp("a folder #1?") / "catalogue.sqlite"
    catalogue.write(path, (entry(index, label) for index, label in enumerate(LABELS)))
    reader = Catalogue(path)
    yield reader
    reader.close()


def found(reader: Catalogue, words: str) -> list[int]:
    """Indices of a search."""
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


def test_search_wants_all_words_or_their_beginnings(opened: Catalogue) -> None:
    assert sorted(found(opened, "viral")) == [0, 2]
    assert found(opened, "VIR micro") == [0]
    assert found(opened, "viral astronomy") == []
    assert len(opened.search("viral", 1)) == 1
    assert opened.search("viral", -1) == []


def test_of_labels_as_good_the_more_frequent_latent_is_first(tmp_path: Path) -> None:
    labels = (("star, foot", 0.1), ("stars, galaxies", 0.3), ("starry, night", 0.2))
    path = tmp_path / "c.sqlite"
    catalogue.write(path, (Latent(Summary(i, *label, 1.0), (), ()) for i, label in enumerate(labels)))
    reader = Catalogue(path)
    assert found(reader, "star") == [1, 2, 0]
    reader.close()


@pytest.mark.parametrize(
    "words", ["foo AND (", '"', "*", "planet OR virus", "NEAR(", "label:virus", "-", "", "\0", "\ud800", "a" * 100_000]
)
def test_query_syntax_is_only_text(opened: Catalogue, words: str) -> None:
    assert found(opened, words) == []


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec=None)))
def test_any_text_may_be_searched_for(opened: Catalogue, words: str) -> None:
    assert len(opened.search(words, 10)) <= 4


def test_it_cannot_be_written_to(opened: Catalogue) -> None:
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        opened._database.execute("DELETE FROM latents")


def test_threads_share_it(opened: Catalogue) -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: (found(opened, "planet"), opened.get(i % 4).summary.index), range(400)))
    assert results == [([1], i % 4) for i in range(400)]


def test_what_nobody_measured_is_none(tmp_path: Path) -> None:
    unknown = Latent(Summary(0, "", None, None), (), ())
    catalogue.write(tmp_path / "c.sqlite", [unknown])
    reader = Catalogue(tmp_path / "c.sqlite")
    assert reader.get(0) == unknown
    assert reader.search("anything", 3) == []
    reader.close()


def letters(texts: Sequence[str]) -> Vectors:
    """Unit vectors of how often each letter occurs."""
    counts: Vectors = np.array([[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts], np.float32)
    norms: Vectors = np.linalg.norm(counts, axis=1, keepdims=True)
    unit: Vectors = counts / np.maximum(norms, 1e-6)
    return unit


def test_search_by_meaning_orders_by_cosine(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"
    catalogue.write(path, (Latent(Summary(i, label, 0.1, 1.0), (), ()) for i, label in enumerate((*LABELS, ""))))
    assert meaning.store(path, "letters", letters) == 4
    reader = Catalogue(path)
    assert reader.embedder == "letters"
    assert next(found.index for found in meaning.nearest(reader, "orbital planets", 2, letters)) == 1
    assert len(meaning.nearest(reader, "orbital planets", 10, letters)) == 4
    assert meaning.nearest(reader, "orbital planets", -1, letters) == []
    assert meaning.nearest(reader, "", 1, letters)[0].index in range(4)
    reader.close()


def test_search_by_meaning_says_what_is_missing(opened: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MeaningUnknown, match="no meanings stored"):
        meaning.nearest(opened, "virus", 3)
    # None in sys.modules is what Python itself takes for a package that is not there.
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MeaningUnknown, match=r"pip install 'rudder-server\[semantic\]'"):
        meaning.embedder("a-name-not-asked-for-before")


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
    meaning.store(path, str(tmp_path / "embedder"), meaning.embedder(str(tmp_path / "embedder")))
    reader = Catalogue(path)
    assert next(found.index for found in meaning.nearest(reader, "an orbit", 3)) == 1
    assert next(found.index for found in meaning.nearest(reader, "the price", 3)) == 2
    reader.close()
    with pytest.raises(MeaningUnknown, match=r"^sentence embedder"):
        meaning.embedder(str(tmp_path / "nothing here"))
