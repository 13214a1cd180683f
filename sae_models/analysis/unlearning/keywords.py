"""A control that needs no model: refuse a text that has a term of the topic."""

from collections.abc import Sequence

import torch

from rudder.sae_models.activations.corpus import Windows
from rudder.sae_models.analysis.unlearning.material import FOLDS, Material
from rudder.sae_models.analysis.unlearning.questions import has_words, words_of
from rudder.sae_models.analysis.unlearning.statistics import Estimate, Resamples, Sums, estimate, totals


def measure_filter(material: Material, drawn: Resamples) -> dict[str, Estimate]:
    """Return the shares of definitions and of running text that a filter refuses, of the topic, its neighbours and the
    far books. Its words are the topic's terms of the two folds that are not reported. A refusal is no answer, and is
    not counted as a wrong one.
    """
    sums, topic = Sums(len(material.split.documents)), material.split.topic
    for fold in range(FOLDS):
        terms = topic_terms(material, [other for other in range(FOLDS) if other != fold])
        for number in material.questions_of([fold]).tolist():
            question = material.questions[number]
            refused = torch.tensor([refuses(question.meaning, terms)])
            sums.add(torch.tensor([question.section]), asked=torch.ones(1), asked_refused=refused)
        index = material.windows_of([fold])
        texts = decoded(material, material.windows.windows.take(index))
        refused = torch.tensor([refuses(text, terms) for text in texts], dtype=torch.float64)
        sums.add(material.section[index], read=torch.ones(len(index)), read_refused=refused)
    counted = totals(drawn, sums)
    groups = {"forget": topic.books, "neighbour": topic.neighbours, "retain": material.split.far}
    return {
        f"{name}_{what}_refused": estimate(counted.ratio(f"{column}_refused", column, books))
        for name, books in groups.items()
        for what, column in (("definitions", "asked"), ("text", "read"))
    }


def topic_terms(material: Material, folds: Sequence[int]) -> list[tuple[str, ...]]:
    """Return the words of the topic's terms in some folds."""
    index = material.questions_of(folds, material.split.topic.books).tolist()
    return [words_of(question.options[question.answer]) for question in (material.questions[i] for i in index)]


def refuses(text: str, terms: Sequence[tuple[str, ...]]) -> bool:
    """Return whether a text has any of the terms."""
    words = words_of(text)
    present = {*words}
    return any(present.issuperset(term) and has_words(words, term) for term in terms)


def decoded(material: Material, windows: Windows) -> list[str]:
    """Return the text of windows."""
    texts: list[str] = material.rig.tokenizer.batch_decode(windows.tokens, skip_special_tokens=True)
    return texts
