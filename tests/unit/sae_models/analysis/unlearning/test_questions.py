"""Cloze questions from glossaries."""

import json
from pathlib import Path

import pytest

from rudder.sae_models.activations.corpus import CorpusError, Definition, Document, read_definitions
from rudder.sae_models.analysis.unlearning.questions import questions, terms_in_text

DOCUMENTS = [
    Document("micro", "a", "A plasmid is small. The host cell divides."),
    Document("micro", "b", "Plasmid and prion. A capsid. The envelope of a virus."),
    Document("anatomy", "c", "The host cell rests."),
]
DEFINITIONS = [
    Definition("micro", "g", term, f"what a {term} is") for term in ("Plasmid", "host cell", "prion", "phage")
]


def test_a_term_belongs_to_its_first_section() -> None:
    terms = terms_in_text(DOCUMENTS, DEFINITIONS)
    assert [(t.definition.term, t.section, t.count) for t in terms] == [
        ("Plasmid", 0, 2),
        ("host cell", 0, 1),
        ("prion", 1, 1),
    ]


def test_terms_of_other_books_are_not_exclusive() -> None:
    terms = terms_in_text(DOCUMENTS, DEFINITIONS)
    assert [term.definition.term for term in terms if term.exclusive_to(["micro"])] == ["Plasmid", "prion"]


def test_part_of_a_word_is_no_occurrence() -> None:
    assert not terms_in_text([Document("micro", "a", "plasmids")], DEFINITIONS)


def test_options_are_of_the_same_fold_and_do_not_give_the_answer_away() -> None:
    words = [f"w{chr(97 + i)}x" for i in range(24)]
    documents = [Document("micro", str(n), " ".join(words[n * 8 : n * 8 + 8])) for n in range(3)]
    definitions = [Definition("micro", "g", word, f"not {words[0]} but it") for word in words]
    terms = terms_in_text(documents, definitions)
    asked = questions(terms, lambda section: section % 2, len, None, 0)
    assert len(asked) == len(words)
    sections = {word: number // 8 for number, word in enumerate(words)}
    for question in asked:
        assert len({*question.options}) == 4
        assert {sections[option] % 2 for option in question.options} == {question.section % 2}
        assert words[0] not in {*question.options} - {question.options[question.answer]}
    assert len({question.answer for question in asked}) == 4, "the right answer has no fixed place"


def test_glossaries_are_read_also_of_records_without_text(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    records = [
        {"book": "m", "module": "g", "text": "", "glossary": [["prion", "a protein"], ["bad"], ["", "x"]]},
        {"text": "t"},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    assert read_definitions(path) == [Definition("m", "g", "prion", "a protein")]
    path.write_text(json.dumps({"text": "t"}))
    with pytest.raises(CorpusError, match="no glossary"):
        read_definitions(path)
