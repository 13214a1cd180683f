"""The catalogue: what was written is read, any text may be searched for, from any thread."""

import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_models import catalogue
from sae_models.catalogue import Catalogue, Context, Latent, Summary

LABELS = ("virus, viral, viruses (microbiology)", "planet, orbit (astronomy)", "viral, marketing", "(inactive)")


def entry(index: int, label: str) -> Latent:
    """A latent with one context."""
    context = Context("the ", "virus", " spreads", 3.5, "microbiology")
    return Latent(Summary(index, label, 0.25, 3.5), ("virus", " viral"), (context,))


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
