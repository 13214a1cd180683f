"""Prompts of a chat corpus are the same for the same seed, and draw on every book alike."""

from collections import Counter
from itertools import islice

from rudder.sae_models.activations import prompts
from rudder.sae_models.activations.corpus import Document

DOCUMENTS = [
    Document("a-book", "m1", "x", terms=("cell", "virus", "host")),
    Document("b", "m2", "x", terms=tuple(f"king {number}" for number in range(100))),
    Document("c", "m3", "x"),
]
TEXTS = ["Tell a joke.", "What is {topic}?", "What is {topic} in {subject}?"]


def test_prompts_depend_on_the_seed_alone() -> None:
    first, same, other = (list(islice(prompts.prompts(TEXTS, DOCUMENTS, seed), 200)) for seed in (0, 0, 1))
    assert first == same != other


def test_templates_are_filled_with_terms_of_all_books() -> None:
    made = list(islice(prompts.prompts(TEXTS, DOCUMENTS, 0), 400))
    books = Counter(prompt.book for prompt in made)
    assert books[prompts.INSTRUCTIONS] == 100
    assert min(books["a-book"], books["b"]) > 100
    assert not any("{" in prompt.text for prompt in made)
    assert "What is virus in a book?" in {prompt.text for prompt in made}


def test_without_a_corpus_the_prompts_are_the_instructions() -> None:
    shipped = prompts.templates()
    made = list(islice(prompts.prompts(shipped, [], 0), 300))
    assert {prompt.text for prompt in made} == {text for text in shipped if "{" not in text}
    assert list(prompts.prompts(["What is {topic}?"], [], 0)) == []
