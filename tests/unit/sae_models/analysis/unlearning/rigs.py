"""The shipped model as a rig, with a small corpus of three books."""

import json
from functools import cache
from itertools import count
from pathlib import Path

from rudder.sae_models import PRETRAINED
from rudder.sae_models.activations import harvest
from rudder.sae_models.activations.corpus import Document
from rudder.sae_models.analysis.derive import Topic
from rudder.sae_models.analysis.unlearning.material import FOLDS, Size, fold_of
from rudder.sae_models.analysis.unlearning.rig import Rig
from rudder.sae_models.bundle import bundle

TOPIC = Topic(("microbiology",), ("anatomy",))
SMALL = Size(
    sections=9, windows=1, near_windows=1, length=48, questions=6, other_questions=3, near_questions=6, samples=3,
    leaks=2, steps=2,
)  # fmt: skip
SENTENCES = {
    "microbiology": "Bacteria have a cell wall. The virus {} infects its host and the immune system responds.",
    "anatomy": "The muscle {} is attached to the bone. Blood flows through the heart, and nerves carry signals to it.",
    "history": "In that year the king of {} went to war. The people voted for a new government and paid their taxes.",
}
NAMES = ("alba", "breva", "calda", "denta", "elva", "forma", "gelta", "hilda", "inda")


@cache
def rig() -> Rig:
    """Load the shipped model, its twin and bundle, once."""
    folder = PRETRAINED / "textbook-lm"
    loaded = bundle.load(PRETRAINED / "textbook-lm-layers.2")
    twin = harvest.load_model(PRETRAINED / "textbook-lm-twin")
    return Rig(harvest.load_model(folder), twin, harvest.load_tokenizer(folder), loaded)


def module_in_fold(book: str, number: int) -> str:
    """Return a module's name with which section `number` is in fold `number` modulo 3."""
    names = (f"m{number}-{attempt}" for attempt in count())
    return next(name for name in names if fold_of(Document(book, name, "")) == number % FOLDS)


def save_corpus(path: Path) -> Path:
    """Write nine sections of each book; every section has two terms, which a glossary defines."""
    with path.open("w") as file:
        for book, sentence in SENTENCES.items():
            terms = [f"{book[0]}{name}{kind}" for name in NAMES for kind in ("um", "is")]
            for number in range(len(NAMES)):
                own = terms[2 * number : 2 * number + 2]
                text = " ".join(sentence.format(term) for term in own for _ in range(2))
                glossary = [[term, f"a kind of {book} that is number {number}"] for term in own]
                record = {"book": book, "module": module_in_fold(book, number), "title": own[0], "text": text}
                file.write(json.dumps(record | {"glossary": glossary}) + "\n")
    return path
