"""Complexity of the text of each window, from 0 to 10: the regression target of AdaptiveK's probe."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rudder.sae_models.activations import harvest
from rudder.sae_models.activations.corpus import CorpusError, Document, Windows
from rudder.sae_models.errors import UserError
from rudder.sae_models.evaluation import splicing

MAX_COMPLEXITY = 10.0
# Losses between these quantiles are scaled linearly to 0..MAX_COMPLEXITY; losses beyond them are clamped.
QUANTILES = (0.01, 0.99)


def corpus_complexity(documents: list[Document], windows: Windows, model: Path, device: torch.device) -> Tensor:
    """Return the complexities [n] that the corpus records. In arXiv 2508.17320 a language model rated each text.

    Raise CorpusError if a document has none.
    """
    del model, device
    complexities = [document.complexity for document in documents]
    if any(value is None for value in complexities):
        present = sum(value is not None for value in complexities)
        raise CorpusError(
            f"corpus: {present} of {len(complexities)} documents have a `complexity` from 0 to 10, which adaptive_k "
            "needs; add it to each record, or set sae.complexity to loss"
        )
    return torch.tensor(complexities, dtype=torch.float32)[windows.document]


def loss_complexity(documents: list[Document], windows: Windows, model: Path, device: torch.device) -> Tensor:
    """Return complexities [n] derived from the model's own mean loss on each window; our own, not the paper's. Raise
    ValueError if the model is not a causal language model.
    """
    del documents
    lm = harvest.load_model(model, device)
    if not harvest.is_causal_lm(lm.config):
        raise UserError(f"sae.complexity: loss needs a causal language model, {model} is none")
    nats, count = splicing.losses(lm, windows).unbind(1)
    loss = nats / count.clamp(min=1)
    low, high = torch.quantile(loss, torch.tensor(QUANTILES))
    complexities: Tensor = ((loss - low) / (high - low).clamp(min=1e-6)).clamp(0, 1) * MAX_COMPLEXITY
    return complexities


COMPLEXITIES: Mapping[str, Callable[[list[Document], Windows, Path, torch.device], Tensor]] = {
    "corpus": corpus_complexity,
    "loss": loss_complexity,
}


def source_name(settings: Any) -> str:
    """Return the name under which a source holds the complexities that an AdaptiveK configuration requests."""
    return f"complexity.{settings.complexity}"
