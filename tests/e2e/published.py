"""What a user has before a bundle: an SAE as published, and a corpus."""

import json
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
