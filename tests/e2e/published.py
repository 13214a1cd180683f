"""What a user has before a bundle: an SAE as published, and a corpus."""

import json
import random
from pathlib import Path

from rudder.sae_models import PRETRAINED
from rudder.sae_models.bundle import bundle as bundles
from rudder.sae_models.formats import saelens
from rudder.sae_models.formats.source import Declaration

MODEL, SHIPPED = PRETRAINED / "textbook-lm", PRETRAINED / "textbook-lm-layers.2"
SITE = "layers.2.resid_post"
DECLARED = Declaration("jumprelu", (SITE,), SITE, "textbook-lm")


def write(folder: Path, latents: int = 1000) -> bundles.Bundle:
    """Write the shipped SAE as a SAELens checkpoint, `whole`, and contexts of its first latents as `corpus.jsonl`.

    Return the shipped bundle, its catalogue closed.
    """
    shipped = bundles.load(SHIPPED)
    contexts = (context for index in range(0, latents, 4) for context in shipped.catalogue.get(index).contexts[:1])
    texts = [context.before + context.token + context.after for context in contexts]
    documents = [{"book": f"book {i}", "text": "\n".join(texts[i::10])} for i in range(10)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)))
    saelens.write(folder / "whole", shipped.sae, DECLARED)
    shipped.catalogue.close()
    return shipped


TOPICS = {
    "microbiology": "bacteria virus antibiotic infection colony membrane toxin pathogen immune strain culture microbe",
    "anatomy-physiology": "heart muscle bone artery nerve kidney lung tissue blood organ skeleton gland",
    "chemistry": "atom molecule acid reaction bond electron ion solution compound mole oxide catalyst",
    "us-history": "war president colony congress treaty slavery union state election law party army",
}
BETWEEN = ["the", "of", "and", "is", "in", "a", "that", "are", "with", "by", "from", "which"]


def write_topics(folder: Path, sections: int = 30, words: int = 600) -> dict[str, Path]:
    """Write a corpus of four topics, `CORPUS`, and texts half of which are on the first one, `TEXTS`."""
    draw = random.Random(0)

    def text(book: str, length: int) -> str:
        own = TOPICS[book].split()
        return " ".join(draw.choice(own if draw.random() < 0.5 else BETWEEN) for _ in range(length))

    def glossary(book: str) -> list[tuple[str, str]]:
        return [(term, f"what is {text(book, 4)}") for term in draw.sample(TOPICS[book].split(), 3)]

    documents = [
        {"book": book, "module": f"{book} {section}", "text": text(book, words), "glossary": glossary(book)}
        for book in TOPICS
        for section in range(sections)
    ]
    texts = [{"text": text(book, 60)} for book in ("microbiology", "us-history") * 20]
    files = {"CORPUS": folder / "topics.jsonl", "TEXTS": folder / "texts.jsonl"}
    for file, lines in (("CORPUS", documents), ("TEXTS", texts)):
        files[file].write_text("\n".join(json.dumps(line) for line in lines))
    return files
